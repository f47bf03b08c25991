"""How a model is written down: programs of init -> step x n -> readout over rows.

The authoring side of proto/samovar/v1/manifest.proto: a program names tensors and
holds the modules that compute them. It knows no family, no file and no format.

A module's arguments are bound by name, each to the program's state, input,
parameter or noise of that name, or to one of the int64 scalars `step_index` and
`num_steps`. Every tensor has the batch axis first: states, inputs and noise are
[B, *shape], parameters are [B].
"""

import inspect
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

DType = Literal["bool", "uint8", "int32", "int64", "float32", "float64"]
_METHOD = re.compile(r"[a-z][a-z0-9_]*")
OPERATIONS = ("sample", "reconstruct", "score", "energy", "encode", "decode", "classify")


class ProgramError(ValueError):
    """A program that cannot be run as it is written."""


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a row: `shape` lacks the batch axis, bounds are inclusive."""

    name: str
    dtype: DType = "float32"
    shape: tuple[int, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    doc: str = ""


STEP_COUNTERS = (TensorSpec("step_index", "int64"), TensorSpec("num_steps", "int64"))


@dataclass(frozen=True)
class DataSpec:
    """What one row of data is: for `image`, [height, width] or [height, width, channels]."""

    kind: Literal["image", "vector", "tokens"]
    tensor: TensorSpec
    num_levels: int = 0
    vocabulary: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One setting of a request; modules see it as a scalar per row, [B].

    The dtype that modules see is float32, int64 or bool; for a choice it is the
    int64 index of the chosen name, and `default` is an index too.
    """

    name: str
    type: Literal["float", "integer", "boolean", "choice"]
    default: float
    minimum: float
    maximum: float
    choices: tuple[str, ...] = ()
    doc: str = ""

    def __post_init__(self) -> None:
        if not self.minimum <= self.default <= self.maximum:
            raise ProgramError(
                f"parameter {self.name!r}: expected a default between {self.minimum:g} and {self.maximum:g}, "
                f"got {self.default:g}"
            )

    @classmethod
    def choice(cls, name: str, choices: tuple[str, ...], doc: str, default: str | None = None) -> "Parameter":
        """One of several names; the first is the default unless another is named."""
        index = choices.index(default) if default is not None else 0
        return cls(name, "choice", index, 0, len(choices) - 1, choices, doc)

    @property
    def spec(self) -> TensorSpec:
        """The scalar that modules see."""
        dtypes: dict[str, DType] = {"float": "float32", "boolean": "bool"}
        return TensorSpec(self.name, dtypes.get(self.type, "int64"))


@dataclass(frozen=True)
class Input:
    """A tensor of the request; left out, when optional, every element is `default`."""

    tensor: TensorSpec
    optional: bool = False
    default: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Random float32 numbers drawn anew for every row and call; `stream` is unique in a program."""

    name: str
    distribution: Literal["normal", "uniform"]
    shape: tuple[int, ...]
    stream: int
    doc: str = ""

    @property
    def spec(self) -> TensorSpec:
        """The tensor that modules see."""
        return TensorSpec(self.name, "float32", self.shape, doc=self.doc)


@dataclass(frozen=True)
class Steps:
    """How many steps a row takes: `fixed`, or ceil(the integer parameter / units_per_step).

    `done` names a boolean scalar of the state that ends the row early.
    """

    fixed: int | None = None
    parameter: str | None = None
    units_per_step: int = 1
    done_flag: str | None = None


@dataclass(frozen=True)
class Score:
    """What kind of number a program returns, and of what density.

    `nats`, `standard_error` and `row_dimensions` name outputs, `draws` a parameter. With
    `row_dimensions` rows differ in length, and `dimensions` is the greatest one.
    """

    kind: Literal["exact", "lower_bound", "estimate", "unnormalized"]
    dimensions: int
    coordinate_space: str
    nats_output: str
    standard_error_output: str | None = None
    draws_parameter: str | None = None
    row_dimensions_output: str | None = None


def program_name(operation: str, method: str) -> str:
    """What a program is called: `sample`, or `sample:inpaint` for a method."""
    return f"{operation}:{method}" if method else operation


@dataclass(frozen=True)
class Program:
    """One operation, or one method of doing it. ProgramError when its names do not fit together.

    `init` returns the state, `step` the next state, both in declared order;
    `readout` returns the outputs in declared order. Without `init` the state
    starts as zeros; without `step` there are no steps.
    """

    operation: str
    readout: nn.Module
    outputs: tuple[TensorSpec, ...]
    doc: str
    init: nn.Module | None = None
    step: nn.Module | None = None
    state: tuple[TensorSpec, ...] = ()
    steps: Steps | None = None
    parameters: tuple[Parameter, ...] = ()
    inputs: tuple[Input, ...] = ()
    noise: tuple[Noise, ...] = ()
    score: Score | None = None
    previewable: bool = False
    variant: str = ""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ProgramError(f"program {self.name!r}: {problem}")

    @property
    def name(self) -> str:
        """`sample`, or `sample:inpaint` for a method."""
        return program_name(self.operation, self.variant)

    @property
    def scope(self) -> dict[str, TensorSpec]:
        """Every tensor that a module of this program may take, by name."""
        return {spec.name: spec for spec in _specs(self)}

    @property
    def modules(self) -> Iterator[tuple[str, nn.Module, tuple[TensorSpec, ...]]]:
        """Role, module and returned tensors of init, step and readout, as far as they exist."""
        if self.init is not None:
            yield "init", self.init, self.state
        if self.step is not None:
            yield "step", self.step, self.state
        yield "readout", self.readout, self.outputs


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """The names by which a module's arguments are bound; ProgramError for *args and **kwargs."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
        raise ProgramError(
            f"{type(module).__name__}.forward{inspect.signature(module.forward)}: expected named positional "
            "arguments only, because they are bound by name"
        )
    return tuple(parameter.name for parameter in parameters)


