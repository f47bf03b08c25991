"""Golden rows: small requests with recorded results, against which an artifact is verified."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifacts import manifest
from export.artifacts.interpreter import Interpreter, Rows, make_rows
from export.graphs.program import ProgramError
from samovar.tensors import DTYPES
from samovar.v1 import manifest_pb2

# Kernels differ in the last bits of a float32 between libraries and batch sizes. Steps accumulate this error.
_RELATIVE_TOLERANCE = 1e-4
_BINARY_LEVELS = 2


@dataclass(frozen=True)
class Example:
    """A small request to a program, for example `sample` or `sample:inpaint`; choices are given by index."""

    program: str
    seed: int = 0
    first_row: int = 0
    rows: int = 3
    parameters: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def indices(self) -> range:
        """The row indices."""
        return range(self.first_row, self.first_row + self.rows)


def record(interpreter: Interpreter, example: Example) -> manifest_pb2.GoldenRows:
    """Run a request and return it with its results and their tolerances.

    Raises:
        ProgramError: If a server would reject the request.
    """
    program = interpreter.program(example.program)
    _check_parameters(program, example)
    rows = make_rows(program, example.seed, example.indices, example.parameters, example.inputs)
    outputs = interpreter.run(example.program, rows)
    return manifest_pb2.GoldenRows(
        operation=program.operation,
        variant=program.variant,
        seed=example.seed,
        first_row=example.first_row,
        rows=example.rows,
        parameters=example.parameters,
        inputs={name: manifest.golden_tensor_to_proto(array) for name, array in example.inputs.items()},
        outputs={name: manifest.golden_tensor_to_proto(array) for name, array in outputs.items()},
        tolerance={
            name: _tolerance(name, array, interpreter.manifest.data_spec) for name, array in outputs.items()
        },
    )


def _check_parameters(program: manifest_pb2.Program, example: Example) -> None:
    parameters = {parameter.name: parameter for parameter in program.parameters}
    for name, value in example.parameters.items():
        if name not in parameters:
            raise ProgramError(
                f"golden request to {example.program}: unknown parameter {name!r}; "
                f"expected one of: {', '.join(parameters) or 'none'}"
            )
        minimum, maximum = parameters[name].minimum, parameters[name].maximum
        if not minimum <= value <= maximum:
            raise ProgramError(
                f"golden request to {example.program}: parameter {name!r}: expected a value from "
                f"{minimum:g} to {maximum:g}, got {value:g}"
            )


def to_rows(program: manifest_pb2.Program, golden: manifest_pb2.GoldenRows) -> Rows:
    """Return the rows that golden rows request."""
    indices = range(golden.first_row, golden.first_row + golden.rows)
    inputs = {name: to_array(tensor) for name, tensor in golden.inputs.items()}
    return make_rows(program, golden.seed, indices, golden.parameters, inputs)


def to_array(tensor: manifest_pb2.GoldenTensor) -> NDArray[Any]:
    """Return a golden tensor as an array."""
    return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))


def _tolerance(output: str, array: NDArray[Any], data_spec: manifest_pb2.DataSpec) -> float:
    if array.dtype.kind not in "uib":
        return float(f"{_RELATIVE_TOLERANCE * max(1.0, float(np.abs(array).max(initial=0.0))):.1e}")
    # Rounding may move a pixel to the next level. With two levels, the next level is the opposite one.
    is_image = data_spec.kind == manifest_pb2.DataSpec.KIND_IMAGE and output == data_spec.tensor.name
    return 1.0 if is_image and data_spec.num_levels > _BINARY_LEVELS else 0.0
