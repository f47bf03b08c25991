"""The definition of a model: programs of init -> step x n -> readout over rows.

This is the authoring side of proto/samovar/v1/manifest.proto. A program names tensors and holds
the modules that compute them. It does not depend on families, files or formats.

A module's arguments are bound by name. Each argument is a state, input, parameter or noise tensor
of the program, or one of the int64 scalars `step_index` and `num_steps`. The batch axis comes
first: states, inputs and noise are [B, *shape], parameters are [B].
"""

import inspect
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from samovar.operations import OPERATIONS, program_name

DType = Literal["bool", "uint8", "int32", "int64", "float32", "float64"]
_VARIANT = re.compile(r"[a-z][a-z0-9_]*")


class ProgramError(ValueError):
    """Raised for a program definition that is inconsistent."""


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of one row: `shape` excludes the batch axis, the bounds are inclusive."""

    name: str
    dtype: DType = "float32"
    shape: tuple[int, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    doc: str = ""


STEP_COUNTERS = (TensorSpec("step_index", "int64"), TensorSpec("num_steps", "int64"))


@dataclass(frozen=True)
class DataSpec:
    """The type of one row of data; an `image` is [height, width] or [height, width, channels]."""

    kind: Literal["image", "vector", "tokens"]
    tensor: TensorSpec
    num_levels: int = 0
    vocabulary: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """A request parameter; modules receive it as one scalar per row, [B].

    Modules receive float32, int64 or bool. A choice is the int64 index of the chosen name, and its
    `default` is an index too.
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
        """Return a parameter that takes one of several names.

        Args:
            name: Parameter name.
            choices: The allowed names.
            doc: Description for users.
            default: The default name; the first of `choices` if None.
        """
        index = choices.index(default) if default is not None else 0
        return cls(name, "choice", index, 0, len(choices) - 1, choices, doc)

    @property
    def spec(self) -> TensorSpec:
        """The scalar that modules receive."""
        dtypes: dict[str, DType] = {"float": "float32", "boolean": "bool"}
        return TensorSpec(self.name, dtypes.get(self.type, "int64"))


@dataclass(frozen=True)
class Input:
    """A request tensor; an optional tensor that is omitted has `default` in every element."""

    tensor: TensorSpec
    optional: bool = False
    default: float = 0.0


@dataclass(frozen=True)
class Noise:
    """Random float32 numbers, drawn for each row at each graph call; `stream` is unique in a program."""

    name: str
    distribution: Literal["normal", "uniform"]
    shape: tuple[int, ...]
    stream: int
    doc: str = ""

    @property
    def spec(self) -> TensorSpec:
        """The tensor that modules receive."""
        return TensorSpec(self.name, "float32", self.shape, doc=self.doc)


@dataclass(frozen=True)
class Steps:
    """The number of steps of a row: `fixed`, or ceil(`parameter` / `units_per_step`).

    `parameter` names an integer parameter. `done_flag` names a boolean scalar of the state; a row
    ends early when it is true.
    """

    fixed: int | None = None
    parameter: str | None = None
    units_per_step: int = 1
    done_flag: str | None = None


@dataclass(frozen=True)
class Score:
    """The meaning of the number that a score or energy program returns.

    The `*_output` fields name outputs, `draws_parameter` names a parameter. With `row_dimensions_output`
    rows differ in length, and `dimensions` is the maximum.
    """

    kind: Literal["exact", "lower_bound", "estimate", "unnormalized"]
    dimensions: int
    coordinate_space: str
    nats_output: str
    standard_error_output: str | None = None
    draws_parameter: str | None = None
    row_dimensions_output: str | None = None


