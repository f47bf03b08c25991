"""The Inference service: one method per RPC. Decodes, submits, encodes.

Reads each request against the model's own program; branches on no family.
Errors are raised as they are: interceptors.py turns them into codes.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from samovar.v1 import manifest_pb2
from server.core.errors import InvalidRequest, Unavailable, Violation
from server.core.request import UNBOUNDED, Completed, Preview, Request, Rows, Timings
from server.core.spec import ProgramSpec
from server.models.manifest import name_of, public
from server.models.registry import LoadedProgram, Model, ModelRegistry
from server.rpc import codec
from server.rpc.codec import Job
from server.rpc.response_stream import MAX_PREVIEWS, CallObserver, EngineClient, ResponseStream, ThreadBridge

Context = grpc.aio.ServicerContext[Any, Any]
Arrays = dict[str, NDArray[Any]]

PAGE_SIZE = 100
# Headroom for what a message holds besides its tensors.
MESSAGE_OVERHEAD_BYTES = 4096


@dataclass(frozen=True)
class ServiceLimits:
    """What one call may ask for."""

    max_message_bytes: int = 64 << 20
    max_rows: int = 100_000
    chunk_bytes: int = 1 << 20
    window_bytes: int = 2 << 20


@dataclass(frozen=True)
class ResolvedProgram:
    """The program that a request means."""

    model: Model
    loaded: LoadedProgram

    @property
    def score(self) -> manifest_pb2.Score:
        """What the program's number means, as the artifact says it."""
        return next(
            each.score for each in self.model.manifest.programs if name_of(each) == self.loaded.spec.name
        )


