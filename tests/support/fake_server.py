"""Fake inference service on a real gRPC server, for tests of the client.

It keeps the contract: a row depends on the seed, its index and its inputs. Errors carry messages of
google.rpc, packed by grpc_status.
"""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import numpy as np
from google.protobuf import any_pb2, duration_pb2, timestamp_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from samovar.tensors import Array, pack, unpack
from samovar.v1 import inference_pb2 as pb
from samovar.v1 import manifest_pb2 as mf
from samovar.v1.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

LEVELS = 17
MAX_ROWS = 100_000
IMAGE = mf.TensorSpec(name="image", dtype=mf.DATA_TYPE_UINT8, shape=[8, 6], minimum=0, maximum=LEVELS - 1)
LATENT = mf.TensorSpec(name="latent", dtype=mf.DATA_TYPE_FLOAT32, shape=[2], doc="standard normal")
LABEL = mf.TensorSpec(name="label", dtype=mf.DATA_TYPE_INT64, minimum=0, maximum=3)
PARAMETERS = [
    mf.Parameter(
        name="steps", type=mf.Parameter.TYPE_INTEGER, default_value=4, minimum=1, maximum=50, doc="counts"
    ),
    mf.Parameter(name="scale", type=mf.Parameter.TYPE_FLOAT, default_value=1, minimum=0, maximum=2),
    mf.Parameter(name="greedy", type=mf.Parameter.TYPE_BOOLEAN),
    mf.Parameter(name="order", type=mf.Parameter.TYPE_CHOICE, choices=["up", "down"]),
]


def scalar_spec(name: str, dtype: mf.DataType.ValueType = mf.DATA_TYPE_FLOAT32) -> mf.TensorSpec:
    return mf.TensorSpec(name=name, dtype=dtype)


PROGRAMS = [
    mf.Program(
        operation="sample",
        doc="Count from the seed.",
        steps=mf.Steps(parameter="steps"),
        parameters=PARAMETERS,
        inputs=[mf.Input(tensor=LABEL, optional=True)],
        outputs=[IMAGE, scalar_spec("count", mf.DATA_TYPE_INT64)],
        previewable=True,
    ),
    mf.Program(
        operation="score",
        parameters=[
            mf.Parameter(
                name="draws", type=mf.Parameter.TYPE_INTEGER, default_value=10, minimum=1, maximum=99
            )
        ],
        inputs=[mf.Input(tensor=IMAGE)],
        outputs=[scalar_spec("log_likelihood"), scalar_spec("standard_error"), scalar_spec("brightness")],
        score=mf.Score(kind=mf.Score.KIND_LOWER_BOUND, dimensions=48, coordinate_space="integers 0..16"),
    ),
    mf.Program(operation="reconstruct", inputs=[mf.Input(tensor=IMAGE)], outputs=[IMAGE]),
    mf.Program(operation="encode", inputs=[mf.Input(tensor=IMAGE)], outputs=[LATENT]),
    mf.Program(operation="decode", inputs=[mf.Input(tensor=LATENT)], outputs=[IMAGE]),
    mf.Program(
        operation="classify",
        inputs=[mf.Input(tensor=IMAGE)],
        outputs=[mf.TensorSpec(name="probabilities", dtype=mf.DATA_TYPE_FLOAT32, shape=[3])],
    ),
]
COUNTER = mf.Manifest(
    name="counter",
    family="arithmetic",
    description="Counts.",
    data_spec=mf.DataSpec(
        kind=mf.DataSpec.KIND_IMAGE, tensor=IMAGE, num_levels=LEVELS, class_labels=["ant", "bee", "cat"]
    ),
    programs=PROGRAMS,
    quality=[mf.Quality(name="bits/dim", value=1.25, standard_error=0.01, doc="on 10 rows")],
    provenance=mf.Provenance(created=timestamp_pb2.Timestamp(seconds=1_700_000_000), dataset="numerals"),
)
SPEAKER = mf.Manifest(
    name="speaker",
    data_spec=mf.DataSpec(
        kind=mf.DataSpec.KIND_TOKENS,
        tensor=mf.TensorSpec(name="tokens", dtype=mf.DATA_TYPE_UINT8, shape=[3]),
        vocabulary=list("abcdefgh"),
    ),
    programs=[
        mf.Program(
            operation="sample", outputs=[mf.TensorSpec(name="tokens", dtype=mf.DATA_TYPE_UINT8, shape=[3])]
        )
    ],
)