@dataclass(frozen=True)
class Program:
    """One operation, or one variant of it.

    `init` returns the state and `step` returns the next state, both in declared order. `readout`
    returns the outputs in declared order. Without `init` the state starts as zeros. Without `step`
    there are no steps.

    Raises:
        ProgramError: On construction, if the names do not match each other.
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
        for problem in _find_problems(self):
            raise ProgramError(f"program {self.name!r}: {problem}")

    @property
    def name(self) -> str:
        """The operation, with the variant if there is one: `sample`, `sample:inpaint`."""
        return program_name(self.operation, self.variant)

    @property
    def scope(self) -> dict[str, TensorSpec]:
        """The tensors that a module of this program may take, by name."""
        return {spec.name: spec for spec in _scope_specs(self)}

    @property
    def modules(self) -> Iterator[tuple[str, nn.Module, tuple[TensorSpec, ...]]]:
        """Role, module and returned tensors of each of init, step and readout that exists."""
        if self.init is not None:
            yield "init", self.init, self.state
        if self.step is not None:
            yield "step", self.step, self.state
        yield "readout", self.readout, self.outputs


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's `forward` arguments, which bind them.

    Raises:
        ProgramError: If `forward` takes *args, **kwargs or keyword-only arguments.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    if any(parameter.kind is not parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
        raise ProgramError(
            f"{type(module).__name__}.forward{inspect.signature(module.forward)}: expected named positional "
            "arguments only, because arguments are bound by name; remove *args, **kwargs and keyword-only "
            "arguments"
        )
    return tuple(parameter.name for parameter in parameters)


def _scope_specs(program: Program) -> list[TensorSpec]:
    return [
        *program.state,
        *(entry.tensor for entry in program.inputs),
        *(parameter.spec for parameter in program.parameters),
        *(noise.spec for noise in program.noise),
        *STEP_COUNTERS,
    ]


def _find_problems(program: Program) -> Iterator[str]:
    yield from _check_operation(program)
    yield from _check_names(program)
    yield from _check_bindings(program)
    yield from _check_noise(program)
    yield from _check_steps(program)
    yield from _check_score(program)


def _check_operation(program: Program) -> Iterator[str]:
    if program.operation not in OPERATIONS:
        yield f"unknown operation {program.operation!r}; expected one of: {', '.join(OPERATIONS)}"
    if program.variant and not _VARIANT.fullmatch(program.variant):
        yield (
            "variant: expected a lower-case letter followed by lower-case letters, digits or underscores, "
            f"got {program.variant!r}"
        )
    if not program.outputs:
        yield "outputs: expected at least one output, got none"


def _check_names(program: Program) -> Iterator[str]:
    names = [spec.name for spec in _scope_specs(program)]
    outputs = [spec.name for spec in program.outputs]
    for name in _duplicates(names) + _duplicates(outputs):
        yield f"the name {name!r} is used twice; give every tensor and parameter of a program a unique name"
    for stream in _duplicates([noise.stream for noise in program.noise]):
        yield f"two noise tensors share stream {stream} and would be equal; give each its own stream"


def _duplicates(items: Sequence[Hashable]) -> list[Hashable]:
    return [item for item, count in Counter(items).items() if count > 1]


def _check_bindings(program: Program) -> Iterator[str]:
    for role, module, _ in program.modules:
        for name in argument_names(module):
            if name not in program.scope:
                yield (
                    f"unknown argument {name!r} of {role} {type(module).__name__}; "
                    f"expected one of: {', '.join(program.scope)}"
                )


def _check_noise(program: Program) -> Iterator[str]:
    readers = Counter(name for _, module, _ in program.modules for name in argument_names(module))
    for noise in program.noise:
        if readers[noise.name] > 1:
            yield (
                f"noise {noise.name!r} is read by {readers[noise.name]} modules, so init and the first step "
                "would draw the same numbers; declare one noise tensor for each module"
            )


def _check_steps(program: Program) -> Iterator[str]:
    steps = program.steps
    if (program.step is None) != (steps is None):
        given = "step only" if steps is None else "steps only"
        yield f"expected both step and steps, or neither; got {given}"
    if (program.step is not None or program.init is not None) and not program.state:
        yield "state: expected at least one tensor, because init and step return the state; got none"
    if steps is None:
        return
    if (steps.fixed is None) == (steps.parameter is None) or steps.units_per_step < 1:
        yield (
            "steps: expected either fixed or a parameter, and units_per_step of at least 1, "
            f"got fixed={steps.fixed}, parameter={steps.parameter!r}, units_per_step={steps.units_per_step}"
        )
    integers = {parameter.name for parameter in program.parameters if parameter.type == "integer"}
    if steps.parameter is not None and steps.parameter not in integers:
        yield (
            f"steps.parameter: expected an integer parameter, got {steps.parameter!r}; "
            f"the integer parameters are: {', '.join(sorted(integers)) or 'none'}"
        )
    flags = {spec.name for spec in program.state if (spec.dtype, spec.shape) == ("bool", ())}
    if steps.done_flag is not None and steps.done_flag not in flags:
        yield f"steps.done_flag: expected a boolean scalar of the state, got {steps.done_flag!r}"


def _check_score(program: Program) -> Iterator[str]:
    score = program.score
    if (program.operation in ("score", "energy")) != (score is not None):
        yield (
            "score: expected a Score for the operations score and energy and None for all others, "
            f"got {'None' if score is None else 'a Score'} for {program.operation}"
        )
    if score is None:
        return
    outputs = [spec.name for spec in program.outputs]
    for name in filter(None, (score.nats_output, score.standard_error_output, score.row_dimensions_output)):
        if name not in outputs:
            yield f"score: unknown output {name!r}; expected one of: {', '.join(outputs)}"
    parameters = [parameter.name for parameter in program.parameters]
    if score.draws_parameter is not None and score.draws_parameter not in parameters:
        yield (
            f"score.draws_parameter: unknown parameter {score.draws_parameter!r}; "
            f"expected one of: {', '.join(parameters) or 'none'}"
        )
