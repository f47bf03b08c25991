"""Encoding of requests and decoding of responses; pure functions that both clients share."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from samovar import result
from samovar._channel import MAX_MESSAGE_BYTES
from samovar._inputs import Inputs, named_arrays, num_rows, slice_rows
from samovar._manifest import read_score_meaning
from samovar.errors import ServerError, invalid_request
from samovar.model import Model, Operation, Scalar
from samovar.tensors import Array, MalformedTensor, pack, unpack
from samovar.v1 import inference_pb2

# An upper bound for the bytes of a message without its tensors.
_ENVELOPE_BYTES = 64 * 1024
# nats, bits per dimension and standard error of one row, as float64.
_SCORE_ROW_BYTES = 3 * 8

Priority = Literal["interactive", "batch"]


class CallOptions(TypedDict, total=False):
    """Options of a call; each is optional.

    Attributes:
        version: A version of the model. Default: the newest.
        format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
        seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
            result's `run` reports.
        first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0. Rows 64..127 of a job are
            first_row=64, rows=64.
        parameters: Parameters that differ from their defaults, by name.
        variant: Variant of the operation, such as "inpaint". Default: the default variant.
        priority: "interactive", or "batch" to yield to other requests. Default: by the number of rows.
        timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.
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
    """Name, version and format of a model; the server chooses for empty fields."""

    name: str
    version: str = ""
    format: str = ""

    def to_proto(self) -> inference_pb2.ModelSelector:
        return inference_pb2.ModelSelector(name=self.name, version=self.version, format=self.format)


@dataclass(frozen=True)
class Call:
    """Validated options of a call. The seed is fixed, so that a retry returns the same bytes."""

    selector: Selector
    seed: int
    first_row: int = 0
    parameters: Mapping[str, Scalar] = field(default_factory=dict)
    variant: str = ""
    priority: inference_pb2.Priority.ValueType = inference_pb2.PRIORITY_UNSPECIFIED


def build_call(model: str, options: CallOptions) -> Call:
    """Return the call that the options describe.

    Raises:
        TypeError: If an option is unknown.
        InvalidRequest: If a number is out of range, or the priority is unknown.
    """
    unknown = sorted(set(options) - set(CallOptions.__annotations__))
    if unknown:
        known = ", ".join(CallOptions.__annotations__)
        raise TypeError(f"unknown option {unknown[0]!r}; expected one of: {known}")
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
        raise invalid_request("priority", f"expected one of: {', '.join(_PRIORITIES)}; got {priority!r}")
    return _PRIORITIES[priority] if priority else inference_pb2.PRIORITY_UNSPECIFIED


_PRIORITIES: Mapping[str, inference_pb2.Priority.ValueType] = {
    "interactive": inference_pb2.PRIORITY_INTERACTIVE,
    "batch": inference_pb2.PRIORITY_BATCH,
}


def draw_seed() -> int:
    """Return a seed from the operating system's entropy, below 2**63 so that any language can hold it."""
    return secrets.randbits(63)


def sample_request(
    call: Call, rows: int, inputs: Mapping[str, ArrayLike], preview_every: int, operation: Operation
) -> inference_pb2.SampleRequest:
    """Encode a request for samples."""
    arrays = named_arrays(inputs, operation)
    return inference_pb2.SampleRequest(
        model=call.selector.to_proto(),
        rows=_bounded("rows", rows, 2**32),
        seed=call.seed,
        first_row=call.first_row,
        parameters=_parameters(call.parameters),
        inputs=_pack_all(arrays),
        preview_every=_bounded("preview_every", preview_every, 2**32),
        variant=call.variant,
        priority=call.priority,
    )


def transform_requests(
    call: Call, inputs: Inputs, operation: Operation, model: Model, limits: result.ServerInfo
) -> Iterator[inference_pb2.TransformRequest]:
    """Encode a transform as the smallest number of requests that the limits allow.

    Rows keep their indices, so that the split does not change the results.
    """
    arrays = named_arrays(inputs, operation)
    rows = num_rows(arrays)
    size = _rows_per_request(arrays, rows, operation, limits)
    # All parts must use one version, even if a newer one is loaded between them.
    selector = Selector(model.name, model.version, call.selector.format) if size < rows else call.selector
    for start in range(0, max(rows, 1), size):
        yield inference_pb2.TransformRequest(
            model=selector.to_proto(),
            inputs=_pack_all(slice_rows(arrays, start, size)),
            seed=call.seed,
            first_row=_bounded("first_row", call.first_row + start, 2**32),
            parameters=_parameters(call.parameters),
            variant=call.variant,
            priority=call.priority,
        )


