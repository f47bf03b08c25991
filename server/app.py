"""The server's life: start, load, serve, drain, stop.

Listens at once and says NOT_SERVING until every model has been proven and warmed.
"""

import asyncio
import contextlib
import gc
import logging
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import prometheus_client
import torch

from samovar.v1 import inference_pb2 as pb
from samovar.v1 import manifest_pb2
from server import __version__
from server.config import Config
from server.core.errors import InvalidArtifact
from server.engine.engine import Engine
from server.engine.scheduler import BatchingPolicy, Limits, Scheduler
from server.execution.program_runner import ProgramRunner
from server.metrics import Metrics
from server.models.registry import Model
from server.models.repository import Repository
from server.rpc.grpc_server import GrpcServer, bind_errors
from server.rpc.servicer import library_versions
from server.rpc.workers import WorkerPool
from server.runtime import RUNTIMES, Device, OpenGraph

log = logging.getLogger("samovar")


class App:
    """One server process: everything wired together, and started and stopped in order."""

    def __init__(
        self,
        config: Config,
        runtimes: Mapping[str, OpenGraph] = RUNTIMES,
        batching: BatchingPolicy | None = None,
        runner: type[ProgramRunner] = ProgramRunner,
    ) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.config = config
        self.device = Device(_device_name(config.device), config.intra_op_threads, config.cuda_graphs)
        self.metrics = Metrics(prometheus_client.CollectorRegistry())
        scheduler = Scheduler(
            Limits(
                max_queued_rows=config.max_queued_rows,
                max_buffered_bytes=config.max_buffered_mib << 20,
                drr_quantum_rows=config.drr_quantum_rows,
            ),
            batching,
        )
        self.repository = Repository(self.device, config.formats, config.max_batch_rows, runtimes, runner)
        self.engine = Engine(
            scheduler, self.metrics, reload_graphs=self.repository.reload_graphs, on_death=self._end
        )
        self.frontend = self._build_frontend()
        self.port = 0
        self.metrics_port = 0
        self.num_rejected = 0
        self.has_failed = False
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._metrics_server: Any = None

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; RuntimeError when the engine died."""
        with _stop_signals(self._stop):
            await self.startup()
            try:
                await self.load()
                if not self._stop.is_set():
                    # What was loaded stays, and is much: no collection need look at it again.
                    gc.collect()
                    gc.freeze()
                    print(self.startup_banner(), flush=True)
                    await self._stop.wait()
            finally:
                log.info("stopping: calls in flight have %g s", self.config.drain_timeout)
                await self.shutdown()
        if self.has_failed:
            raise RuntimeError("the engine died; the log says why")

    async def startup(self) -> None:
        """Listen, as NOT_SERVING."""
        config = self.config
        if not config.models.is_dir():
            raise RuntimeError(f"--models {config.models}: there is no such directory")
        torch.set_num_threads(self.device.threads)
        with bind_errors(config.host, config.metrics_port, "--metrics-port"):
            self._metrics_server, _ = prometheus_client.start_http_server(
                config.metrics_port, config.host, self.metrics.registry
            )
        self.metrics_port = self._metrics_server.server_port
        self.port = await self.frontend.listen(config.port)
        self.metrics.build.info(
            {"version": __version__, "torch": torch.__version__, "onnxruntime": onnxruntime.__version__}
            | {"device": self.device.name}
        )
        self.metrics.queued_rows.set_function(lambda: self.engine.num_queued)
        self.metrics.running_rows.set_function(lambda: self.engine.num_running)
        log.info("listening on %s:%d; metrics on port %d", config.host, self.port, self.metrics_port)
        log.info("graphs run on %s with %d CPU thread(s)", self.device.name, self.device.threads)

    async def load(self) -> None:
        """Load what there is, start the engine, and say SERVING."""
        await asyncio.to_thread(self._load_all)
        if self._stop.is_set():
            return
        self.engine.start()
        await self.frontend.open()

    async def shutdown(self) -> None:
        """Stop in order: refuse new calls, let those in flight finish, stop the engine."""
        await self.frontend.close()
        await asyncio.to_thread(self.engine.stop)
        self._metrics_server.shutdown()
        self._metrics_server.server_close()

    def startup_banner(self) -> str:
        """What is being served, and one line to try next."""
        models = list(self.repository.registry)
        if not models and self.num_rejected:
            return f"Serving nothing: all {self.num_rejected} artifacts were refused, for the reasons above."
        if not models:
            return (
                f"Serving nothing: no artifact under {self.config.models}. "
                "Try: python -m export train-starters"
            )
        lines = ["", "Serving:"]
        for model in models:
            operations = ", ".join(sorted(model.spec.programs))
            lines.append(f"  {model.name:24} {'+'.join(model.formats):18} {operations}")
        address = "" if self.port == 8001 else f"--address 127.0.0.1:{self.port} "
        lines += [
            "",
            f"Try next, in a second shell:  .venv/bin/samovar {address}{_example_command(models)}",
            "",
        ]
        return "\n".join(lines)

    def _build_frontend(self) -> GrpcServer | WorkerPool:
        """Who speaks gRPC: this process, or others for it."""
        parts = self.config, self.repository.registry, self.engine, self.metrics, self._info()
        return WorkerPool(*parts, on_death=self._end) if self.config.grpc_workers else GrpcServer(*parts)

    def _info(self) -> pb.ServerInfo:
        config = self.config
        return pb.ServerInfo(
            version=__version__,
            device=self.device.name,
            library_versions=library_versions(),
            max_message_bytes=config.max_message_mib << 20,
            max_rows_per_request=min(config.max_rows_per_request, config.max_queued_rows),
            max_queued_rows=config.max_queued_rows,
            max_buffered_bytes=config.max_buffered_mib << 20,
            max_batch_rows=config.max_batch_rows,
            max_concurrent_calls=config.max_concurrent_calls,
            drr_quantum_rows=config.drr_quantum_rows,
            intra_op_threads=config.intra_op_threads,
            formats=config.formats,
            cuda_graphs=config.cuda_graphs,
            grpc_workers=config.grpc_workers,
            drain_timeout_seconds=config.drain_timeout,
        )

    def _end(self) -> None:
        """The device thread or the front ends died: nothing can be served any more."""
        self.has_failed = True
        self._loop.call_soon_threadsafe(self._stop.set)

    def _load_all(self) -> None:
        for directory in sorted(_artifact_directories(self.config.models)):
            if self._stop.is_set():
                return
            start = time.monotonic()
            try:
                model = self.repository.load(directory)
            except InvalidArtifact as refusal:
                self._refuse(directory, str(refusal))
            except Exception as error:  # whatever is wrong with one artifact, the others are served
                self._refuse(directory, f"{type(error).__name__}: {' '.join(str(error).split())}")
            else:
                self._admit(model, time.monotonic() - start)

    def _refuse(self, directory: Path, reason: str) -> None:
        log.error("refused %s: %s", directory, reason)
        self.num_rejected += 1
        self.metrics.artifacts_rejected.set(self.num_rejected)

    def _admit(self, model: Model, seconds: float) -> None:
        for loaded in model.programs.values():
            program = self.repository.runners[loaded.key]
            self.engine.add(loaded.key, program)
            self.metrics.expect(loaded.key)
            if not loaded.is_bitwise:
                log.warning("%s is SEEDED, not BITWISE: its rows' low bits depend on their slot", loaded.key)
            log.debug("%s runs in batches of %s", loaded.key, program.buckets)
        self.metrics.model_load_seconds.labels(model.spec.name, model.spec.version).set(seconds)
        for format_ in model.formats:
            labels = model.spec.name, model.spec.version, format_, model.manifest.family, model.spec.digest
            self.metrics.model_info.labels(*labels).set(1)
        log.info("loaded %s as %s in %.1f s", model.name, ", ".join(model.formats), seconds)


def _example_command(models: Sequence[Model]) -> str:
    """A command of the client: samples as a picture, where a model makes pictures."""
    sampled = [model for model in models if "sample" in model.spec.programs]
    for model in sampled:
        if model.manifest.data_spec.kind == manifest_pb2.DataSpec.KIND_IMAGE:
            return f"sample {model.spec.name} -n 64 --seed 7 -o grid.png"
    return f"sample {sampled[0].spec.name} -n 4 --seed 7" if sampled else "models"


def _artifact_directories(root: Path) -> Iterator[Path]:
    """Every <name>/<version> under the models directory; what starts with a dot is none of ours."""
    yield from (path for path in root.glob("[!.]*/[!.]*") if path.is_dir())


def _device_name(asked: str) -> str:
    num_gpus = torch.cuda.device_count()
    if asked == "auto":
        return "cuda" if num_gpus else "cpu"
    if asked not in {
        "cpu",
        *(["cuda"] if num_gpus else []),
        *(f"cuda:{number}" for number in range(num_gpus)),
    }:
        raise RuntimeError(
            f"--device {asked}: expected cpu, or one of the {num_gpus} GPUs that PyTorch finds"
        )
    return asked


@contextlib.contextmanager
def _stop_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT sets the event; a second one ends the process, as it would have before."""
    loop = asyncio.get_running_loop()
    signals = (signal.SIGTERM, signal.SIGINT)

    def restore() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    def request_stop() -> None:
        stop.set()
        restore()

    for number in signals:
        loop.add_signal_handler(number, request_stop)
    try:
        yield
    finally:
        restore()
