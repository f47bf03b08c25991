"""Requests from what a user says, results from what a server answers: pure functions.

Both clients share them. Knows the messages, and neither channels nor time.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from samovar import result
from samovar._channel import MAX_MESSAGE_BYTES
from samovar._inputs import Inputs, named_arrays, num_rows, part_of
from samovar._manifest import score_meaning
from samovar.errors import ServerError, invalid_request
from samovar.model import Model, Operation, Scalar
from samovar.tensors import Array, MalformedTensor, pack, unpack
from samovar.v1 import inference_pb2

# What a message holds besides its tensors' bytes; generous.
_ENVELOPE_BYTES = 64 * 1024
_SCORE_ROW_BYTES = 3 * 8


Priority = Literal["interactive", "batch"]


class CallOptions(TypedDict, total=False):
    """What any call may say besides its rows.

    version: a version of the model; the newest when left out.
    format: "onnx" or "torchscript"; the server's first choice when left out.
    seed: 0 <= seed < 2**64; drawn anew when left out, and told in the result's run.
    first_row: index of the first row: rows 64..127 of a job are first_row 64, rows 64.
    parameters: those that differ from their defaults, by name.
    method: the way in which to do it, such as "inpaint"; the usual one when left out.
    priority: "interactive", or "batch" to let others go first; left out, it goes by the number of rows.
    timeout: seconds for the whole call; None for no limit; the client's when left out.
    """

    version: str
    format: str
    seed: int | None
    first_row: int
    parameters: Mapping[str, Scalar]
    variant: str
    priority: Priority
    timeout: float | None


@dataclass(frozen=True)
class Selector:
    """Which model is meant; empty fields leave the choice to the server."""

    name: str
    version: str = ""
    format: str = ""

    def message(self) -> inference_pb2.ModelSelector:
        return inference_pb2.ModelSelector(name=self.name, version=self.version, format=self.format)


@dataclass(frozen=True)
class Call:
    """A call whose seed is settled: sent twice, it answers the same."""

    selector: Selector
    seed: int
    first_row: int = 0
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    variant: str = ""
    priority: inference_pb2.Priority.ValueType = inference_pb2.PRIORITY_UNSPECIFIED


def settle(model: str, options: CallOptions) -> Call:
    """The call that the options describe; InvalidRequest for numbers that no message can hold."""
    unknown = sorted(set(options) - set(CallOptions.__annotations__))
    if unknown:
        raise TypeError(f"no option {unknown[0]!r}; there are {', '.join(CallOptions.__annotations__)}")
    seed = options.get("seed")
    return Call(
        selector=Selector(model, options.get("version", ""), options.get("format", "")),
        seed=draw_seed() if seed is None else _bounded("seed", seed, 2**64),
        first_row=_bounded("first_row", options.get("first_row", 0), 2**32),
        parameters=options.get("parameters", {}),
        variant=options.get("variant", ""),
        priority=_priority(options),
    )


def _priority(options: CallOptions) -> inference_pb2.Priority.ValueType:
    priority = options.get("priority")
    if priority is not None and priority not in _PRIORITIES:
        raise invalid_request("priority", f"expected one of {', '.join(_PRIORITIES)}, got {priority!r}")
    return _PRIORITIES[priority] if priority else inference_pb2.PRIORITY_UNSPECIFIED


_PRIORITIES: Mapping[str, inference_pb2.Priority.ValueType] = {
    "interactive": inference_pb2.PRIORITY_INTERACTIVE,
    "batch": inference_pb2.PRIORITY_BATCH,
}


def draw_seed() -> int:
    """A seed from the operating system's entropy, below 2**63 so that any language can hold it."""
    return secrets.randbits(63)