def model_message(manifest: mf.Manifest, version: int, newest: int) -> pb.Model:
    """Return one version of a served model; `newest` is the version served by default."""
    described = mf.Manifest()
    described.CopyFrom(manifest)
    described.version = str(version)
    return pb.Model(
        manifest=described,
        artifact_sha256=f"{manifest.name}-{version}",
        formats=["onnx", "torchscript"],
        is_default=version == newest,
    )


def status(code: int, message: str, *details: Message) -> grpc.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    proto = status_pb2.Status(code=code, message=message, details=packed)
    converted: grpc.Status = rpc_status.to_status(proto)
    return converted


def bad_request(**violations: str) -> grpc.Status:
    details = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=name, description=description)
            for name, description in violations.items()
        ]
    )
    info = error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="samovar")
    message = "invalid request: " + "; ".join(f"{name}: {text}" for name, text in violations.items())
    return status(code_pb2.INVALID_ARGUMENT, message, info, details)


def unsupported(operation: str, supported: str) -> grpc.Status:
    info = error_details_pb2.ErrorInfo(
        reason="UNSUPPORTED_OPERATION", domain="samovar", metadata={"supported": supported}
    )
    return status(code_pb2.FAILED_PRECONDITION, f"unsupported operation {operation}", info)


def overloaded() -> grpc.Status:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000))
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="samovar")
    return status(code_pb2.RESOURCE_EXHAUSTED, "1000 rows are queued", info, retry)


UNAVAILABLE = status(code_pb2.UNAVAILABLE, "loading")
NOT_FOUND = status(code_pb2.NOT_FOUND, "unknown model; expected one of: counter, speaker")


def images(seed: int, indices: Array, label: int = 0) -> Array:
    """Return the rows that the counter samples: all pixels of a row are one number."""
    numbers = (seed + indices + label) % LEVELS
    return np.broadcast_to(numbers[:, None, None], (len(indices), 8, 6)).astype(np.uint8)


