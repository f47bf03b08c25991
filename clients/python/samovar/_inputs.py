"""Conversion of a user's arrays into the inputs of a program: names, element types, batch axis."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from samovar.errors import invalid_request
from samovar.model import Operation, TensorSpec
from samovar.tensors import Array

Inputs = ArrayLike | Mapping[str, ArrayLike]


def named_arrays(inputs: Inputs, operation: Operation) -> dict[str, Array]:
    """Return the inputs by name, in the program's element types, with a batch axis.

    Args:
        inputs: Arrays by name, or one array for the program's only required input. An array without a
            batch axis is used for every row.
        operation: The operation that declares the inputs.

    Returns:
        Arrays [rows, *shape] or [1, *shape].

    Raises:
        InvalidRequest: If a name is unknown, a shape does not fit, or a conversion would change a value.
    """
    named = inputs if isinstance(inputs, Mapping) else {_only_input(operation): inputs}
    specs = {entry.tensor.name: entry.tensor for entry in operation.inputs}
    for name in named:
        if name not in specs:
            raise invalid_request(
                f"inputs[{name}]", f"unknown input of {operation.name}; expected one of: {_join(specs)}"
            )
    return {name: _add_batch_axis(np.asarray(value), specs[name]) for name, value in named.items()}


def num_rows(arrays: Mapping[str, Array]) -> int:
    """Return the common length of the batch axes; an axis of length 1 is for every row.

    Raises:
        InvalidRequest: If the axes have different lengths above 1.
    """
    lengths = {name: len(array) for name, array in arrays.items()}
    distinct = set(lengths.values()) - {1}
    if len(distinct) > 1:
        listed = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise invalid_request("inputs", f"expected batch axes of length 1 or of one common length; {listed}")
    return distinct.pop() if distinct else 1


def slice_rows(arrays: Mapping[str, Array], start: int, size: int) -> dict[str, Array]:
    """Return rows start..start+size-1 of the arrays; an array that is for every row stays whole."""
    rows = num_rows(arrays)
    return {
        name: array[start : start + size] if len(array) == rows else array for name, array in arrays.items()
    }


def _only_input(operation: Operation) -> str:
    required = [entry.tensor.name for entry in operation.inputs if not entry.optional]
    names = required or [entry.tensor.name for entry in operation.inputs]
    if len(names) != 1:
        raise invalid_request(
            "inputs",
            f"expected a mapping from names to arrays; the inputs of {operation.name} are: {_join(names)}",
        )
    return names[0]


def _add_batch_axis(array: Array, spec: TensorSpec) -> Array:
    if array.ndim not in (len(spec.shape), len(spec.shape) + 1):
        expected = ", ".join(map(str, ("rows", *spec.shape)))
        raise invalid_request(f"inputs[{spec.name}]", f"expected shape [{expected}], got {list(array.shape)}")
    converted = _convert(array, spec)
    return converted[None] if array.ndim == len(spec.shape) else converted


def _convert(array: Array, spec: TensorSpec) -> Array:
    if array.dtype == spec.dtype:
        return array
    expected = f"expected {spec.dtype.name}, got {array.dtype.name}"
    if array.dtype.kind not in "biuf" or spec.dtype.kind not in "biuf":
        raise invalid_request(f"inputs[{spec.name}]", expected)
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(spec.dtype)
        changed = ~_is_preserved(array, converted)
    if changed.any():
        raise invalid_request(
            f"inputs[{spec.name}]", f"{expected}; {spec.dtype.name} cannot hold {array[changed].flat[0]}"
        )
    return converted


def _is_preserved(array: Array, converted: Array) -> Array:
    """Return where the conversion keeps the value; a float may be rounded but must not overflow."""
    if array.dtype.kind == converted.dtype.kind == "f":
        return np.asarray(np.isfinite(converted) | ~np.isfinite(array))
    return np.asarray((converted == array) & (converted.astype(array.dtype) == array))


def _join(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