def sample_request(
    call: Call, rows: int, inputs: Mapping[str, ArrayLike], preview_every: int, operation: Operation
) -> inference_pb2.SampleRequest:
    """The message that asks for samples."""
    arrays = named_arrays(inputs, operation)
    return inference_pb2.SampleRequest(
        model=call.selector.message(),
        rows=_bounded("rows", rows, 2**32),
        seed=call.seed,
        first_row=call.first_row,
        parameters=_parameters(call.parameters),
        inputs=_packed(arrays),
        preview_every=_bounded("preview_every", preview_every, 2**32),
        variant=call.variant,
        priority=call.priority,
    )


def transform_requests(
    call: Call, inputs: Inputs, operation: Operation, model: Model, limits: result.ServerInfo
) -> Iterator[inference_pb2.TransformRequest]:
    """The messages that ask for a transform, as few as the limits allow.

    Rows keep their indices, so that the parts answer what the whole would have.
    """
    arrays = named_arrays(inputs, operation)
    rows = num_rows(arrays)
    size = _rows_per_part(arrays, rows, operation, limits)
    # The parts must not straddle the arrival of a new version.
    pinned = Selector(model.name, model.version, call.selector.format) if size < rows else call.selector
    for start in range(0, max(rows, 1), size):
        yield inference_pb2.TransformRequest(
            model=pinned.message(),
            inputs=_packed(part_of(arrays, start, size)),
            seed=call.seed,
            first_row=_bounded("first_row", call.first_row + start, 2**32),
            parameters=_parameters(call.parameters),
            variant=call.variant,
            priority=call.priority,
        )


class StreamReader:
    """Reads the messages of one stream as they come; finished rows by their indices, when it is told to."""

    def __init__(self, in_order: result.InOrder | None = None) -> None:
        self._in_order = in_order
        self._run: result.RunInfo | None = None
        self.timings = result.Timings()

    @property
    def run(self) -> result.RunInfo:
        """What answers; ServerError before the first message."""
        if self._run is None:
            raise ServerError("the stream has not said what runs: read its first event before")
        return self._run

    def events(self, response: inference_pb2.SampleResponse, operation: Operation) -> Iterator[result.Event]:
        """The rows and previews in one message."""
        if response.HasField("run"):
            self._run = _run(response.run)
        if response.HasField("timings"):
            self.timings = _timings(response.timings)
        if response.rows.indices:
            rows = result.Rows(_indices(response.rows.indices), _outputs(response.rows.outputs, operation))
            following = self._in_order.follow(rows) if self._in_order else rows
            if following:
                yield following
        for preview in response.previews:
            yield result.Preview(
                indices=_indices(preview.rows.indices),
                steps_done=_indices(preview.steps_done),
                outputs=_outputs(preview.rows.outputs, operation),
            )


def read_transform(response: inference_pb2.TransformResponse, operation: Operation) -> result.Result:
    """One answer, or one part of it."""
    return result.Result(
        outputs=_outputs(response.outputs, operation),
        run=_run(response.run),
        timings=_timings(response.timings),
    )


def read_scores(response: inference_pb2.ScoreResponse, operation: Operation) -> result.Scores:
    """One answer, or one part of it, with what its numbers mean."""
    meaning = score_meaning(response.score)
    return result.Scores(
        outputs=_outputs(response.outputs, operation),
        run=_run(response.run),
        timings=_timings(response.timings),
        nats=_array("nats", response.nats),
        bits_per_dimension=_optional(response, "bits_per_dimension"),
        standard_error=_optional(response, "standard_error"),
        kind=meaning.kind,
        dimensions=meaning.dimensions,
        space=meaning.space,
        draws=response.draws,
    )


def read_server_info(info: inference_pb2.ServerInfo) -> result.ServerInfo:
    """What serves, and its limits."""
    return result.ServerInfo(
        version=info.version,
        device=info.device,
        library_versions=dict(info.library_versions),
        max_message_bytes=info.max_message_bytes,
        max_rows_per_request=info.max_rows_per_request,
        max_queued_rows=info.max_queued_rows,
        max_batch_rows=info.max_batch_rows,
        max_buffered_bytes=info.max_buffered_bytes,
        max_concurrent_calls=info.max_concurrent_calls,
        drr_quantum_rows=info.drr_quantum_rows,
        intra_op_threads=info.intra_op_threads,
        formats=tuple(info.formats),
        cuda_graphs=info.cuda_graphs,
        grpc_workers=info.grpc_workers,
        drain_timeout_seconds=info.drain_timeout_seconds,
    )