@dataclass
class FakeService(InferenceServicer):
    """Implementation of the service, controlled and observed by tests.

    Attributes:
        max_message_bytes: Largest request.
        page_size: Number of models in one page.
        errors: Statuses with which the next requests fail.
        requests: The received requests.
        num_get_model: Number of GetModel calls.
        blocks: True to block streams after their first rows until they are cancelled.
        blocked: Set when a stream blocks.
        cancelled: Set when a stream is cancelled.
        models: The served models.
    """

    max_message_bytes: int = 64 * 2**20
    page_size: int = 100
    errors: list[grpc.Status] = field(default_factory=list)
    requests: list[Message] = field(default_factory=list)
    num_get_model: int = 0
    blocks: bool = False
    blocked: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    models: list[pb.Model] = field(
        default_factory=lambda: [
            model_message(COUNTER, 2, 2),
            model_message(COUNTER, 1, 2),
            model_message(SPEAKER, 1, 1),
        ]
    )

    def Sample(self, request: pb.SampleRequest, context: grpc.ServicerContext) -> Iterator[pb.SampleResponse]:
        self._record(request, context)
        if self.blocks:
            context.add_callback(self.cancelled.set)
        indices = np.arange(request.first_row, request.first_row + request.rows)
        label = int(unpack(request.inputs["label"])[0]) if "label" in request.inputs else 0
        is_text = request.model.name == "speaker"
        rows = _token_rows(indices) if is_text else images(request.seed, indices, label)
        yield pb.SampleResponse(run=self._run(request, steps=4))
        if request.preview_every:
            previews = [
                _preview(indices, rows, steps)
                for steps in range(request.preview_every, 4, request.preview_every)
            ]
            yield pb.SampleResponse(previews=previews)
        for part in np.array_split(np.arange(request.rows)[::-1], min(3, request.rows)):
            if self.blocks and part[0] != request.rows - 1:
                self.blocked.set()
                self.cancelled.wait()
            yield pb.SampleResponse(rows=_rows(indices[part], rows[part]))
        yield pb.SampleResponse(timings=_timings())

    def Reconstruct(
        self, request: pb.TransformRequest, context: grpc.ServicerContext
    ) -> pb.TransformResponse:
        return self._transform(request, context, {"image": self._rows(request, context)})

    def Encode(self, request: pb.TransformRequest, context: grpc.ServicerContext) -> pb.TransformResponse:
        means = self._rows(request, context).mean(axis=(1, 2))
        return self._transform(request, context, {"latent": np.stack([means, -means], 1).astype(np.float32)})

    def Decode(self, request: pb.TransformRequest, context: grpc.ServicerContext) -> pb.TransformResponse:
        latent = self._rows(request, context, "latent")
        return self._transform(
            request,
            context,
            {"image": np.broadcast_to(latent[:, :1, None], (len(latent), 8, 6)).astype(np.uint8)},
        )

    def Classify(self, request: pb.TransformRequest, context: grpc.ServicerContext) -> pb.TransformResponse:
        rows = self._rows(request, context)
        probabilities = np.eye(3, dtype=np.float32)[rows[:, 0, 0] % 3] * 0.7 + 0.1
        return self._transform(request, context, {"probabilities": probabilities.astype(np.float32)})

    def Energy(self, request: pb.TransformRequest, context: grpc.ServicerContext) -> pb.TransformResponse:
        raise NotImplementedError

    def Score(self, request: pb.TransformRequest, context: grpc.ServicerContext) -> pb.ScoreResponse:
        rows = self._rows(request, context)
        self._record(request, context)
        indices = np.arange(request.first_row, request.first_row + len(rows))
        nats = (-rows.sum(axis=(1, 2), dtype=np.int64) - indices / 8).astype(np.float32)
        return pb.ScoreResponse(
            run=self._run(request, steps=1),
            score=PROGRAMS[1].score,
            nats=pack(nats),
            bits_per_dimension=pack((-nats / (48 * np.log(2))).astype(np.float32)),
            standard_error=pack(np.full(len(rows), 0.5, np.float32)),
            draws=request.parameters["draws"].integer_value or 10,
            outputs={"brightness": pack(rows.mean(axis=(1, 2)).astype(np.float32))},
            timings=_timings(),
        )

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        start = int(request.page_token or 0)
        end = start + self.page_size
        return pb.ListModelsResponse(
            models=self.models[start:end], next_page_token=str(end) if end < len(self.models) else ""
        )

    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.Model:
        self.num_get_model += 1
        for model in self.models:
            has_name = model.manifest.name == request.model.name
            if has_name and request.model.version in ("", model.manifest.version):
                return model
        raise context.abort_with_status(NOT_FOUND)

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext) -> pb.ServerInfo:
        return pb.ServerInfo(
            version="9.9",
            device="abacus",
            library_versions={"numpy": "2"},
            max_message_bytes=self.max_message_bytes,
            max_rows_per_request=MAX_ROWS,
            max_queued_rows=10 * MAX_ROWS,
            max_batch_rows=4,
        )

    def _record(self, request: Message, context: grpc.ServicerContext) -> None:
        self.requests.append(request)
        if self.errors:
            context.abort_with_status(self.errors.pop(0))

    def _rows(
        self, request: pb.TransformRequest, context: grpc.ServicerContext, name: str = "image"
    ) -> Array:
        return unpack(request.inputs[name])

    def _transform(
        self, request: pb.TransformRequest, context: grpc.ServicerContext, outputs: Mapping[str, Array]
    ) -> pb.TransformResponse:
        self._record(request, context)
        return pb.TransformResponse(
            run=self._run(request, steps=1),
            outputs={name: pack(array) for name, array in outputs.items()},
            timings=_timings(),
        )

    def _run(self, request: pb.SampleRequest | pb.TransformRequest, steps: int) -> pb.RunInfo:
        model = next(model for model in self.models if model.manifest.name == request.model.name)
        return pb.RunInfo(
            artifact_sha256=model.artifact_sha256,
            version=model.manifest.version,
            format=request.model.format or "onnx",
            seed=request.seed,
            steps=steps,
            determinism=pb.RunInfo.DETERMINISM_BITWISE,
        )


def _token_rows(indices: Array) -> Array:
    return ((indices[:, None] + np.arange(3)) % 8).astype(np.uint8)


def _rows(indices: Array, rows: Array) -> pb.Rows:
    name = "tokens" if rows.ndim == 2 else "image"
    outputs = {"count": pack(indices.astype(np.int64)), name: pack(rows)}
    return pb.Rows(indices=indices.tolist(), outputs=outputs)


def _preview(indices: Array, rows: Array, steps: int) -> pb.Preview:
    return pb.Preview(rows=_rows(indices, rows * steps // 4), steps_done=[steps] * len(indices))


def _timings() -> pb.Timings:
    half, one = duration_pb2.Duration(nanos=500_000_000), duration_pb2.Duration(seconds=1)
    return pb.Timings(queue=half, run=one, compute=half)


class FakeServer:
    """The service on a free port."""

    def __init__(self, service: FakeService) -> None:
        self.service = service
        limit = ("grpc.max_receive_message_length", service.max_message_bytes)
        self._server = grpc.server(ThreadPoolExecutor(4), options=[limit])
        add_InferenceServicer_to_server(service, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> "FakeServer":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.service.cancelled.set()
        self._server.stop(None).wait()
