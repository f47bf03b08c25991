"""Messages to work and results to messages.

Reads a request against the program that it is for and collects every violation,
with what was expected and what was given, before anything is computed.
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import duration_pb2
from numpy.typing import NDArray

from samovar import tensors
from samovar.noise import MAX_ROW_INDEX
from samovar.v1 import inference_pb2 as pb
from server.core.errors import InvalidRequest, Violation
from server.core.request import Preview, RowInputs, Rows, Timings
from server.core.spec import ParameterSpec, ProgramSpec, TensorSpec
from server.models.default_inputs import default_inputs
from server.models.registry import LoadedProgram, Model

Array = NDArray[Any]
Arrays = Mapping[str, Array]

_PRIORITIES = frozenset(pb.Priority.values())
# Seeded by the operating system. A seed need not be secret, and asking the system costs a call.
_SEEDS = random.Random()

# Above it the digits before the point are more than a float knows.
_WHOLE = 2.0**53

_GIVEN = {"float_value": "a float", "integer_value": "an integer", "boolean_value": "a boolean"}
_ACCEPTED = {
    "float": ("float_value", "integer_value"),
    "integer": ("integer_value",),
    "boolean": ("boolean_value",),
    "choice": ("choice_value",),
}


@dataclass(frozen=True)
class Job:
    """What a request asks for, once it has been found sound."""

    rows: int
    first_row: int
    seed: int
    steps: int
    work: RowInputs
    priority: pb.Priority.ValueType = pb.PRIORITY_UNSPECIFIED

    @property
    def indices(self) -> range:
        """The index of every row."""
        return range(self.first_row, self.first_row + self.rows)

    def is_batch(self, capacity: int) -> bool:
        """Whether interactive requests go first; unless it says so, when it exceeds one batch."""
        if self.priority == pb.PRIORITY_UNSPECIFIED:
            return self.rows > capacity
        return self.priority == pb.PRIORITY_BATCH


@dataclass
class Violations:
    """Everything that is wrong with a request so far."""

    found: list[Violation] = field(default_factory=list)

    def add(self, where: str, description: str) -> None:
        self.found.append(Violation(where, description))

    def check(self) -> None:
        """InvalidRequest when there is any."""
        if self.found:
            raise InvalidRequest(self.found)


def sample_job(message: pb.SampleRequest, program: ProgramSpec, max_rows: int) -> Job:
    """The job of a sampling request; InvalidRequest lists all violations."""
    violations = Violations()
    if not 1 <= message.rows <= max_rows:
        violations.add("rows", f"expected 1 to {max_rows}, got {message.rows}")
    if message.preview_every and not program.previewable:
        violations.add("preview_every", "expected 0: this program has no previews")
    inputs = _inputs(message.inputs, program, message.rows, violations)
    return _job(message, program, message.rows, inputs, violations)


def transform_job(message: pb.TransformRequest, program: ProgramSpec, max_rows: int) -> Job:
    """The job of a request that sends rows through a model; InvalidRequest lists all violations."""
    violations = Violations()
    rows = max((tensor.shape[0] for tensor in message.inputs.values() if tensor.shape), default=1)
    inputs = _inputs(message.inputs, program, rows, violations)
    if not violations.found and rows > max_rows:
        violations.add("inputs", f"expected 1 to {max_rows} rows, got {rows}")
    return _job(message, program, rows, inputs, violations)


def _job(
    message: pb.SampleRequest | pb.TransformRequest,
    program: ProgramSpec,
    rows: int,
    inputs: Arrays,
    violations: Violations,
) -> Job:
    parameters = _parameters(message.parameters, program, violations)
    if message.priority not in _PRIORITIES:
        violations.add("priority", f"expected one of {_listed(pb.Priority.keys())}, got {message.priority}")
    if not violations.found and message.first_row + rows > MAX_ROW_INDEX + 1:
        violations.add("first_row", f"expected row indices below 2^32, got {message.first_row} + {rows} rows")
    violations.check()
    seed = message.seed if message.HasField("seed") else _SEEDS.getrandbits(63)
    steps = program.steps.of(parameters)
    return Job(rows, message.first_row, seed, steps, RowInputs(parameters, inputs), message.priority)


def _parameters(
    given: Mapping[str, pb.ParameterValue], program: ProgramSpec, violations: Violations
) -> dict[str, float]:
    values = program.defaults()
    if not given:
        return values
    known = {spec.name: spec for spec in program.parameters}
    for name, message in sorted(given.items()):
        where = f"parameters[{name}]"
        if name not in known:
            violations.add(where, f"there is no such parameter; there are: {_listed(known)}")
            continue
        problem, value = _parameter(message, known[name])
        if problem:
            violations.add(where, problem)
        else:
            values[name] = value
    return values


def _parameter(message: pb.ParameterValue, spec: ParameterSpec) -> tuple[str, float]:
    """What is wrong with a value, and the number that graphs see."""
    kind = message.WhichOneof("value")
    if kind not in _ACCEPTED[spec.kind]:
        given = "nothing" if kind is None else _GIVEN.get(kind, f"the choice {message.choice_value!r}")
        return f"expected {_expected(spec)}, got {given}", 0.0
    if spec.kind == "choice":
        if message.choice_value not in spec.choices:
            return f"expected {_expected(spec)}, got {message.choice_value!r}", 0.0
        return "", float(spec.choices.index(message.choice_value))
    given = getattr(message, kind)
    value = float(given)
    if not spec.minimum <= value <= spec.maximum:
        return f"expected {_expected(spec)}, got {_number(given)}", 0.0
    return "", value


def _expected(spec: ParameterSpec) -> str:
    if spec.kind == "choice":
        return f"one of {_listed(spec.choices)}"
    if spec.kind == "boolean":
        return "a boolean"
    article = "an integer" if spec.kind == "integer" else "a float"
    return f"{article} from {_number(spec.minimum)} to {_number(spec.maximum)}"


def _number(value: float | np.number[Any]) -> str:
    """To the last digit, as short as its type allows."""
    number = float(value)
    return str(int(value)) if number.is_integer() and abs(number) < _WHOLE else str(value)


def _inputs(
    given: Mapping[str, pb.Tensor], program: ProgramSpec, rows: int, violations: Violations
) -> dict[str, Array]:
    specs = {item.tensor.name: item.tensor for item in program.inputs}
    arrays = default_inputs(program)
    for name in sorted(name for name in specs if name not in arrays and name not in given):
        violations.add(f"inputs[{name}]", f"expected {_described(specs[name])}, got nothing")
    for name, message in sorted(given.items()):
        where = f"inputs[{name}]"
        if name not in specs:
            violations.add(where, f"there is no such input; there are: {_listed(specs)}")
            continue
        problem, array = _input(message, specs[name], rows)
        if problem:
            violations.add(where, problem)
        else:
            arrays[name] = array
    return arrays


def _input(message: pb.Tensor, spec: TensorSpec, rows: int) -> tuple[str, Array]:
    """What is wrong with a tensor, and its array."""
    try:
        array = tensors.unpack(message)
    except tensors.MalformedTensor as error:
        return str(error), np.empty(0)
    return _array_problem(array, spec, rows), array


def _array_problem(array: Array, spec: TensorSpec, rows: int) -> str:
    if array.dtype != np.dtype(spec.dtype) or array.shape[1:] != spec.shape or array.ndim == 0:
        return f"expected {_described(spec)}, got {array.dtype.name}{list(array.shape)}"
    if not len(array):
        return "expected at least 1 row, got 0"
    if len(array) not in (1, rows):
        return f"expected 1 or {rows} rows, got {len(array)}"
    low, high = array.min(), array.max()
    # NaN passes through both.
    if not (math.isfinite(low) and math.isfinite(high)):
        return "expected finite numbers, got NaN or infinity"
    if (spec.minimum is not None and low < spec.minimum) or (
        spec.maximum is not None and high > spec.maximum
    ):
        return f"expected elements{_range(spec)}, got {_number(low)} to {_number(high)}"
    return ""


def _described(spec: TensorSpec) -> str:
    shape = ", ".join(("rows", *map(str, spec.shape)))
    return f"{spec.dtype}[{shape}]{_range(spec)}"


def _range(spec: TensorSpec) -> str:
    low = "" if spec.minimum is None else f" from {_number(spec.minimum)}"
    high = "" if spec.maximum is None else f" to {_number(spec.maximum)}"
    return low + high


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def run(job: Job, model: Model, loaded: LoadedProgram) -> pb.RunInfo:
    """What computes an answer."""
    bitwise, seeded = pb.RunInfo.DETERMINISM_BITWISE, pb.RunInfo.DETERMINISM_SEEDED
    return pb.RunInfo(
        artifact_sha256=model.spec.digest,
        version=model.spec.version,
        format=loaded.key.format,
        seed=job.seed,
        steps=job.steps,
        determinism=bitwise if loaded.is_bitwise else seeded,
    )


def packed(outputs: Arrays) -> dict[str, pb.Tensor]:
    """Arrays as messages, by name."""
    return {name: tensors.pack(array) for name, array in outputs.items()}


def rows(event: Rows) -> pb.Rows:
    """Finished rows as a message."""
    return pb.Rows(indices=event.indices, outputs=packed(event.outputs))


def preview(event: Preview) -> pb.Preview:
    """Rows on the way as a message."""
    return pb.Preview(rows=rows(event.rows), steps_done=event.steps_done)


def timings(event: Timings) -> pb.Timings:
    """Seconds as durations."""
    return pb.Timings(
        queue=_duration(event.queue), run=_duration(event.run), compute=_duration(event.compute)
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


def score(outputs: Arrays, program: ProgramSpec, job: Job) -> pb.ScoreResponse:
    """Scores in nats, and in bits per dimension where that means something; the caller adds kind and run."""
    assert program.score is not None, "a score program without a score passed the audit. This is a bug."
    spec = program.score
    nats = outputs[spec.nats_output]
    response = pb.ScoreResponse(
        nats=tensors.pack(nats),
        draws=int(job.work.parameters[spec.draws_parameter]) if spec.draws_parameter else 0,
        outputs=packed(
            {
                n: array
                for n, array in outputs.items()
                if n not in (spec.nats_output, spec.standard_error_output)
            }
        ),
    )
    if spec.is_normalized:
        dimensions = (
            outputs[spec.row_dimensions_output] if spec.row_dimensions_output else np.array(spec.dimensions)
        )
        bits = -nats / (dimensions.clip(min=1) * math.log(2))
        response.bits_per_dimension.CopyFrom(tensors.pack(bits.astype(nats.dtype)))
    if spec.standard_error_output:
        response.standard_error.CopyFrom(tensors.pack(outputs[spec.standard_error_output]))
    return response
