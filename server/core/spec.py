"""Specifications of models, programs, graphs and tensors, read from an artifact's manifest.

Knows neither the manifest's format (models/manifest.py) nor how graphs run (runtime/).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from samovar.operations import program_name

STEP_INDEX = "step_index"
NUM_STEPS = "num_steps"

ITEM_SIZES = {"bool": 1, "uint8": 1, "int32": 4, "int64": 8, "float32": 4, "float64": 8}

# Formats of graphs, in order of preference; runtime/ implements each.
FORMATS = ("onnx", "torchscript", "torch_export")

ParameterKind = Literal["float", "integer", "boolean", "choice"]
PARAMETER_DTYPES: dict[ParameterKind, str] = {
    "float": "float32",
    "integer": "int64",
    "boolean": "bool",
    "choice": "int64",
}


@dataclass(frozen=True)
class ProgramKey:
    """Identity of a program inside a server."""

    model: str
    version: str
    format: str
    operation: str
    variant: str = ""

    @property
    def name(self) -> str:
        return program_name(self.operation, self.variant)

    def __str__(self) -> str:
        return f"{self.model}/{self.version}/{self.name} ({self.format})"


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a row, without the batch axis; `dtype` is a NumPy name."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class ParameterSpec:
    """One scalar parameter of a request; graphs read one scalar per row."""

    name: str
    kind: ParameterKind
    default: float
    minimum: float
    maximum: float
    choices: tuple[str, ...] = ()

    @property
    def tensor(self) -> TensorSpec:
        return TensorSpec(self.name, PARAMETER_DTYPES[self.kind])


@dataclass(frozen=True)
class InputSpec:
    """One input tensor of a request; `default` fills an optional one that is omitted."""

    tensor: TensorSpec
    optional: bool = False
    default: float = 0.0


@dataclass(frozen=True)
class NoiseSpec:
    """Random numbers that graphs read, from a stream of samovar.noise."""

    tensor: TensorSpec
    distribution: Literal["normal", "uniform"]
    stream: int


@dataclass(frozen=True)
class StepSchedule:
    """Number of steps of a row: `fixed`, or the value of `parameter` over `units_per_step`, rounded up.

    `done_flag` names a boolean scalar of the state that ends a row early; empty if there is none.
    """

    fixed: int = 0
    parameter: str = ""
    units_per_step: int = 1
    done_flag: str = ""

    def of(self, parameters: Mapping[str, float]) -> int:
        """Return the number of steps of a row with these parameters."""
        if not self.parameter:
            return self.fixed
        return math.ceil(parameters[self.parameter] / self.units_per_step)


@dataclass(frozen=True)
class ScoreSpec:
    """Meaning of a program's score; the strings name outputs and a parameter, empty if there is none."""

    dimensions: int
    is_normalized: bool
    nats_output: str
    standard_error_output: str = ""
    draws_parameter: str = ""
    row_dimensions_output: str = ""


@dataclass(frozen=True)
class GraphSpec:
    """A pure function of tensors, with its inputs and outputs in order."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ProgramSpec:
    """One operation, or a variant of it: init -> step x n -> readout over rows."""

    operation: str
    readout: GraphSpec
    init: GraphSpec | None = None
    step: GraphSpec | None = None
    state: tuple[TensorSpec, ...] = ()
    steps: StepSchedule = StepSchedule()
    parameters: tuple[ParameterSpec, ...] = ()
    inputs: tuple[InputSpec, ...] = ()
    noise: tuple[NoiseSpec, ...] = ()
    score: ScoreSpec | None = None
    previewable: bool = False
    variant: str = ""

    @property
    def name(self) -> str:
        return program_name(self.operation, self.variant)

    @property
    def graphs(self) -> tuple[GraphSpec, ...]:
        return tuple(graph for graph in (self.init, self.step, self.readout) if graph is not None)

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.readout.outputs

    @cached_property
    def output_row_bytes(self) -> int:
        return sum(tensor.row_bytes for tensor in self.outputs)

    @cached_property
    def least_steps(self) -> int:
        """Number of steps of the shortest rows that a request may ask for."""
        return self.steps.of({parameter.name: parameter.minimum for parameter in self.parameters})

    def defaults(self) -> dict[str, float]:
        """Return the default of every parameter."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def tensors(self) -> dict[str, TensorSpec]:
        """Return every tensor that a graph's input may be bound to, by name."""
        counters = [TensorSpec(name, "int64") for name in (STEP_INDEX, NUM_STEPS)]
        declared = [
            *self.state,
            *(parameter.tensor for parameter in self.parameters),
            *(item.tensor for item in self.inputs),
            *(item.tensor for item in self.noise),
        ]
        return {tensor.name: tensor for tensor in (*counters, *declared)}


@dataclass(frozen=True)
class GoldenRows:
    """A request to a program, with its known outputs; arrays have the batch axis first."""

    program: str
    seed: int
    first_row: int
    rows: int
    parameters: Mapping[str, float]
    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    tolerance: Mapping[str, float]


@dataclass(frozen=True)
class ModelSpec:
    """One artifact: its identity, its programs, and the file of every graph by format."""

    name: str
    version: str
    digest: str
    programs: Mapping[str, ProgramSpec]
    files: Mapping[str, Mapping[str, Path]]
    golden: Sequence[GoldenRows]
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)

    def variants(self, operation: str) -> list[str]:
        """Return the variants of an operation; "" is the default one."""
        return [program.variant for program in self.programs.values() if program.operation == operation]

    def graphs(self) -> dict[str, GraphSpec]:
        """Return every graph of every program, by name."""
        return {graph.name: graph for program in self.programs.values() for graph in program.graphs}
