"""Worker processes that speak gRPC on one port for the engine in another process.

A worker holds no model. It decodes and encodes messages, which is most of the cost of a small call, and
leaves the GIL of the engine's process to the device thread. Needs no torch.
"""

import asyncio
import gc
import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from samovar.v1 import inference_pb2 as pb
from server import process
from server.config import Config
from server.core.restart_policy import RestartPolicy
from server.models.registry import Model, ModelRegistry
from server.rpc.grpc_server import DRAIN_NOTICE_SECONDS, GrpcServer, bind, bind_errors
from server.rpc.ipc import IpcEngineClient, IpcEngineServer, WorkerObserver
from server.rpc.response_stream import EngineClient

log = logging.getLogger("samovar")

START_TIMEOUT_SECONDS = 120.0
# More unexpected exits than this within the period stop the server.
MAX_RESTARTS = 5
RESTART_PERIOD_SECONDS = 60.0
# Time that a worker has to exit after the drain timeout.
EXIT_TIMEOUT_SECONDS = DRAIN_NOTICE_SECONDS + 5.0


@dataclass(frozen=True)
class Worker:
    """A worker process, and the engine's end of its connection."""

    process: SpawnProcess
    ipc_server: IpcEngineServer


class WorkerPool:
    """Worker processes, restarted when they exit unexpectedly; has the interface of `GrpcServer`.

    Args:
        config: settings of the server; `grpc_workers` is the number of processes.
        registry: the served models, sent to the workers by `open`.
        engine: runs the requests of all workers.
        observer: receives the calls, exits and restarts of workers.
        info: the response to GetServerInfo.
        on_death: called on the event loop when workers exit too often to be restarted.
    """

    def __init__(
        self,
        config: Config,
        registry: ModelRegistry,
        engine: EngineClient,
        observer: WorkerObserver,
        info: pb.ServerInfo,
        on_death: Callable[[], None],
    ) -> None:
        self._config = config
        self._info = info
        self._registry = registry
        self._engine = engine
        self._observer = observer
        self._on_death = on_death
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self._restarts = RestartPolicy(MAX_RESTARTS, RESTART_PERIOD_SECONDS)
        self._socket: socket.socket | None = None
        self._is_open = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers if worker.process.pid]

    async def listen(self, port: int) -> int:
        """Start the workers, which listen and report NOT_SERVING.

        Args:
            port: the port that the workers share, or 0 for a free one.

        Returns:
            The port.

        Raises:
            RuntimeError: if the port cannot be bound or a worker does not start.
        """
        self._socket = _reserve_port(self._config.host, port)
        for _ in range(self._config.grpc_workers):
            self._start()
        for worker in list(self._workers):
            if not await asyncio.to_thread(worker.ipc_server.is_listening.wait, START_TIMEOUT_SECONDS):
                raise RuntimeError(
                    f"gRPC worker did not listen within {START_TIMEOUT_SECONDS:g} s; see the log"
                )
        return _port(self._socket)

    async def open(self) -> None:
        """Send the models to the workers, which then accept calls and report SERVING."""
        self._is_open = True
        for worker in self._workers:
            worker.ipc_server.open(list(self._registry))

    async def close(self) -> None:
        """Drain the workers and stop them; kill those that do not exit in time."""
        assert self._socket is not None, "close() before listen(). This is a bug."
        for worker in self._workers:
            asyncio.get_running_loop().remove_reader(worker.process.sentinel)
            worker.ipc_server.close()
        deadline = time.monotonic() + self._config.drain_timeout + EXIT_TIMEOUT_SECONDS
        for worker in self._workers:
            await asyncio.to_thread(worker.process.join, max(0.0, deadline - time.monotonic()))
            worker.process.kill()
        self._socket.close()

    def _start(self) -> None:
        assert self._socket is not None, "a worker started before listen(). This is a bug."
        engine_end, worker_end = self._context.Pipe()
        arguments = self._config, self._info, worker_end, _port(self._socket)
        process = self._context.Process(target=serve, args=arguments, name="grpc-worker", daemon=True)
        process.start()
        worker_end.close()
        ipc_server = IpcEngineServer(engine_end, self._engine, self._observer)
        ipc_server.start()
        if self._is_open:
            ipc_server.open(list(self._registry))
        worker = Worker(process, ipc_server)
        self._workers.append(worker)
        asyncio.get_running_loop().add_reader(process.sentinel, self._replace, worker)

    def _replace(self, worker: Worker) -> None:
        """Restart a worker that exited unexpectedly, or give up."""
        asyncio.get_running_loop().remove_reader(worker.process.sentinel)
        self._workers.remove(worker)
        worker.process.join()
        reason = f"gRPC worker exited unexpectedly (exit code {worker.process.exitcode})"
        if self._restarts.is_exhausted(time.monotonic()):
            log.error(
                "%s; stopping after %d restarts within %g s", reason, MAX_RESTARTS, RESTART_PERIOD_SECONDS
            )
            self._on_death()
            return
        log.error("%s; restarting it", reason)
        self._observer.on_worker_restart()
        self._start()


def _reserve_port(host: str, port: int) -> socket.socket:
    """Return a bound socket for a port that workers can share and that no other program uses."""
    with bind_errors(host, port, "--port"):
        # Without SO_REUSEPORT, binding fails if another program has the port.
        bind(host, port).close()
        return bind(host, port, socket.SO_REUSEPORT)


def _port(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def serve(config: Config, info: pb.ServerInfo, connection: Connection, port: int) -> None:
    """Run a worker process until the engine's process asks it to stop, or exits."""
    # Ctrl-C signals every process of the group; the engine's process asks the workers to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.configure(config.log_level)
    asyncio.run(_serve(config, info, connection, port))


async def _serve(config: Config, info: pb.ServerInfo, connection: Connection, port: int) -> None:
    loop = asyncio.get_running_loop()
    models_received, stop = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    registry = ModelRegistry()

    def add_models(models: Sequence[Model]) -> None:
        for model in models:
            registry.add(model)
        models_received.set()

    async def open_with_models() -> None:
        await models_received.wait()
        gc.collect()
        gc.freeze()
        await server.open()

    ipc_client = IpcEngineClient(connection, loop, on_open=add_models, on_close=stop.set)
    server = GrpcServer(config, registry, ipc_client, ipc_client, info)
    await server.listen(port, reuse_port=True)
    ipc_client.listening()
    opening = asyncio.create_task(open_with_models())
    await stop.wait()
    opening.cancel()
    await server.close()
    ipc_client.close()
