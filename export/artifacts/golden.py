"""Golden rows: small requests with known answers, the proof that an artifact computes what it should."""

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

# Kernels of different libraries and batch sizes differ in the last bits of a float32; steps add them up.
_RELATIVE_TOLERANCE = 1e-4
_OPPOSITES = 2


@dataclass(frozen=True)
class Example:
    """A small request to a program, `sample` or `sample:inpaint`, say; choices are given by index."""

    program: str
    seed: int = 0
    first_row: int = 0
    rows: int = 3
    parameters: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def indices(self) -> range:
        """The index of every row."""
        return range(self.first_row, self.first_row + self.rows)


def record(eager: Interpreter, example: Example) -> manifest_pb2.GoldenRows:
    """A request with the answer that the modules give; ProgramError when a server would refuse it."""
    program = eager.program(example.program)
    _refuse_out_of_bounds(program, example)
    rows = make_rows(program, example.seed, example.indices, example.parameters, example.inputs)
    outputs, value = eager.run(example.program, rows), eager.manifest.data_spec
    operation, _, method = example.program.partition(":")
    return manifest_pb2.GoldenRows(
        operation=operation,
        variant=method,
        seed=example.seed,
        first_row=example.first_row,
        rows=example.rows,
        parameters=example.parameters,
        inputs={name: manifest.golden_tensor_to_proto(array) for name, array in example.inputs.items()},
        outputs={name: manifest.golden_tensor_to_proto(array) for name, array in outputs.items()},
        tolerance={name: _tolerance(array, value, name) for name, array in outputs.items()},
    )


def _refuse_out_of_bounds(program: manifest_pb2.Program, example: Example) -> None:
    known = {parameter.name: parameter for parameter in program.parameters}
    for name, value in example.parameters.items():
        if name not in known:
            raise ProgramError(
                f"a golden request to {example.program}: expected parameters among "
                f"{', '.join(known) or 'none'}, got {name!r}"
            )
        least, most = known[name].minimum, known[name].maximum
        if not least <= value <= most:
            raise ProgramError(
                f"a golden request to {example.program}: expected {name} from {least:g} to {most:g}, "
                f"got {value:g}"
            )


def request(program: manifest_pb2.Program, golden: manifest_pb2.GoldenRows) -> Rows:
    """The rows that golden rows ask for."""
    indices = range(golden.first_row, golden.first_row + golden.rows)
    inputs = {name: array(tensor) for name, tensor in golden.inputs.items()}
    return make_rows(program, golden.seed, indices, golden.parameters, inputs)


def array(tensor: manifest_pb2.GoldenTensor) -> NDArray[Any]:
    """The array inside a golden tensor."""
    return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tuple(tensor.shape))


def _tolerance(array: NDArray[Any], value: manifest_pb2.DataSpec, output: str) -> float:
    if array.dtype.kind not in "uib":
        return float(f"{_RELATIVE_TOLERANCE * max(1.0, float(np.abs(array).max(initial=0.0))):.1e}")
    # Rounding to a level may fall the other way by one, which is nothing, if it is not the opposite.
    is_picture = value.kind == manifest_pb2.DataSpec.KIND_IMAGE and output == value.tensor.name
    return 1.0 if is_picture and value.num_levels > _OPPOSITES else 0.0
