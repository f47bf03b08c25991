"""Processes that speak gRPC on one port, for the engine in another.

A front end holds no model: it reads and writes messages, which is most of what a small call costs,
and leaves the interpreter of the engine's process to the device thread. Needs no torch.
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
from server.rpc.grpc_server import DRAIN_NOTICE_SECONDS, GrpcServer, bind_errors
from server.rpc.ipc import IpcEngineClient, IpcEngineServer, WorkerObserver
from server.rpc.response_stream import EngineClient

log = logging.getLogger("samovar")

START_SECONDS = 120.0
# So many that ended by themselves within the period are one too many.
MAX_RESTARTS = 5
RESTART_PERIOD_SECONDS = 60.0
# Beyond the grace that calls in flight have.
EXIT_SECONDS = DRAIN_NOTICE_SECONDS + 5.0


@dataclass(frozen=True)
class Worker:
    """A front end and the engine's end of its link."""

    process: SpawnProcess
    host: IpcEngineServer


class WorkerPool:
    """As many front ends as the configuration asks for; one that ends by itself is started again.

    Listens, opens and closes as an Edge does. `on_death` is told when starting again is no use.
    """

    def __init__(
        self,
        config: Config,
        catalogue: ModelRegistry,
        engine: EngineClient,
        observer: WorkerObserver,
        info: pb.ServerInfo,
        on_death: Callable[[], None],
    ) -> None:
        self._config, self._info = config, info
        self._catalogue = catalogue
        self._engine, self._observer = engine, observer
        self._on_death = on_death
        self._context = multiprocessing.get_context("spawn")
        self._running: list[Worker] = []
        self._restarts = RestartPolicy(MAX_RESTARTS, RESTART_PERIOD_SECONDS)
        self._port: socket.socket | None = None
        self._is_open = False

    @property
    def pids(self) -> list[int]:
        """The processes that run."""
        return [each.process.pid for each in self._running if each.process.pid]

    async def listen(self, port: int) -> int:
        """Start the front ends, which listen as NOT_SERVING, and return their port."""
        self._port = _reserved(self._config.host, port)
        for _ in range(self._config.grpc_workers):
            self._start()
        for each in list(self._running):
            if not await asyncio.to_thread(each.host.is_listening.wait, START_SECONDS):
                raise RuntimeError(f"a front end did not listen within {START_SECONDS:g} s; the log says why")
        return _number(self._port)

    async def open(self) -> None:
        """Have calls taken from now on."""
        self._is_open = True
        for each in self._running:
            each.host.open(list(self._catalogue))

    async def close(self) -> None:
        """Have calls in flight finished, and the processes ended."""
        assert self._port is not None, "closed before it listened. This is a bug."
        for each in self._running:
            asyncio.get_running_loop().remove_reader(each.process.sentinel)
            each.host.close()
        patience = time.monotonic() + self._config.drain_timeout + EXIT_SECONDS
        for each in self._running:
            await asyncio.to_thread(each.process.join, max(0.0, patience - time.monotonic()))
            each.process.kill()
        self._port.close()

    def _start(self) -> None:
        assert self._port is not None, "started without a port. This is a bug."
        ours, theirs = self._context.Pipe()
        arguments = self._config, self._info, theirs, _number(self._port)
        process = self._context.Process(target=serve, args=arguments, name="front-end", daemon=True)
        process.start()
        theirs.close()
        host = IpcEngineServer(ours, self._engine, self._observer)
        host.start()
        if self._is_open:
            host.open(list(self._catalogue))
        running = Worker(process, host)
        self._running.append(running)
        asyncio.get_running_loop().add_reader(process.sentinel, self._replace, running)

    def _replace(self, ended: Worker) -> None:
        """A front end has ended by itself."""
        asyncio.get_running_loop().remove_reader(ended.process.sentinel)
        self._running.remove(ended)
        ended.process.join()
        log.error("a front end ended by itself, with exit code %s", ended.process.exitcode)
        if self._restarts.is_exhausted(time.monotonic()):
            self._on_death()
            return
        self._observer.on_worker_restart()
        self._start()


def _reserved(host: str, port: int) -> socket.socket:
    """A port that front ends may share, and nobody else has."""
    with bind_errors(host, port, "--port"):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
        shared = socket.socket(family, kind, protocol)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind(address)
    return shared


def _number(bound: socket.socket) -> int:
    port: int = bound.getsockname()[1]
    return port


def serve(config: Config, info: pb.ServerInfo, connection: Connection, port: int) -> None:
    """A front end's life, as a process: until the engine's process asks it to end, or is gone."""
    # An interrupt from the keyboard reaches every process; the engine's asks the others to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process.configure(config.log_level)
    asyncio.run(_serve(config, info, connection, port))


async def _serve(config: Config, info: pb.ServerInfo, connection: Connection, port: int) -> None:
    loop, stop, told = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    catalogue = ModelRegistry()

    def fill(models: Sequence[Model]) -> None:
        for model in models:
            catalogue.add(model)
        told.set()

    async def open_when_told() -> None:
        await told.wait()
        gc.collect()
        gc.freeze()
        await edge.open()

    link = IpcEngineClient(connection, loop, fill, stop.set)
    edge = GrpcServer(config, catalogue, link, link, info)
    await edge.listen(port, is_shared=True)
    link.listening()
    opening = asyncio.create_task(open_when_told())
    await stop.wait()
    opening.cancel()
    await edge.close()
    link.close()
