"""Encoding of NumPy arrays as tensor messages: little-endian, C order, batch axis first."""

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
    """A tensor message with an invalid dtype, shape or number of bytes."""


def data_type(dtype: np.dtype[Any]) -> manifest_pb2.DataType.ValueType:
    """Return the wire's data type of a NumPy dtype, in any byte order.

    Raises:
        ValueError: If the wire has no such type.
    """
    try:
        return _DATA_TYPES.get(dtype) or _DATA_TYPES[dtype.newbyteorder("<")]
    except KeyError as error:
        known = ", ".join(map(str, _DATA_TYPES))
        raise ValueError(f"no wire type for dtype {dtype}; expected one of: {known}") from error


def pack(array: Array) -> inference_pb2.Tensor:
    """Encode an array.

    Raises:
        ValueError: If the wire has no type for its elements.
    """
    wire_type = data_type(array.dtype)
    little_endian = np.ascontiguousarray(array, dtype=DTYPES[wire_type])
    return inference_pb2.Tensor(dtype=wire_type, shape=array.shape, data=little_endian.tobytes())


def unpack(tensor: inference_pb2.Tensor) -> Array:
    """Decode a message as a read-only array that shares its bytes.

    Raises:
        MalformedTensor: If the dtype is unknown, the shape is invalid, or the number of bytes does not fit.
    """
    if tensor.dtype not in DTYPES:
        raise MalformedTensor(f"expected a known dtype, got {tensor.dtype}")
    dtype = DTYPES[tensor.dtype]
    shape = tuple(tensor.shape)
    if min(shape, default=0) < 0:
        raise MalformedTensor(f"expected a shape without negative axes, got {list(shape)}")
    expected = math.prod(shape) * dtype.itemsize
    if len(tensor.data) != expected:
        raise MalformedTensor(
            f"expected {expected} bytes for {dtype.name}{list(shape)}, got {len(tensor.data)}"
        )
    try:
        array = np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
    except ValueError as error:
        raise MalformedTensor(f"expected a shape that NumPy supports, got {list(shape)}: {error}") from error
    if dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
        raise MalformedTensor("expected boolean bytes of 0 or 1")
    return array
