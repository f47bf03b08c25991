"""A user's arrays as a program takes them: names, element types, batch axis. Knows no messages."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import ArrayLike

from samovar.errors import invalid_request
from samovar.model import Operation, TensorSpec
from samovar.tensors import Array

Inputs = ArrayLike | Mapping[str, ArrayLike]


def named_arrays(inputs: Inputs, operation: Operation) -> dict[str, Array]:
    """Inputs by name, in the program's element types, with a batch axis.

    A bare array goes to the program's only required input. An array of the row's own
    rank stands for every row. InvalidRequest when an array cannot be what the program wants.
    """
    named = inputs if isinstance(inputs, Mapping) else {_only_input(operation): inputs}
    specs = {each.tensor.name: each.tensor for each in operation.inputs}
    for name in named:
        if name not in specs:
            raise invalid_request(
                f"inputs[{name}]", f"{operation.name} has no such input; it has {_listed(specs)}"
            )
    return {name: _batch(np.asarray(value), specs[name]) for name, value in named.items()}


def num_rows(arrays: Mapping[str, Array]) -> int:
    """The common length of the batch axes, those of length 1 being for every row."""
    lengths = {name: len(array) for name, array in arrays.items()}
    others = set(lengths.values()) - {1}
    if len(others) > 1:
        given = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise invalid_request("inputs", f"expected batch axes of 1 or of one common length; {given}")
    return others.pop() if others else 1


def part_of(arrays: Mapping[str, Array], start: int, size: int) -> dict[str, Array]:
    """So many rows from the one at `start` on; arrays that are for every row stay whole."""
    rows = num_rows(arrays)
    return {name: each[start : start + size] if len(each) == rows else each for name, each in arrays.items()}


def _only_input(operation: Operation) -> str:
    required = [each.tensor.name for each in operation.inputs if not each.optional]
    names = required or [each.tensor.name for each in operation.inputs]
    if len(names) != 1:
        raise invalid_request(
            "inputs", f"expected a mapping from names to arrays; {operation.name} has {_listed(names)}"
        )
    return names[0]


def _batch(array: Array, spec: TensorSpec) -> Array:
    if array.ndim not in (len(spec.shape), len(spec.shape) + 1):
        expected = ", ".join(map(str, ("rows", *spec.shape)))
        raise invalid_request(f"inputs[{spec.name}]", f"expected shape [{expected}], got {list(array.shape)}")
    converted = _converted(array, spec)
    return converted[None] if array.ndim == len(spec.shape) else converted


def _converted(array: Array, spec: TensorSpec) -> Array:
    if array.dtype == spec.dtype:
        return array
    expected = f"expected {spec.dtype.name}, got {array.dtype.name}"
    if array.dtype.kind not in "biuf" or spec.dtype.kind not in "biuf":
        raise invalid_request(f"inputs[{spec.name}]", expected)
    with np.errstate(invalid="ignore", over="ignore"):
        converted = array.astype(spec.dtype)
        changed = ~_kept(array, converted)
    if changed.any():
        raise invalid_request(
            f"inputs[{spec.name}]", f"{expected}, whose {array[changed].flat[0]} it cannot hold"
        )
    return converted


def _kept(array: Array, converted: Array) -> Array:
    """Where the conversion loses nothing; a float may be rounded, but not overflow."""
    if array.dtype.kind == converted.dtype.kind == "f":
        return np.asarray(np.isfinite(converted) | ~np.isfinite(array))
    return np.asarray((converted == array) & (converted.astype(array.dtype) == array))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
