"""The engine compared with bare loops over the same graphs, and step batching with request batching."""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import artifacts, load
from benchmarks.gpu.base import Check, Finding, Note
from benchmarks.gpu.parts.step_time import REHEARSAL
from benchmarks.gpu.timing import graphs
from benchmarks.gpu.timing.compiling import ARTIFACT, Compiler, Job
from benchmarks.load import Clients, poisson
from benchmarks.report import Result, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import Floats, percentile_of_each, ratio, spread
from benchmarks.suites import scheduling
from benchmarks.suites.efficiency import SINGLE_CALL, STEPPING, Case, Loop, server_rate
from server.engine.program_queue import RESERVED_SHARE
from server.runtime import Device

FORMAT = "torchscript"
BATCH_ROWS = 256
REPEATS = 3
LOOP_TARGET = "≥ 0.95"
UNET = replace(graphs.UNET, level=1)
UNET_ROWS = 64
_EXPORT, _EXPORT_SECONDS = Job(ARTIFACT, UNET.model), 60.0
LOAD = 0.6


@dataclass(frozen=True)
class Settings:
    """Sizes of a run: batch sizes, seconds of a measurement, repeats and requests."""

    batch_rows: int
    seconds: float
    repeats: int
    burst: int
    cases: Sequence[Case]


def run(check: Check) -> Iterator[Finding]:
    """Measure the families, then batching under load, then the U-Net, whose export takes the longest."""
    settings = Settings(BATCH_ROWS, 1.0, REPEATS, 200, (*STEPPING, *SINGLE_CALL))
    if check.is_rehearsal:
        settings = Settings(16, 0.3, 1, 20, (STEPPING[3], SINGLE_CALL[1]))
    with Compiler(check.directory / "compiled", check.device, _EXPORT_SECONDS, threads=4) as compiler:
        _start_unet_export(check, compiler)
        yield from _measure_families(check, settings)
        with load.start_clients() as clients:
            yield from _measure_batching(check, settings, clients)
        yield from _measure_unet(check, settings, compiler)


def _measure_families(check: Check, settings: Settings) -> Iterator[Finding]:
    models = artifacts.link([case.model for case in settings.cases], check.artifacts)
    rows = []
    with _server(check, models, settings.batch_rows) as server:
        for case in settings.cases:
            bucket = _rows_of_level(settings.batch_rows, case.level)
            rates = _compare(check, server, models / case.model / "1", case, bucket, settings)
            if isinstance(rates, Note):
                yield rates
                continue
            engine, loop = rates
            rows.append((case.model, str(bucket), *_cells(engine, loop, case)))
            if case.steps:
                metric = f"{case.model}: engine / bare captured loop at {bucket} rows"
                yield Result(metric, str(ratio(engine, loop)), LOOP_TARGET)
            if case.model == artifacts.DIFFUSION:
                images = spread([rate / case.steps for rate in engine])
                yield Result("digits-diffusion: images/s at 20 evaluations", str(images))
    columns = (
        "model",
        "rows per step",
        "engine, row steps/s",
        "loop, row steps/s",
        "rows/s",
        "engine / loop",
    )
    yield Table("gpu-engine", "the engine compared with a bare loop", columns, rows)


def _cells(engine: Sequence[float], loop: Sequence[float], case: Case) -> tuple[str, ...]:
    rows = spread([rate / case.calls for rate in engine])
    return str(spread(engine)), str(spread(loop)), str(rows), str(ratio(engine, loop))