class StreamReader:
    """Decoder of the responses of one stream.

    Args:
        reorder: A buffer that puts finished rows in the order of their indices; None to keep the order of
            arrival.
    """

    def __init__(self, reorder: result.ReorderBuffer | None = None) -> None:
        self._reorder = reorder
        self._run: result.RunInfo | None = None
        self.timings = result.Timings()

    @property
    def run(self) -> result.RunInfo:
        """What computes the rows.

        Raises:
            ServerError: If no response has arrived yet.
        """
        if self._run is None:
            raise ServerError("run is unknown before the first event; read an event first")
        return self._run

    def events(self, response: inference_pb2.SampleResponse, operation: Operation) -> Iterator[result.Event]:
        """Yield the rows and previews of one response."""
        if response.HasField("run"):
            self._run = _run(response.run)
        if response.HasField("timings"):
            self.timings = _timings(response.timings)
        if response.rows.indices:
            rows = result.Rows(_indices(response.rows.indices), _outputs(response.rows.outputs, operation))
            ready = self._reorder.push(rows) if self._reorder else rows
            if ready:
                yield ready
        for preview in response.previews:
            yield result.Preview(
                indices=_indices(preview.rows.indices),
                steps_done=_indices(preview.steps_done),
                outputs=_outputs(preview.rows.outputs, operation),
            )


def read_transform(response: inference_pb2.TransformResponse, operation: Operation) -> result.Result:
    """Decode the response to a transform, or to one part of it."""
    return result.Result(
        outputs=_outputs(response.outputs, operation),
        run=_run(response.run),
        timings=_timings(response.timings),
    )


def read_scores(response: inference_pb2.ScoreResponse, operation: Operation) -> result.Scores:
    """Decode the response to a score request, or to one part of it."""
    meaning = read_score_meaning(response.score)
    return result.Scores(
        outputs=_outputs(response.outputs, operation),
        run=_run(response.run),
        timings=_timings(response.timings),
        nats=_array("nats", response.nats),
        bits_per_dimension=_optional(response, "bits_per_dimension"),
        standard_error=_optional(response, "standard_error"),
        kind=meaning.kind,
        dimensions=meaning.dimensions,
        coordinate_space=meaning.coordinate_space,
        draws=response.draws,
    )


def read_server_info(info: inference_pb2.ServerInfo) -> result.ServerInfo:
    """Decode the description of a server."""
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
        raise invalid_request(name, f"expected an integer from 0 to {end - 1}, got {value!r}")
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


def _rows_per_request(
    arrays: Mapping[str, Array], rows: int, operation: Operation, limits: result.ServerInfo
) -> int:
    """Return the number of rows that fit into one request and its response, at least 1."""
    budget = min(limits.max_message_bytes or MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES) - _ENVELOPE_BYTES
    per_row = [array for array in arrays.values() if len(array) == rows]
    fixed = sum(array.nbytes for array in arrays.values()) - sum(array.nbytes for array in per_row)
    request_row_bytes = sum(array.nbytes for array in per_row) // max(rows, 1)
    response_row_bytes = sum(output.row_bytes for output in operation.outputs) + _SCORE_ROW_BYTES
    fitting = min((budget - fixed) // max(request_row_bytes, 1), budget // response_row_bytes)
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
    durations = (timings.queue, timings.run, timings.compute)
    return result.Timings(*(duration.ToTimedelta().total_seconds() for duration in durations))


def _pack_all(arrays: Mapping[str, Array]) -> dict[str, inference_pb2.Tensor]:
    return {name: pack(array) for name, array in arrays.items()}


def _indices(values: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(values, np.int64)


def _outputs(tensors: Mapping[str, inference_pb2.Tensor], operation: Operation) -> dict[str, Array]:
    """Return arrays by name: declared outputs in their order, then the others."""
    declared = [output.name for output in operation.outputs if output.name in tensors]
    others = sorted(set(tensors) - set(declared))
    return {name: _array(name, tensors[name]) for name in (*declared, *others)}


def _optional(response: inference_pb2.ScoreResponse, name: str) -> Array | None:
    return _array(name, getattr(response, name)) if response.HasField(name) else None  # type: ignore[arg-type]


def _array(name: str, tensor: inference_pb2.Tensor) -> Array:
    try:
        return unpack(tensor)
    except MalformedTensor as error:
        raise ServerError(f"cannot decode {name} of the response: {error}") from error