class InferenceService(pb_grpc.InferenceServicer):
    """Serves the catalogue's models through the engine, wherever that runs."""

    def __init__(
        self,
        catalogue: ModelRegistry,
        engine: EngineClient,
        observer: CallObserver,
        limits: ServiceLimits,
        info: pb.ServerInfo,
    ) -> None:
        self._catalogue = catalogue
        self._engine = engine
        self._observer = observer
        self._limits = limits
        self._info = info
        self._exchange = ThreadBridge(engine, asyncio.get_running_loop())
        self.is_ready = False

    async def Sample(self, request: pb.SampleRequest, context: Context) -> AsyncIterator[pb.SampleResponse]:
        target = self._target(request, "sample")
        job = codec.sample_job(request, target.loaded.spec, self._limits.max_rows)
        first = pb.SampleResponse(run=codec.run(job, target.model, target.loaded))
        with self._submit(job, target, context, self._window(target), request.preview_every) as call:
            while batch := await call.next():
                for message in self._messages(batch, target):
                    first.MergeFrom(message)
                    yield first
                    first = pb.SampleResponse()

    async def Reconstruct(self, request: pb.TransformRequest, context: Context) -> pb.TransformResponse:
        return await self._transform(request, context, "reconstruct")

    async def Energy(self, request: pb.TransformRequest, context: Context) -> pb.TransformResponse:
        return await self._transform(request, context, "energy")

    async def Encode(self, request: pb.TransformRequest, context: Context) -> pb.TransformResponse:
        return await self._transform(request, context, "encode")

    async def Decode(self, request: pb.TransformRequest, context: Context) -> pb.TransformResponse:
        return await self._transform(request, context, "decode")

    async def Classify(self, request: pb.TransformRequest, context: Context) -> pb.TransformResponse:
        return await self._transform(request, context, "classify")

    async def Score(self, request: pb.TransformRequest, context: Context) -> pb.ScoreResponse:
        target = self._target(request, "score")
        job, outputs, timings = await self._collect(request, context, target)
        response = codec.score(outputs, target.loaded.spec, job)
        response.run.CopyFrom(codec.run(job, target.model, target.loaded))
        response.score.CopyFrom(target.score)
        response.timings.CopyFrom(codec.timings(timings))
        return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        self._check_ready()
        models = list(self._catalogue)
        start = _page_start(request, len(models))
        end = start + (min(request.page_size, PAGE_SIZE) or PAGE_SIZE)
        return pb.ListModelsResponse(
            models=[self._describe(model) for model in models[start:end]],
            next_page_token=str(end) if end < len(models) else "",
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        self._check_ready()
        model = self._catalogue.select(request.model.name, request.model.version)
        model.check_format(request.model.format)
        return self._describe(model)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        return self._info

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise Unavailable("the server is loading its models or stopping; health says when it serves")

    def _target(self, request: pb.SampleRequest | pb.TransformRequest, operation: str) -> ResolvedProgram:
        self._check_ready()
        model = self._catalogue.select(request.model.name, request.model.version)
        return ResolvedProgram(model, model.program(operation, request.variant, request.model.format))

    def _describe(self, model: Model) -> pb.Model:
        return pb.Model(
            manifest=public(model.manifest),
            artifact_sha256=model.spec.digest,
            formats=model.formats,
            is_default=model is self._catalogue.default(model.spec.name),
        )

    def _window(self, target: ResolvedProgram) -> int:
        """How many rows of a stream are computed ahead of its reader."""
        row_bytes = max(1, target.loaded.spec.output_row_bytes)
        return max(2 * target.loaded.capacity, self._limits.window_bytes // row_bytes)

    def _submit(
        self,
        job: Job,
        target: ResolvedProgram,
        context: Context,
        window: int = UNBOUNDED,
        preview_every: int = 0,
    ) -> ResponseStream:
        spec, capacity = target.loaded.spec, target.loaded.capacity
        previews = MAX_PREVIEWS * min(capacity, job.rows) if preview_every else 0
        unread = min(window, job.rows) + previews
        call = ResponseStream(self._engine, self._exchange, whole=window == UNBOUNDED)
        remaining = context.time_remaining()
        call.submit(
            Request(
                program=target.loaded.key,
                rows=job.rows,
                steps=job.steps,
                deliver=call.deliver,
                seed=job.seed,
                first_row=job.first_row,
                inputs=job.work,
                deadline=None if remaining is None else time.monotonic() + remaining,
                preview_every=preview_every,
                max_unread_rows=window,
                is_batch=job.is_batch(capacity),
                has_early_exit=bool(spec.steps.done_flag),
                buffered_bytes=job.work.num_bytes + unread * spec.output_row_bytes,
            )
        )
        return call

    async def _transform(
        self, request: pb.TransformRequest, context: Context, operation: str
    ) -> pb.TransformResponse:
        target = self._target(request, operation)
        job, outputs, timings = await self._collect(request, context, target)
        return pb.TransformResponse(
            run=codec.run(job, target.model, target.loaded),
            outputs=codec.packed(outputs),
            timings=codec.timings(timings),
        )

    async def _collect(
        self, request: pb.TransformRequest, context: Context, target: ResolvedProgram
    ) -> tuple[Job, Arrays, Timings]:
        """All rows of a transform in the order of the request."""
        program = target.loaded.spec
        job = codec.transform_job(request, program, self._limits.max_rows)
        self._check_fits(job, target)
        finished: list[Rows] = []
        with self._submit(job, target, context) as call:
            while batch := await call.next():
                finished += [event for event in batch if isinstance(event, Rows)]
                last = batch[-1]
        assert isinstance(last, Completed), "a request ended without its timings. This is a bug."
        self._observer.on_dequeued(target.loaded.key, last.timings.queue)
        return job, _in_order(finished, program, job), last.timings

    def _check_fits(self, job: Job, target: ResolvedProgram) -> None:
        limit = self._limits.max_message_bytes - MESSAGE_OVERHEAD_BYTES
        # A score comes back twice: in nats and in bits per dimension.
        row_bytes = target.loaded.spec.output_row_bytes + (8 if target.loaded.spec.score else 0)
        if job.rows * row_bytes > limit:
            most = limit // row_bytes
            raise InvalidRequest(
                [
                    Violation(
                        "inputs",
                        f"expected at most {most} rows, whose answer fits into one message, got {job.rows}: "
                        f"send the rest with first_row {job.first_row + most}",
                    )
                ]
            )

    def _messages(self, batch: list[Any], target: ResolvedProgram) -> list[pb.SampleResponse]:
        """A batch of events in as few messages as the chunk size allows."""
        size = max(1, self._limits.chunk_bytes // max(target.loaded.spec.output_row_bytes, 1))
        previews = [event for event in batch if isinstance(event, Preview)]
        finished = [event for event in batch if isinstance(event, Rows)]
        messages = [pb.SampleResponse(previews=[codec.preview(chunk)]) for chunk in _previews(previews, size)]
        messages += [pb.SampleResponse(rows=codec.rows(chunk)) for chunk in _chunks(finished, size)]
        if isinstance(batch[-1], Completed):
            messages[-1].timings.CopyFrom(codec.timings(batch[-1].timings))
            self._observer.on_dequeued(target.loaded.key, batch[-1].timings.queue)
        return messages


def _chunks(finished: list[Rows], size: int) -> list[Rows]:
    """Finished rows, regrouped to at most `size` each."""
    if not finished:
        return []
    indices = [index for event in finished for index in event.indices]
    outputs = {
        name: np.concatenate([event.outputs[name] for event in finished]) for name in finished[0].outputs
    }
    return [_slice(Rows(indices, outputs), start, start + size) for start in range(0, len(indices), size)]


def _previews(previews: list[Preview], size: int) -> list[Preview]:
    """Previews of at most `size` rows each."""
    return [
        Preview(_slice(event.rows, start, start + size), event.steps_done[start : start + size])
        for event in previews
        for start in range(0, len(event.steps_done), size)
    ]


def _slice(rows: Rows, start: int, end: int) -> Rows:
    return Rows(rows.indices[start:end], {name: array[start:end] for name, array in rows.outputs.items()})


def _in_order(finished: list[Rows], program: ProgramSpec, job: Job) -> Arrays:
    """All rows of a job, however they were delivered, in the order of their indices."""
    if len(finished) == 1 and list(finished[0].indices) == list(job.indices):
        return dict(finished[0].outputs)
    outputs = {tensor.name: np.empty((job.rows, *tensor.shape), tensor.dtype) for tensor in program.outputs}
    for event in finished:
        positions = np.asarray(event.indices) - job.first_row
        for name, array in event.outputs.items():
            outputs[name][positions] = array
    return outputs


def _page_start(request: pb.ListModelsRequest, count: int) -> int:
    violations = codec.Violations()
    if request.page_size < 0:
        violations.add("page_size", f"expected at least 0, got {request.page_size}")
    token = request.page_token
    if token and token not in map(str, range(count)):
        violations.add("page_token", f"expected a next_page_token of this list, got {token!r}")
    violations.check()
    return int(token or 0)


def library_versions() -> dict[str, str]:
    """The libraries that decide what graphs compute and how calls travel, as far as they are installed."""
    libraries = ("torch", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "numpy")
    return {name: version for name in libraries if (version := _version(name))}


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