def _specs(program: Program) -> list[TensorSpec]:
    return [
        *program.state,
        *(given.tensor for given in program.inputs),
        *(parameter.spec for parameter in program.parameters),
        *(noise.spec for noise in program.noise),
        *STEP_COUNTERS,
    ]


def _problems(program: Program) -> Iterator[str]:
    yield from _operation_problems(program)
    yield from _name_problems(program)
    yield from _binding_problems(program)
    yield from _noise_problems(program)
    yield from _step_problems(program)
    yield from _score_problems(program)


def _operation_problems(program: Program) -> Iterator[str]:
    if program.operation not in OPERATIONS:
        yield f"expected one of {', '.join(OPERATIONS)} as the operation"
    if program.variant and not _METHOD.fullmatch(program.variant):
        yield "expected a method of lower-case letters, digits and underscores"
    if not program.outputs:
        yield "expected at least one output"


def _name_problems(program: Program) -> Iterator[str]:
    names = [spec.name for spec in _specs(program)]
    outputs = [spec.name for spec in program.outputs]
    for name in _repeated(names) + _repeated(outputs):
        yield f"the name {name!r} means two things; within a program every name is unique"
    for stream in _repeated([noise.stream for noise in program.noise]):
        yield f"two noise tensors share stream {stream} and would be equal; give each its own"


def _repeated(items: Sequence[Hashable]) -> list[Hashable]:
    return [item for item, count in Counter(items).items() if count > 1]


def _binding_problems(program: Program) -> Iterator[str]:
    for role, module, _ in program.modules:
        for name in argument_names(module):
            if name not in program.scope:
                yield (
                    f"{role} {type(module).__name__} takes {name!r}, which is none of this program's "
                    f"tensors; there are {', '.join(program.scope)}"
                )


def _noise_problems(program: Program) -> Iterator[str]:
    read = Counter(name for _, module, _ in program.modules for name in argument_names(module))
    for noise in program.noise:
        if read[noise.name] > 1:
            yield (
                f"noise {noise.name!r} is read by {read[noise.name]} modules, and init and the first step "
                "would draw the same numbers; give each its own"
            )


def _step_problems(program: Program) -> Iterator[str]:
    steps = program.steps
    if (program.step is None) != (steps is None):
        yield "expected both step and steps, or neither"
    if (program.step is not None or program.init is not None) and not program.state:
        yield "expected state, because init or step must return some"
    if steps is None:
        return
    if (steps.fixed is None) == (steps.parameter is None) or steps.units_per_step < 1:
        yield "expected steps to be either fixed or a parameter, with units_per_step of at least 1"
    integers = {parameter.name for parameter in program.parameters if parameter.type == "integer"}
    if steps.parameter is not None and steps.parameter not in integers:
        yield f"steps come from {steps.parameter!r}, which is not an integer parameter"
    flags = {spec.name for spec in program.state if (spec.dtype, spec.shape) == ("bool", ())}
    if steps.done_flag is not None and steps.done_flag not in flags:
        yield f"rows end by {steps.done_flag!r}, which is not a boolean scalar of the state"


def _score_problems(program: Program) -> Iterator[str]:
    score = program.score
    if (program.operation in ("score", "energy")) != (score is not None):
        yield "expected a score for the operations score and energy, and for no others"
    if score is None:
        return
    for name in filter(None, (score.nats_output, score.standard_error_output, score.row_dimensions_output)):
        if name not in {spec.name for spec in program.outputs}:
            yield f"the score names {name!r}, which is not an output"
    if score.draws_parameter is not None and score.draws_parameter not in {
        parameter.name for parameter in program.parameters
    }:
        yield f"the score counts draws by {score.draws_parameter!r}, which is not a parameter"
