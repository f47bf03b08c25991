"""The engine compared with bare loops over the same graphs, and step batching with request batching."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import artifacts, load
from benchmarks.gpu.base import Check, Finding, Note
from benchmarks.gpu.timing import graphs
from benchmarks.gpu.timing.compiling import ARTIFACT, Compiler, Job
from benchmarks.gpu.timing.plans import REHEARSAL
from benchmarks.report import Result, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import ratio, spread
from benchmarks.suites import scheduling
from benchmarks.suites.base import Bench
from benchmarks.suites.efficiency import SINGLE_CALL, STEPPING, Case, Loop, server_rate
from server.runtime import Device, set_deterministic

FORMAT = "torchscript"
BATCH_ROWS = 256
REPEATS = 3
LOOP_TARGET = "≥ 0.95"
UNET = replace(graphs.UNET, level=1)
UNET_ROWS = 64
_EXPORT, _EXPORT_SECONDS = Job(ARTIFACT, UNET.model), 60.0
SCHEDULING_ROWS = 64


@dataclass(frozen=True)
class Settings:
    """Sizes of a run: batch sizes, seconds of a measurement, and repeats."""

    batch_rows: int
    seconds: float
    repeats: int
    cases: Sequence[Case]


def run(check: Check) -> Iterator[Finding]:
    """Measure the families, then batching under load, then the U-Net, whose export takes the longest."""
    settings = Settings(BATCH_ROWS, 1.0, REPEATS, (*STEPPING, *SINGLE_CALL))
    if check.is_rehearsal:
        settings = Settings(16, 0.3, 1, (STEPPING[3], SINGLE_CALL[1]))
    set_deterministic(Device(check.device))  # as the server computes
    with Compiler(check.directory / "compiled", check.device, _EXPORT_SECONDS, threads=4) as compiler:
        _start_unet_export(check, compiler)
        yield from _measure_families(check, settings)
        yield from _measure_batching(check)
        yield from _measure_unet(check, settings, compiler)


def _measure_families(check: Check, settings: Settings) -> Iterator[Finding]:
    models = artifacts.link([case.model for case in settings.cases], check.artifacts)
    rows = []
    with _server(check, models, settings.batch_rows) as server:
        for case in settings.cases:
            bucket = case.num_rows(settings.batch_rows)
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


def _measure_batching(check: Check) -> Iterator[Finding]:
    """Compare bursts, and latencies at a load that step batching can serve."""
    workloads = scheduling.QUICK_WORKLOADS if check.is_rehearsal else scheduling.WORKLOADS
    name, kinds = next(iter(workloads.items()))
    models = artifacts.link([kind.model for kind in kinds], check.artifacts)
    with ExitStack() as stack:
        bench = Bench(check.artifacts, stack.enter_context(load.start_clients()), check.is_rehearsal)
        servers = {
            mode: stack.enter_context(_server(check, models, SCHEDULING_ROWS, batching=mode))
            for mode in scheduling.MODES[:2]
        }
        tables, _ = scheduling.measure_workload(bench, name, kinds, servers, (scheduling.TARGET_LOAD,))
    yield from scheduling.results(tables)
    yield from tables


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
