"""The gRPC server of one process: the service, health and reflection, started and stopped in order.

Computes nothing: whoever does is handed in, the engine or a link to it.
"""

import asyncio
import contextlib
from collections.abc import Iterator

import grpc
from grpc_reflection.v1alpha import reflection

from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from server.config import Config
from server.models.registry import ModelRegistry
from server.rpc.codec import RequestLimits
from server.rpc.health import Health
from server.rpc.instrumentation import CallObserver, InstrumentedHandler
from server.rpc.response_stream import EngineClient
from server.rpc.servicer import InferenceService

DRAIN_NOTICE_SECONDS = 0.2


class GrpcServer:
    """Listens at once and says NOT_SERVING until it is opened."""

    def __init__(
        self,
        config: Config,
        catalogue: ModelRegistry,
        engine: EngineClient,
        observer: CallObserver,
        info: pb.ServerInfo,
    ) -> None:
        self._config = config
        limits = RequestLimits(config.max_message_mib << 20, info.max_rows_per_request)
        self._service = InferenceService(catalogue, engine, limits, info)
        self._methods = InstrumentedHandler(observer, catalogue.is_known, config.max_concurrent_calls)
        self._health = Health()
        self._server: grpc.aio.Server | None = None

    async def listen(self, port: int, is_shared: bool = False) -> int:
        """Listen, as NOT_SERVING, and return the port; a shared one may have other listeners."""
        limit = self._config.max_message_mib << 20
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", int(is_shared)),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ]
        )
        pb_grpc.add_InferenceServicer_to_server(self._service, self._methods)  # type: ignore[arg-type]
        self._server.add_generic_rpc_handlers((self._methods,))
        await self._health.add_to(self._server)
        reflection.enable_server_reflection(_reflected(), self._server)
        with bind_errors(self._config.host, port, "--port"):
            bound = self._server.add_insecure_port(f"{self._config.host}:{port}")
        await self._server.start()
        return bound

    async def open(self) -> None:
        """Take calls from now on, and say SERVING."""
        self._service.is_ready = True
        await self._health.set_serving(True)

    async def close(self) -> None:
        """Refuse new calls, and let those in flight finish."""
        assert self._server is not None, "closed before it listened. This is a bug."
        await self._health.shut_down()
        if self._service.is_ready:
            await asyncio.sleep(DRAIN_NOTICE_SECONDS)
        await self._server.stop(self._config.drain_timeout)


@contextlib.contextmanager
def bind_errors(host: str, port: int, flag: str) -> Iterator[None]:
    """Say which port could not be had, and which flag asks for another."""
    try:
        yield
    except (OSError, RuntimeError):
        raise RuntimeError(f"{host}:{port} cannot be listened on; ask for another with {flag}") from None


def _reflected() -> list[str]:
    ours = pb.DESCRIPTOR.services_by_name["Inference"].full_name
    return [ours, "grpc.health.v1.Health", reflection.SERVICE_NAME]