_DETERMINISM = {
    inference_pb2.RunInfo.DETERMINISM_BITWISE: result.Determinism.BITWISE,
    inference_pb2.RunInfo.DETERMINISM_SEEDED: result.Determinism.SEEDED,
}


def _bounded(name: str, value: int, end: int) -> int:
    if not isinstance(value, Integral) or not 0 <= int(value) < end:
        raise invalid_request(name, f"expected an integer of at least 0 and below {end}, got {value!r}")
    return int(value)


def _parameters(parameters: Mapping[str, Scalar]) -> dict[str, inference_pb2.ParameterValue]:
    return {name: _parameter_value(name, value) for name, value in parameters.items()}


def _parameter_value(name: str, value: object) -> inference_pb2.ParameterValue:
    match value:
        case bool() | np.bool_():
            return inference_pb2.ParameterValue(boolean_value=bool(value))
        case Integral() if -(2**63) <= int(value) < 2**63:
            return inference_pb2.ParameterValue(integer_value=int(value))
        case Real():
            return inference_pb2.ParameterValue(float_value=float(value))
        case str():
            return inference_pb2.ParameterValue(choice_value=value)
        case _:
            raise invalid_request(f"parameters[{name}]", f"expected a bool, int, float or str, got {value!r}")


def _rows_per_part(
    arrays: Mapping[str, Array], rows: int, operation: Operation, limits: result.ServerInfo
) -> int:
    """How many rows fit a message on the way there and on the way back, at least 1."""
    budget = min(limits.max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES) - _ENVELOPE_BYTES
    per_row = [array for array in arrays.values() if len(array) == rows]
    fixed = sum(array.nbytes for array in arrays.values()) - sum(array.nbytes for array in per_row)
    row_bytes_there = sum(array.nbytes for array in per_row) // max(rows, 1)
    row_bytes_back = sum(output.row_bytes for output in operation.outputs) + _SCORE_ROW_BYTES
    fitting = min((budget - fixed) // max(row_bytes_there, 1), budget // row_bytes_back)
    return max(1, min(fitting, limits.max_rows_per_request or rows, rows))


def _run(run: inference_pb2.RunInfo) -> result.RunInfo:
    return result.RunInfo(
        artifact_sha256=run.artifact_sha256,
        version=run.version,
        format=run.format,
        seed=run.seed,
        steps=run.steps,
        determinism=_DETERMINISM.get(run.determinism, result.Determinism.UNSPECIFIED),
    )


def _timings(timings: inference_pb2.Timings) -> result.Timings:
    spans = (timings.queue, timings.run, timings.compute)
    return result.Timings(*(span.ToTimedelta().total_seconds() for span in spans))


def _packed(arrays: Mapping[str, Array]) -> dict[str, inference_pb2.Tensor]:
    return {name: pack(array) for name, array in arrays.items()}


def _indices(values: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def _outputs(tensors: Mapping[str, inference_pb2.Tensor], operation: Operation) -> dict[str, Array]:
    """Arrays by name: first as the program declares them, then whatever else there is."""
    declared = [output.name for output in operation.outputs if output.name in tensors]
    others = sorted(set(tensors) - set(declared))
    return {name: _array(name, tensors[name]) for name in (*declared, *others)}


def _optional(response: inference_pb2.ScoreResponse, name: str) -> Array | None:
    return _array(name, getattr(response, name)) if response.HasField(name) else None  # type: ignore[arg-type]


def _array(name: str, tensor: inference_pb2.Tensor) -> Array:
    try:
        return unpack(tensor)
    except MalformedTensor as error:
        raise ServerError(f"the server's {name} cannot be read: {error}") from error
