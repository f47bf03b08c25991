"""Inference service: one method for each RPC, which decodes, submits and encodes.

Reads each request against the program of the model that it names; never branches on a family. Errors are
raised as they are; instrumentation.py converts them to status codes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from samovar.v1 import manifest_pb2
from server.core.errors import Unavailable
from server.core.request import Completed, Event, Preview, Request, Rows, Timings
from server.core.spec import ProgramSpec
from server.models.manifest import name_of, public
from server.models.registry import LoadedProgram, Model, ModelRegistry
from server.rpc import codec
from server.rpc.codec import RequestLimits
from server.rpc.response_stream import EngineClient, ResponseStream, ThreadBridge

Context = grpc.aio.ServicerContext[Any, Any]
Arrays = dict[str, NDArray[Any]]

PAGE_SIZE = 100


@dataclass(frozen=True)
class ResolvedProgram:
    """The program that a request names, and its model."""

    model: Model
    program: LoadedProgram

    @property
    def score(self) -> manifest_pb2.Score:
        """Meaning of the program's score, from the manifest."""
        name = self.program.spec.name
        return next(program.score for program in self.model.manifest.programs if name_of(program) == name)


class InferenceService(pb_grpc.InferenceServicer):
    """Serves the models of a registry through an engine, in this process or another one."""

    def __init__(
        self, registry: ModelRegistry, engine: EngineClient, limits: RequestLimits, info: pb.ServerInfo
    ) -> None:
        self._registry = registry
        self._engine = engine
        self._limits = limits
        self._info = info
        self._bridge = ThreadBridge(engine, asyncio.get_running_loop())
        self.is_ready = False

    async def Sample(self, request: pb.SampleRequest, context: Context) -> AsyncIterator[pb.SampleResponse]:
        target = self._resolve(request, "sample")
        rows = codec.sample_request(request, target.program, self._limits, _deadline(context))
        header = pb.SampleResponse(run=codec.run_info_to_proto(rows, target.model, target.program))
        with ResponseStream(self._engine, self._bridge) as stream:
            stream.submit(rows)
            while events := await stream.next():
                for message in self._sample_messages(events, target.program.spec):
                    header.MergeFrom(message)
                    yield header
                    header = pb.SampleResponse()

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
        target = self._resolve(request, "score")
        rows = codec.transform_request(request, target.program, self._limits, _deadline(context))
        outputs, timings = await self._collect(rows, target.program.spec)
        response = codec.score_to_proto(outputs, target.program.spec, rows)
        response.run.CopyFrom(codec.run_info_to_proto(rows, target.model, target.program))
        response.score.CopyFrom(target.score)
        response.timings.CopyFrom(codec.timings_to_proto(timings))
        return response

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        self._check_ready()
        models = list(self._registry)
        start = _page_start(request, len(models))
        end = start + (min(request.page_size, PAGE_SIZE) or PAGE_SIZE)
        return pb.ListModelsResponse(
            models=[self._describe(model) for model in models[start:end]],
            next_page_token=str(end) if end < len(models) else "",
        )

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:
        self._check_ready()
        model = self._registry.select(request.model.name, request.model.version)
        model.check_format(request.model.format)
        return self._describe(model)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.ServerInfo:
        return self._info

    def _check_ready(self) -> None:
        if not self.is_ready:
            raise Unavailable(
                "the server is loading its models or stopping; wait until its health check reports SERVING"
            )

    def _resolve(self, request: pb.SampleRequest | pb.TransformRequest, operation: str) -> ResolvedProgram:
        self._check_ready()
        model = self._registry.select(request.model.name, request.model.version)
        return ResolvedProgram(model, model.program(operation, request.variant, request.model.format))

    def _describe(self, model: Model) -> pb.Model:
        return pb.Model(
            manifest=public(model.manifest),
            artifact_sha256=model.spec.digest,
            formats=model.formats,
            is_default=model is self._registry.default(model.spec.name),
        )

    async def _transform(
        self, request: pb.TransformRequest, context: Context, operation: str
    ) -> pb.TransformResponse:
        target = self._resolve(request, operation)
        rows = codec.transform_request(request, target.program, self._limits, _deadline(context))
        outputs, timings = await self._collect(rows, target.program.spec)
        return pb.TransformResponse(
            run=codec.run_info_to_proto(rows, target.model, target.program),
            outputs=codec.tensors_to_proto(outputs),
            timings=codec.timings_to_proto(timings),
        )

    async def _collect(self, request: Request, spec: ProgramSpec) -> tuple[Arrays, Timings]:
        """Compute all rows of a request, in order of their indices."""
        finished: list[Rows] = []
        with ResponseStream(self._engine, self._bridge, whole=True) as stream:
            stream.submit(request)
            while events := await stream.next():
                finished += [event for event in events if isinstance(event, Rows)]
                last = events[-1]
        assert isinstance(last, Completed), "a request ended without its timings. This is a bug."
        return _in_order(finished, spec, request), last.timings

    def _sample_messages(self, events: Sequence[Event], spec: ProgramSpec) -> list[pb.SampleResponse]:
        """Encode events in as few messages as the chunk size allows."""
        size = max(1, self._limits.chunk_bytes // max(spec.output_row_bytes, 1))
        previews = [event for event in events if isinstance(event, Preview)]
        finished = [event for event in events if isinstance(event, Rows)]
        messages = [
            pb.SampleResponse(previews=[codec.preview_to_proto(chunk)])
            for chunk in _preview_chunks(previews, size)
        ]
        messages += [
            pb.SampleResponse(rows=codec.rows_to_proto(chunk)) for chunk in _row_chunks(finished, size)
        ]
        if isinstance(last := events[-1], Completed):
            messages[-1].timings.CopyFrom(codec.timings_to_proto(last.timings))
        return messages


def _deadline(context: Context) -> float | None:
    """Return a call's deadline on the monotonic clock."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def _row_chunks(finished: list[Rows], size: int) -> list[Rows]:
    """Join finished rows, and split them into chunks of at most `size` rows."""
    if not finished:
        return []
    rows = Rows(
        [index for event in finished for index in event.indices],
        {name: np.concatenate([event.outputs[name] for event in finished]) for name in finished[0].outputs},
    )
    return [_slice(rows, start, start + size) for start in range(0, len(rows.indices), size)]


def _preview_chunks(previews: list[Preview], size: int) -> list[Preview]:
    """Split previews into chunks of at most `size` rows."""
    return [
        Preview(_slice(preview.rows, start, start + size), preview.steps_done[start : start + size])
        for preview in previews
        for start in range(0, len(preview.steps_done), size)
    ]


def _slice(rows: Rows, start: int, end: int) -> Rows:
    return Rows(rows.indices[start:end], {name: array[start:end] for name, array in rows.outputs.items()})


def _in_order(finished: list[Rows], spec: ProgramSpec, request: Request) -> Arrays:
    """Return the outputs of all rows of a request in order of their indices."""
    if len(finished) == 1 and list(finished[0].indices) == list(request.indices):
        return dict(finished[0].outputs)
    outputs = {tensor.name: np.empty((request.rows, *tensor.shape), tensor.dtype) for tensor in spec.outputs}
    for rows in finished:
        positions = np.asarray(rows.indices) - request.first_row
        for name, array in rows.outputs.items():
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
    """Return the versions of the installed libraries that compute rows or carry calls."""
    libraries = ("torch", "onnxruntime", "onnxruntime-gpu", "grpcio", "protobuf", "numpy")
    return {name: version for name in libraries if (version := _version(name))}


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