def _compare(
    check: Check, server: Server, directory: Path, case: Case, bucket: int, settings: Settings
) -> tuple[list[float], list[float]] | Note:
    """Return the row steps per second of the engine and of a loop, or why they cannot be compared."""
    try:
        loop = Loop(directory, case, bucket, FORMAT, Device(check.device, cuda_graphs=True))
        engine_rates, loop_rates = [], []
        for _ in range(settings.repeats):
            loop_rates.append(loop.rate(settings.seconds))
            rows = round(loop_rates[-1] * settings.seconds / case.calls)
            # Whole batches: the rows of the last one would otherwise be padding.
            rows = max(1, rows // bucket) * bucket
            engine_rates.append(server_rate(server, case, loop.program, rows))
    except Exception as error:  # the other models are measured anyway
        return Note(f"{case.model} was not measured: {type(error).__name__}: {error}")
    return engine_rates, loop_rates


def _rows_of_level(slots: int, level: int) -> int:
    """Return how many slots rows of a level may take."""
    return slots - math.ceil(level * slots * RESERVED_SHARE)


def _measure_batching(check: Check, settings: Settings, clients: Clients) -> Iterator[Finding]:
    """Compare bursts, and latencies at a load that step batching can serve."""
    kinds = (scheduling.TEXTS,) if check.is_rehearsal else scheduling.WORKLOADS["mixed steps"]
    models = artifacts.link([kind.model for kind in kinds], check.artifacts)
    modes = ("step", "request")
    with ExitStack() as stack:
        servers = {mode: stack.enter_context(_server(check, models, 64, batching=mode)) for mode in modes}
        rates: dict[str, list[float]] = {mode: [] for mode in modes}
        for repeat in range(settings.repeats):
            burst = scheduling.draw_requests(kinds, [0.0] * settings.burst, repeat)
            for mode, server in servers.items():
                rates[mode].append(clients.run_open(server.address, burst).rate)
        throughput = str(ratio(rates["step"], rates["request"]))
        yield Result("mixed steps: burst throughput, step / request batching", throughput, "≥ 1.3")
        rate = LOAD * float(np.median(rates["step"]))
        latencies: dict[str, list[Floats]] = {mode: [] for mode in modes}
        for repeat in range(settings.repeats):
            times = poisson(rate, settings.burst, np.random.default_rng(repeat))
            requests = scheduling.draw_requests(kinds, times, 100 + repeat)
            for mode, server in servers.items():
                latencies[mode].append(clients.run_open(server.address, requests).latencies)
    for percent in (50, 99):
        step, request = (percentile_of_each(latencies[mode], percent) for mode in modes)
        metric = f"mixed steps: p{percent} at {LOAD:.0%} load, step / request batching"
        yield Result(metric, str(ratio(step, request)), "≤ 0.333")


def _measure_unet(check: Check, settings: Settings, compiler: Compiler) -> Iterator[Finding]:
    """Compare the engine with a loop over the U-Net at 64 rows a step."""
    models, case, rows = _unet_models(check), UNET, UNET_ROWS
    outcome = compiler.wait(_EXPORT, _EXPORT_SECONDS)
    if not _has_unet(models) and (outcome is None or outcome.error):
        yield Note(f"the U-Net was not exported: {outcome.error if outcome else 'it took too long'}")
        return
    if check.is_rehearsal:
        case, rows = replace(case, steps=2), 4
    with _server(check, models, case.num_slots(rows)) as server:
        rates = _compare(check, server, models / case.model / "1", case, rows, settings)
    if isinstance(rates, Note):
        yield rates
        return
    engine, loop = rates
    yield Result(f"U-Net: engine / bare captured loop at {rows} rows", str(ratio(engine, loop)), "≥ 0.9")
    images = spread([rate / case.steps for rate in engine])
    yield Result(f"U-Net: images/s at {case.steps} evaluations", str(images))


def _start_unet_export(check: Check, compiler: Compiler) -> None:
    """Start to export the U-Net, which is too large to travel, unless the part step_time has exported it."""
    if not _has_unet(_unet_models(check)):
        variables = {"UNET_WIDTH": str(REHEARSAL.unet_width)} if check.is_rehearsal else {}
        compiler.start(_unet_models(check), [_EXPORT], variables)


def _unet_models(check: Check) -> Path:
    """Return the directory to which the part step_time exports the U-Net."""
    return check.directory.parent / "step_time" / "models"


def _has_unet(models: Path) -> bool:
    return (models / UNET.model / "1" / "manifest.json").exists()


def _server(
    check: Check, models: Path, max_batch_rows: int, batching: str = "step"
) -> AbstractContextManager[Server]:
    options = ("--device", check.device, "--formats", FORMAT, "--max-batch-rows", str(max_batch_rows))
    return samovar_server(models, *options, batching=batching)
