"""Conversion between protobuf messages and the engine's requests and events.

A request is read against the program that it is for. Every violation is collected, with what was expected
and given, before anything is computed.
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
from server.core.request import UNBOUNDED, Preview, Request, Rows, Timings
from server.core.spec import ParameterSpec, ProgramSpec, TensorSpec
from server.models.registry import LoadedProgram, Model
from server.rpc.response_stream import MAX_PREVIEWS

Array = NDArray[Any]
Arrays = Mapping[str, Array]

# Bytes of a message besides its tensors, at most.
MESSAGE_OVERHEAD_BYTES = 4096

_PRIORITIES = frozenset(pb.Priority.values())
# A seed need not be secret: a generator that the system seeds once saves a system call for each request.
_seed_rng = random.Random()

# Largest float below which every integer is exact.
_MAX_EXACT_INT = 2.0**53

_KIND_NAMES = {"float_value": "a float", "integer_value": "an integer", "boolean_value": "a boolean"}
_ACCEPTED_KINDS = {
    "float": ("float_value", "integer_value"),
    "integer": ("integer_value",),
    "boolean": ("boolean_value",),
    "choice": ("choice_value",),
}


@dataclass(frozen=True)
class RequestLimits:
    """Limits of one call.

    Attributes:
        max_message_bytes: size of a message, in either direction.
        max_rows: rows of a request.
        chunk_bytes: size of the messages of a stream.
        window_bytes: rows of a stream that are computed ahead of its reader, in bytes.
    """

    max_message_bytes: int = 64 << 20
    max_rows: int = 100_000
    chunk_bytes: int = 1 << 20
    window_bytes: int = 2 << 20


@dataclass
class Violations:
    """Violations of a request found so far."""

    found: list[Violation] = field(default_factory=list)

    def add(self, field_name: str, description: str) -> None:
        self.found.append(Violation(field_name, description))

    def check(self) -> None:
        """Raise InvalidRequest if there is any violation."""
        if self.found:
            raise InvalidRequest(self.found)


def sample_request(
    message: pb.SampleRequest, program: LoadedProgram, limits: RequestLimits, deadline: float | None
) -> Request:
    """Return the request of a sampling message; InvalidRequest lists all violations."""
    violations, spec = Violations(), program.spec
    if not 1 <= message.rows <= limits.max_rows:
        violations.add("rows", f"expected 1 to {limits.max_rows}, got {message.rows}")
    if message.preview_every and not spec.previewable:
        violations.add("preview_every", "expected 0: this program has no previews")
    inputs = _read_inputs(message.inputs, program, message.rows, violations)
    parameters = _read_common(message, spec, message.rows, violations)
    row_bytes = spec.output_row_bytes
    window = max(2 * program.capacity, limits.window_bytes // max(1, row_bytes))
    num_previews = MAX_PREVIEWS * min(program.capacity, message.rows) if message.preview_every else 0
    unread_rows = min(window, message.rows) + num_previews
    return Request(
        program=program.key,
        rows=message.rows,
        steps=spec.steps.of(parameters),
        seed=_seed(message),
        first_row=message.first_row,
        parameters=parameters,
        inputs=inputs,
        deadline=deadline,
        preview_every=message.preview_every,
        max_unread_rows=window,
        is_batch=_is_batch(message, message.rows, program.capacity),
        has_early_exit=bool(spec.steps.done_flag),
        buffered_bytes=_num_bytes(inputs) + unread_rows * row_bytes,
    )


def transform_request(
    message: pb.TransformRequest, program: LoadedProgram, limits: RequestLimits, deadline: float | None
) -> Request:
    """Return the request of a message that maps rows to rows; InvalidRequest lists all violations."""
    violations, spec = Violations(), program.spec
    rows = max((tensor.shape[0] for tensor in message.inputs.values() if tensor.shape), default=1)
    inputs = _read_inputs(message.inputs, program, rows, violations)
    if not violations.found and rows > limits.max_rows:
        violations.add("inputs", f"expected 1 to {limits.max_rows} rows, got {rows}")
    parameters = _read_common(message, spec, rows, violations)
    _check_response_size(message, rows, spec, limits)
    return Request(
        program=program.key,
        rows=rows,
        steps=spec.steps.of(parameters),
        seed=_seed(message),
        first_row=message.first_row,
        parameters=parameters,
        inputs=inputs,
        deadline=deadline,
        max_unread_rows=UNBOUNDED,
        is_batch=_is_batch(message, rows, program.capacity),
        has_early_exit=bool(spec.steps.done_flag),
        buffered_bytes=_num_bytes(inputs) + rows * spec.output_row_bytes,
    )


def _read_common(
    message: pb.SampleRequest | pb.TransformRequest, spec: ProgramSpec, rows: int, violations: Violations
) -> dict[str, float]:
    """Return the parameters of a message, after the last check for violations."""
    parameters = _read_parameters(message.parameters, spec, violations)
    if message.priority not in _PRIORITIES:
        violations.add("priority", f"expected one of: {_listed(pb.Priority.keys())}; got {message.priority}")
    if not violations.found and message.first_row + rows > MAX_ROW_INDEX + 1:
        violations.add("first_row", f"expected row indices below 2^32, got {message.first_row} + {rows} rows")
    violations.check()
    return parameters


def _seed(message: pb.SampleRequest | pb.TransformRequest) -> int:
    return message.seed if message.HasField("seed") else _seed_rng.getrandbits(63)


def _is_batch(message: pb.SampleRequest | pb.TransformRequest, rows: int, capacity: int) -> bool:
    """Return whether interactive requests go first; by default, when the request exceeds one batch."""
    if message.priority == pb.PRIORITY_UNSPECIFIED:
        return rows > capacity
    return message.priority == pb.PRIORITY_BATCH


def _num_bytes(inputs: Arrays) -> int:
    return sum(array.nbytes for array in inputs.values())


def _check_response_size(
    message: pb.TransformRequest, rows: int, spec: ProgramSpec, limits: RequestLimits
) -> None:
    # A score is returned twice: in nats and in bits per dimension.
    row_bytes = spec.output_row_bytes + (8 if spec.score else 0)
    limit = limits.max_message_bytes - MESSAGE_OVERHEAD_BYTES
    if rows * row_bytes > limit:
        max_rows = limit // row_bytes
        expected = (
            f"expected at most {max_rows} rows, whose response fits into one message, got {rows}; send "
            f"the rest with first_row {message.first_row + max_rows}"
        )
        raise InvalidRequest([Violation("inputs", expected)])


def _read_parameters(
    values: Mapping[str, pb.ParameterValue], spec: ProgramSpec, violations: Violations
) -> dict[str, float]:
    parameters = spec.defaults()
    if not values:
        return parameters
    specs = {parameter.name: parameter for parameter in spec.parameters}
    for name, value in sorted(values.items()):
        field_name = f"parameters[{name}]"
        if name not in specs:
            violations.add(field_name, f"unknown parameter; expected one of: {_listed(specs)}")
            continue
        problem, number = _read_parameter(value, specs[name])
        if problem:
            violations.add(field_name, problem)
        else:
            parameters[name] = number
    return parameters


def _read_parameter(value: pb.ParameterValue, spec: ParameterSpec) -> tuple[str, float]:
    """Return a description of the violation, or empty, and the number that graphs read."""
    kind = value.WhichOneof("value")
    if kind not in _ACCEPTED_KINDS[spec.kind]:
        got = "nothing" if kind is None else _KIND_NAMES.get(kind, f"the choice {value.choice_value!r}")
        return f"expected {_expected(spec)}, got {got}", 0.0
    if spec.kind == "choice":
        if value.choice_value not in spec.choices:
            return f"expected {_expected(spec)}, got {value.choice_value!r}", 0.0
        return "", float(spec.choices.index(value.choice_value))
    number = getattr(value, kind)
    if not spec.minimum <= float(number) <= spec.maximum:
        return f"expected {_expected(spec)}, got {_number(number)}", 0.0
    return "", float(number)


def _expected(spec: ParameterSpec) -> str:
    if spec.kind == "choice":
        return f"one of {_listed(spec.choices)}"
    if spec.kind == "boolean":
        return "a boolean"
    article = "an integer" if spec.kind == "integer" else "a float"
    return f"{article} from {_number(spec.minimum)} to {_number(spec.maximum)}"


def _number(value: float | np.number[Any]) -> str:
    """Return a number exactly, in as few digits as its type allows."""
    number = float(value)
    return str(int(value)) if number.is_integer() and abs(number) < _MAX_EXACT_INT else str(value)


def _read_inputs(
    messages: Mapping[str, pb.Tensor], program: LoadedProgram, rows: int, violations: Violations
) -> dict[str, Array]:
    specs = {item.tensor.name: item.tensor for item in program.spec.inputs}
    arrays = dict(program.default_inputs)
    for name in sorted(name for name in specs if name not in arrays and name not in messages):
        violations.add(f"inputs[{name}]", f"expected {_described(specs[name])}, got nothing")
    for name, message in sorted(messages.items()):
        field_name = f"inputs[{name}]"
        if name not in specs:
            violations.add(field_name, f"unknown input; expected one of: {_listed(specs)}")
            continue
        problem, array = _read_input(message, specs[name], rows)
        if problem:
            violations.add(field_name, problem)
        else:
            arrays[name] = array
    return arrays


def _read_input(message: pb.Tensor, spec: TensorSpec, rows: int) -> tuple[str, Array]:
    """Return a description of the violation, or empty, and the array."""
    try:
        array = tensors.unpack(message)
    except tensors.MalformedTensor as error:
        return str(error), np.empty(0)
    return _array_violation(array, spec, rows), array


def _array_violation(array: Array, spec: TensorSpec, rows: int) -> str:
    if array.dtype != np.dtype(spec.dtype) or array.shape[1:] != spec.shape or array.ndim == 0:
        return f"expected {_described(spec)}, got {array.dtype.name}{list(array.shape)}"
    if not len(array):
        return "expected at least 1 row, got 0"
    if len(array) not in (1, rows):
        return f"expected 1 or {rows} rows, got {len(array)}"
    low, high = array.min(), array.max()
    # Both are NaN if any element is.
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


def run_info_to_proto(request: Request, model: Model, program: LoadedProgram) -> pb.RunInfo:
    bitwise, seeded = pb.RunInfo.DETERMINISM_BITWISE, pb.RunInfo.DETERMINISM_SEEDED
    return pb.RunInfo(
        artifact_sha256=model.spec.digest,
        version=model.spec.version,
        format=program.key.format,
        seed=request.seed,
        steps=request.steps,
        determinism=bitwise if program.is_bitwise else seeded,
    )


def tensors_to_proto(outputs: Arrays) -> dict[str, pb.Tensor]:
    return {name: tensors.pack(array) for name, array in outputs.items()}


def rows_to_proto(rows: Rows) -> pb.Rows:
    return pb.Rows(indices=rows.indices, outputs=tensors_to_proto(rows.outputs))


def preview_to_proto(preview: Preview) -> pb.Preview:
    return pb.Preview(rows=rows_to_proto(preview.rows), steps_done=preview.steps_done)


def timings_to_proto(timings: Timings) -> pb.Timings:
    return pb.Timings(
        queue=_duration(timings.queue), run=_duration(timings.run), compute=_duration(timings.compute)
    )


def _duration(seconds: float) -> duration_pb2.Duration:
    whole, nanos = divmod(round(seconds * 1e9), 1_000_000_000)
    return duration_pb2.Duration(seconds=whole, nanos=nanos)


def score_to_proto(outputs: Arrays, spec: ProgramSpec, request: Request) -> pb.ScoreResponse:
    """Return scores in nats and, if the score is normalized, in bits per dimension; without run and kind."""
    score = spec.score
    assert score is not None, "a score program without a score passed validation. This is a bug."
    nats = outputs[score.nats_output]
    named = (score.nats_output, score.standard_error_output)
    response = pb.ScoreResponse(
        nats=tensors.pack(nats),
        draws=int(request.parameters[score.draws_parameter]) if score.draws_parameter else 0,
        outputs=tensors_to_proto({name: array for name, array in outputs.items() if name not in named}),
    )
    if score.is_normalized:
        row_dimensions = score.row_dimensions_output
        dimensions = outputs[row_dimensions] if row_dimensions else np.array(score.dimensions)
        bits = -nats / (dimensions.clip(min=1) * math.log(2))
        response.bits_per_dimension.CopyFrom(tensors.pack(bits.astype(nats.dtype)))
    if score.standard_error_output:
        response.standard_error.CopyFrom(tensors.pack(outputs[score.standard_error_output]))
    return response
