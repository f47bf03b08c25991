"""gRPC server of one process: the inference service, health and reflection.

Computes nothing: the engine, or a client of the engine's process, is an argument.
"""

import asyncio
import contextlib
import socket
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

# Time between reporting NOT_SERVING and rejecting calls, for load balancers to notice.
DRAIN_NOTICE_SECONDS = 0.2


class GrpcServer:
    """gRPC server that reports NOT_SERVING until it is opened.

    Args:
        config: host, limits and drain timeout.
        registry: the served models; it may be filled after `listen`.
        engine: runs the requests.
        observer: receives the start and the end of each call.
        info: the response to GetServerInfo.
    """

    def __init__(
        self,
        config: Config,
        registry: ModelRegistry,
        engine: EngineClient,
        observer: CallObserver,
        info: pb.ServerInfo,
    ) -> None:
        self._config = config
        limits = RequestLimits(config.max_message_mib << 20, info.max_rows_per_request)
        self._service = InferenceService(registry, engine, limits, info)
        self._handler = InstrumentedHandler(observer, registry.is_known, config.max_concurrent_calls)
        self._health = Health()
        self._server: grpc.aio.Server | None = None

    async def listen(self, port: int, reuse_port: bool = False) -> int:
        """Listen, and report NOT_SERVING.

        Args:
            port: the port, or 0 for a free one.
            reuse_port: whether other processes may listen on the same port.

        Returns:
            The port.

        Raises:
            RuntimeError: if the port cannot be bound.
        """
        max_message_bytes = self._config.max_message_mib << 20
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.so_reuseport", int(reuse_port)),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ]
        )
        pb_grpc.add_InferenceServicer_to_server(self._service, self._handler)  # type: ignore[arg-type]
        self._server.add_generic_rpc_handlers((self._handler,))
        await self._health.add_to(self._server)
        inference = pb.DESCRIPTOR.services_by_name["Inference"].full_name
        services = [inference, "grpc.health.v1.Health", reflection.SERVICE_NAME]
        reflection.enable_server_reflection(services, self._server)
        with bind_errors(self._config.host, port, "--port"):
            bound_port = self._server.add_insecure_port(f"{self._config.host}:{port}")
        await self._server.start()
        return bound_port

    async def open(self) -> None:
        """Accept calls, and report SERVING."""
        self._service.is_ready = True
        await self._health.set_serving(True)

    async def close(self) -> None:
        """Report NOT_SERVING, reject new calls, and wait for calls in flight until the drain timeout."""
        assert self._server is not None, "close() before listen(). This is a bug."
        await self._health.shut_down()
        if self._service.is_ready:
            await asyncio.sleep(DRAIN_NOTICE_SECONDS)
        await self._server.stop(self._config.drain_timeout)


@contextlib.contextmanager
def bind_errors(host: str, port: int, flag: str) -> Iterator[None]:
    """Raise RuntimeError with the address, the cause and the port's flag if the body fails to bind."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else _bind_failure(host, port) or error
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
        raise RuntimeError(f"cannot bind {host}:{port}: {reason}; choose another port with {flag}") from error


def _bind_failure(host: str, port: int) -> OSError | None:
    """Return the system's error for a port that gRPC failed to bind; gRPC does not report it."""
    try:
        with bind(host, port):
            return None
    except OSError as error:
        return error


def bind(host: str, port: int, option: int = socket.SO_REUSEADDR) -> socket.socket:
    """Return a TCP socket that is bound to a port, with a socket option set; it does not listen."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound
