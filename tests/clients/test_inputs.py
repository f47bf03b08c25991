"""Tests of input conversion: every value is preserved, or the request is rejected."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from samovar import InvalidRequest
from samovar._inputs import named_arrays, num_rows
from samovar.model import Input, Operation, Steps, TensorSpec
from samovar.tensors import Array

UINT8, INT64, FLOAT32 = np.dtype("u1"), np.dtype("<i8"), np.dtype("<f4")
IMAGE = TensorSpec("image", UINT8, (2, 2))
LATENT = TensorSpec("latent", FLOAT32, (3,))
LABEL = TensorSpec("label", INT64, ())
NUMBERS = st.sampled_from(["?", "i1", "u1", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8"]).flatmap(
    lambda dtype: arrays.arrays(dtype, st.integers(1, 4))
)


def operation(*inputs: Input) -> Operation:
    return Operation("edit", "", (), inputs, (), Steps(), False)


def can_hold(dtype: str, value: float) -> bool:
    if not math.isfinite(value) or value != int(value):
        return False
    return value in (0, 1) if dtype == "?" else np.iinfo(dtype).min <= int(value) <= np.iinfo(dtype).max


@given(NUMBERS, st.sampled_from(["u1", "<i4", "<i8", "?"]))
def test_conversion_to_integer_preserves_values_or_is_rejected(array: Array, dtype: str) -> None:
    program = operation(Input(TensorSpec("x", np.dtype(dtype), ())))
    if all(can_hold(dtype, value) for value in array.tolist()):
        converted = named_arrays(array, program)["x"]
        assert converted.dtype == dtype
        assert converted.tolist() == array.tolist()
    else:
        with pytest.raises(InvalidRequest):
            named_arrays(array, program)


@given(arrays.arrays("<f8", st.integers(1, 4), elements=st.floats(-1e30, 1e30)))
def test_float64_is_rounded_to_float32(array: Array) -> None:
    converted = named_arrays(array, operation(Input(TensorSpec("x", FLOAT32, ()))))["x"]
    assert converted.tobytes() == array.astype("<f4").tobytes()


@pytest.mark.parametrize(
    ("spec", "array", "expected"),
    [
        (IMAGE, np.full((1, 2, 2), 256), "expected uint8, got int64; uint8 cannot hold 256"),
        (IMAGE, np.full((1, 2, 2), 0.5), "expected uint8, got float64; uint8 cannot hold 0.5"),
        (IMAGE, np.full((1, 2, 2), np.nan), "uint8 cannot hold nan"),
        (LATENT, np.full((1, 3), 1e39), "expected float32, got float64; float32 cannot hold 1e+39"),
        (LABEL, np.array(["cat"]), "expected int64, got str"),
        (IMAGE, np.zeros((4,), np.uint8), r"expected shape [rows, 2, 2], got [4]"),
    ],
)
def test_inconvertible_array_is_rejected_with_reason(spec: TensorSpec, array: Array, expected: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        named_arrays(array, operation(Input(spec)))
    (violation,) = caught.value.violations
    assert violation.field == f"inputs[{spec.name}]"
    assert expected in violation.description


def test_unnamed_array_is_the_only_required_input() -> None:
    program = operation(Input(LABEL, optional=True), Input(LATENT))
    assert list(named_arrays(np.zeros((1, 3)), program)) == ["latent"]


def test_unnamed_array_for_two_inputs_is_rejected() -> None:
    with pytest.raises(
        InvalidRequest,
        match=r"expected a mapping from names to arrays; the inputs of edit are: image, latent",
    ):
        named_arrays(np.zeros((1, 3)), operation(Input(IMAGE), Input(LATENT)))


def test_unknown_input_is_rejected_with_known_names() -> None:
    with pytest.raises(
        InvalidRequest, match=r"inputs\[imgae\]: unknown input of edit; expected one of: image, label"
    ):
        named_arrays({"imgae": 1}, operation(Input(IMAGE), Input(LABEL)))


def test_array_without_batch_axis_is_for_every_row() -> None:
    named = named_arrays({"label": 3, "image": [[1, 2], [3, 4]]}, operation(Input(LABEL), Input(IMAGE)))
    assert {name: array.shape for name, array in named.items()} == {"label": (1,), "image": (1, 2, 2)}


def test_num_rows_is_common_batch_length() -> None:
    assert num_rows({"a": np.zeros((1, 2)), "b": np.zeros(5)}) == 5
    assert num_rows({}) == 1
    with pytest.raises(InvalidRequest, match="a has 4, b has 5"):
        num_rows({"a": np.zeros((4, 2)), "b": np.zeros(5)})
