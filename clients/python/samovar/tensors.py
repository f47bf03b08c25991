"""NumPy arrays as wire tensors and back.

Knows the encoding (little-endian, C order, batch axis first) and nothing of
models: whether a shape suits a program is for the server to say.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samovar.v1 import inference_pb2, manifest_pb2

Array = NDArray[Any]

DTYPES: dict[manifest_pb2.DataType.ValueType, np.dtype[Any]] = {
    manifest_pb2.DATA_TYPE_BOOL: np.dtype("?"),
    manifest_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
    manifest_pb2.DATA_TYPE_INT32: np.dtype("<i4"),
    manifest_pb2.DATA_TYPE_INT64: np.dtype("<i8"),
    manifest_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    manifest_pb2.DATA_TYPE_FLOAT64: np.dtype("<f8"),
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in DTYPES.items()}


class MalformedTensor(ValueError):
    """A tensor message whose dtype, shape and bytes do not agree."""


def data_type(dtype: np.dtype[Any]) -> manifest_pb2.DataType.ValueType:
    """The wire's name of an element type; ValueError when it has none."""
    try:
        return _DATA_TYPES.get(dtype) or _DATA_TYPES[dtype.newbyteorder("<")]
    except KeyError:
        raise ValueError(f"no wire type for {dtype}; there are {', '.join(map(str, _DATA_TYPES))}") from None


def pack(array: Array) -> inference_pb2.Tensor:
    """An array as a message; ValueError for an element type that the wire lacks."""
    wire_type = data_type(array.dtype)
    little_endian = np.ascontiguousarray(array, dtype=DTYPES[wire_type])
    return inference_pb2.Tensor(dtype=wire_type, shape=array.shape, data=little_endian.tobytes())


def unpack(tensor: inference_pb2.Tensor) -> Array:
    """A message as a read-only array over its bytes; MalformedTensor when they do not agree."""
    if tensor.dtype not in DTYPES:
        raise MalformedTensor(f"expected a dtype, got {tensor.dtype}")
    dtype = DTYPES[tensor.dtype]
    shape = tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise MalformedTensor(f"expected extents of at least 0, got shape {list(shape)}")
    expected = math.prod(shape) * dtype.itemsize
    if len(tensor.data) != expected:
        raise MalformedTensor(
            f"expected {expected} bytes for {dtype.name}{list(shape)}, got {len(tensor.data)}"
        )
    try:
        array = np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError as error:
        raise MalformedTensor(f"expected a shape that an array can have: {error}") from None
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise MalformedTensor("expected booleans to be bytes 0 or 1")
    return array
