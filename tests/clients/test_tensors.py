"""Tests of tensor messages: round trips, and rejection of malformed messages."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from samovar.tensors import DTYPES, Array, MalformedTensor, data_type, pack, unpack
from samovar.v1 import inference_pb2, manifest_pb2

SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
ARRAYS = st.sampled_from(list(DTYPES.values())).flatmap(lambda dtype: arrays.arrays(dtype, SHAPES))


@given(ARRAYS)
def test_array_is_equal_after_round_trip(array: Array) -> None:
    restored = unpack(pack(array))
    assert (restored.dtype, restored.shape, restored.tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(ARRAYS, st.data())
def test_pack_ignores_strides_and_byte_order(array: Array, data: st.DataObject) -> None:
    axes = data.draw(st.permutations(range(array.ndim)))
    view = array.transpose(axes)
    swapped = view.astype(view.dtype.newbyteorder(">"))
    assert pack(view) == pack(swapped) == pack(np.ascontiguousarray(view).reshape(view.shape))


@given(ARRAYS, st.binary(min_size=1, max_size=9))
def test_unpack_rejects_wrong_number_of_bytes(array: Array, surplus: bytes) -> None:
    tensor = pack(array)
    tensor.data += surplus
    expected = f"expected {array.nbytes} bytes .*, got {array.nbytes + len(surplus)}"
    with pytest.raises(MalformedTensor, match=expected):
        unpack(tensor)


@given(
    st.lists(st.integers(-(2**62), 2**62), max_size=6), st.sampled_from(list(DTYPES)), st.binary(max_size=64)
)
def test_unpack_decodes_or_rejects_any_message(
    shape: list[int], dtype: manifest_pb2.DataType.ValueType, data: bytes
) -> None:
    tensor = inference_pb2.Tensor(dtype=dtype, shape=shape, data=data)
    try:
        array = unpack(tensor)
    except MalformedTensor:
        return
    assert array.shape == tuple(shape)
    assert array.nbytes == math.prod(shape) * DTYPES[dtype].itemsize == len(data)


def test_unpack_rejects_message_without_dtype() -> None:
    with pytest.raises(MalformedTensor, match="expected a known dtype"):
        unpack(inference_pb2.Tensor(shape=[1], data=b"0"))


def test_unpack_rejects_boolean_bytes_above_1() -> None:
    tensor = inference_pb2.Tensor(dtype=manifest_pb2.DATA_TYPE_BOOL, shape=[2], data=b"\x01\x02")
    with pytest.raises(MalformedTensor, match="0 or 1"):
        unpack(tensor)


@pytest.mark.parametrize("dtype", ["c8", "f2", "U3", "O", "M8[s]"])
def test_data_type_rejects_unknown_dtype_with_known_ones(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"no wire type for dtype .*float32"):
        data_type(np.dtype(dtype))
