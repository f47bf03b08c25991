"""Server application: creates the parts, and starts, loads, serves, drains and stops.

The server listens at once, and reports NOT_SERVING until all models are loaded, verified and warm.
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
from server.device_metrics import DeviceMemoryCollector
from server.engine.engine import Engine
from server.engine.scheduler import BatchingPolicy, Limits, Scheduler
from server.execution.program_runner import ProgramRunner
from server.metrics import Metrics
from server.models.registry import Model
from server.models.repository import Repository
from server.rpc.grpc_server import GrpcServer, bind_errors
from server.rpc.servicer import library_versions
from server.rpc.workers import WorkerPool
from server.runtime import RUNTIMES, Device, OpenGraph, device_context, summarize_error

log = logging.getLogger("samovar")


class App:
    """A server: repository, engine, gRPC and metrics. Create it on the event loop that runs it.

    Args:
        config: the settings.
        runtimes: functions that open graphs, by format.
        batching: the batching policy (default: continuous batching).
        runner: the class that runs programs.

    Attributes:
        port: the gRPC port, after `startup`.
        metrics_port: the Prometheus port, after `startup`.
        num_rejected: number of artifacts that are not served because they are invalid.
        has_failed: whether the server stops because the engine or the gRPC workers failed.

    Raises:
        RuntimeError: if there is no such device.
    """

    def __init__(
        self,
        config: Config,
        runtimes: Mapping[str, OpenGraph] = RUNTIMES,
        batching: BatchingPolicy | None = None,
        runner: type[ProgramRunner] = ProgramRunner,
    ) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.config = config
        self.device = Device(
            _resolve_device(config.device),
            config.intra_op_threads,
            config.cuda_graphs,
            config.max_gpu_memory_mib << 20,
        )
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
            scheduler,
            self.metrics,
            reload_graphs=self.repository.reload_graphs,
            on_death=self._fail,
            pipeline_depth=1 if self.device.is_cuda else 0,
            device_context=device_context(self.device.torch),
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
        """Serve until SIGTERM or SIGINT.

        Raises:
            RuntimeError: if the server cannot start, or if the engine or the gRPC workers fail.
        """
        with _stop_signals(self._stop):
            await self.startup()
            try:
                await self.load()
                if not self._stop.is_set():
                    # Exempt the models from garbage collection: they are large and stay in memory.
                    gc.collect()
                    gc.freeze()
                    print(self.startup_banner(), flush=True)
                    await self._stop.wait()
            finally:
                log.info("stopping; calls in flight have %g s to finish", self.config.drain_timeout)
                await self.shutdown()
        if self.has_failed:
            raise RuntimeError("the engine or a gRPC worker failed repeatedly; see the log for the cause")

    async def startup(self) -> None:
        """Listen for metrics and gRPC, and report NOT_SERVING.

        Raises:
            RuntimeError: if the models directory does not exist or a port cannot be bound.
        """
        config = self.config
        if not config.models.is_dir():
            raise RuntimeError(
                f"--models {config.models}: no such directory; expected a directory of artifacts"
            )
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
        if self.device.is_cuda:
            self.metrics.registry.register(DeviceMemoryCollector(self.device))
        log.info("listening on %s:%d; metrics on port %d", config.host, self.port, self.metrics_port)
        log.info("device: %s; CPU threads per graph call: %d", self.device.name, self.device.threads)

    async def load(self) -> None:
        """Load the models, start the engine, and report SERVING."""
        await asyncio.to_thread(self._load_all)
        if self._stop.is_set():
            return
        self.engine.start()
        await self.frontend.open()

    async def shutdown(self) -> None:
        """Reject new calls, let calls in flight finish, and stop the engine."""
        await self.frontend.close()
        await asyncio.to_thread(self.engine.stop)
        self._metrics_server.shutdown()
        self._metrics_server.server_close()

    def startup_banner(self) -> str:
        """Return the served models with their formats and operations, and an example command."""
        models = list(self.repository.registry)
        if not models and self.num_rejected:
            return (
                f"Serving no models: all {self.num_rejected} artifacts were rejected; see the errors above."
            )
        if not models:
            return (
                f"Serving no models: no artifacts in {self.config.models}. "
                "To train some: python -m export train-starters"
            )
        lines = ["", "Serving:"]
        for model in models:
            operations = ", ".join(sorted(model.spec.programs))
            lines.append(f"  {model.name:24} {'+'.join(model.formats):18} {operations}")
        address = "" if self.port == Config.port else f"--address 127.0.0.1:{self.port} "
        command = f".venv/bin/samovar {address}{_example_command(models)}"
        return "\n".join([*lines, "", f"Try in another shell:  {command}", ""])

    def _build_frontend(self) -> GrpcServer | WorkerPool:
        parts = self.config, self.repository.registry, self.engine, self.metrics, self._info()
        return WorkerPool(*parts, on_death=self._fail) if self.config.grpc_workers else GrpcServer(*parts)

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
            cuda_graphs=self.device.is_cuda and config.cuda_graphs,
            grpc_workers=config.grpc_workers,
            drain_timeout_seconds=config.drain_timeout,
        )

    def _fail(self) -> None:
        """Stop the server, from any thread: the engine or the gRPC workers cannot recover."""
        self.has_failed = True
        self._loop.call_soon_threadsafe(self._stop.set)

    def _load_all(self) -> None:
        for directory in sorted(_artifact_directories(self.config.models)):
            if self._stop.is_set():
                return
            start = time.monotonic()
            try:
                model = self.repository.load(directory)
            except InvalidArtifact as error:
                self._reject(directory, str(error))
            except Exception as error:  # The other artifacts are served, for any error in this one.
                self._reject(directory, f"{type(error).__name__}: {summarize_error(error)}")
            else:
                self._register(model, time.monotonic() - start)

    def _reject(self, directory: Path, reason: str) -> None:
        log.error("rejected artifact %s: %s", directory, reason)
        self.num_rejected += 1
        self.metrics.artifacts_rejected.set(self.num_rejected)

    def _register(self, model: Model, load_seconds: float) -> None:
        for loaded in model.programs.values():
            runner = self.repository.runners[loaded.key]
            self.engine.add(loaded.key, runner)
            self.metrics.expect(loaded.key)
            if not loaded.is_bitwise:
                log.warning(
                    "%s is SEEDED, not BITWISE: the low bits of a row depend on its position in the batch",
                    loaded.key,
                )
            log.debug("%s: batch sizes %s", loaded.key, runner.buckets)
        spec = model.spec
        self.metrics.model_load_seconds.labels(spec.name, spec.version).set(load_seconds)
        for format_ in model.formats:
            labels = spec.name, spec.version, format_, model.manifest.family, spec.digest
            self.metrics.model_info.labels(*labels).set(1)
        log.info("loaded %s: formats %s, %.1f s", model.name, ", ".join(model.formats), load_seconds)


def _example_command(models: Sequence[Model]) -> str:
    """Return arguments of the client that sample a model, preferably one of images."""
    sampled = [model for model in models if "sample" in model.spec.programs]
    for model in sampled:
        if model.manifest.data_spec.kind == manifest_pb2.DataSpec.KIND_IMAGE:
            return f"sample {model.spec.name} -n 64 --seed 7 -o grid.png"
    return f"sample {sampled[0].spec.name} -n 4 --seed 7" if sampled else "models"


def _artifact_directories(root: Path) -> Iterator[Path]:
    """Yield each NAME/VERSION directory; names that start with a dot are skipped."""
    yield from (path for path in root.glob("[!.]*/[!.]*") if path.is_dir())


def _resolve_device(name: str) -> str:
    """Return the device that a setting names; RuntimeError if there is no such device."""
    num_gpus = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if num_gpus else "cpu"
    gpus = ["cuda", *(f"cuda:{index}" for index in range(num_gpus))] if num_gpus else []
    if name not in ("cpu", *gpus):
        expected = ", ".join(["auto", "cpu", *gpus])
        raise RuntimeError(f"--device {name}: no such device in PyTorch; expected one of: {expected}")
    return name


@contextlib.contextmanager
def _stop_signals(stop: asyncio.Event) -> Iterator[None]:
    """Set an event on the first SIGTERM or SIGINT; a second one has its default effect."""
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
