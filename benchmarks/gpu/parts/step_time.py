"""Step time by rows, runtime and launch, for the starter models and a U-Net of 35 million parameters."""

import math
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.gpu.base import Check, Finding, Note
from benchmarks.gpu.timing import clocks, compiling, graphs, networks, profiling
from benchmarks.gpu.timing.clocks import Precision
from benchmarks.gpu.timing.compiling import (
    AOT_INDUCTOR,
    ARTIFACT,
    CACHE_VARIABLE,
    TORCH_COMPILE,
    Compiler,
    Job,
)
from benchmarks.gpu.timing.graphs import UNET, StepGraph
from benchmarks.gpu.timing.meter import LAUNCHES, MICROSECONDS, Meter, Series
from benchmarks.gpu.timing.plans import FULL, REHEARSAL, Plan
from benchmarks.gpu.timing.profiling import REPLAY
from benchmarks.report import Result, Table
from benchmarks.statistics import format_number
from benchmarks.suites.efficiency import Case
from server.runtime import Device, Graph, device_context, set_deterministic
from server.runtime.onnx import has_cuda_provider

TORCHSCRIPT, TORCH_EXPORT, ONNX = graphs.FORMATS
RATIO_ROWS = (1, 256)
RATIO_TARGET, HOST_TARGET, BUSY_TARGET = "≤ 1.3", "≤ 30 µs", "≥ 0.85"
MEBIBYTE = 1 << 20


def run(check: Check) -> Iterator[Finding]:
    """Measure everything, or a little in a rehearsal."""
    return measure(check, REHEARSAL if check.is_rehearsal else FULL)


def measure(check: Check, plan: Plan) -> Iterator[Finding]:
    """Measure according to a plan, the most valuable figures first."""
    device = Device(check.device)
    set_deterministic(device)
    if not device.is_cuda:  # threads would wait for the cores of the processes that compile
        torch.set_num_threads(1)
    meter = Meter(device, plan.item_seconds, time.monotonic() + plan.seconds)
    compiler = Compiler(check.directory / "compiled", check.device, plan.job_seconds, plan.threads)
    with _cache_of(compiler), compiler, device_context(device.torch):
        measurement = _Measurement(check, plan, meter, compiler)
        for section in measurement.sections:
            yield from section()
            yield from meter.notes()
            meter.write(check.directory)
            if device.is_cuda:
                torch.cuda.empty_cache()


@contextmanager
def _cache_of(compiler: Compiler) -> Iterator[None]:
    """Return a context in which Inductor uses the cache of the compiler's processes."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(compiler.cache)
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


class _Measurement:
    """Sections of the part, which share open graphs."""

    def __init__(self, check: Check, plan: Plan, meter: Meter, compiler: Compiler) -> None:
        self._check, self._plan, self._meter, self._compiler = check, plan, meter, compiler
        self._device = meter.device
        self._models = check.directory / "models"
        self._step_graphs: dict[Case, StepGraph] = {}
        self._open: dict[tuple[Case, str], Graph] = {}
        self._pending = list(self._jobs)
        self._is_unet_done = not plan.unet_rows
        self.sections: Sequence[Callable[[], Iterator[Finding]]] = (
            self._start,
            partial(self._measure_families, TORCHSCRIPT),
            self._report_targets,
            partial(self._measure_unet, is_last_try=False),
            self._profile,
            partial(self._measure_families, TORCH_EXPORT),
            partial(self._measure_unet, is_last_try=True),
            self._measure_onnx,
            partial(self._measure_other_rows, TORCHSCRIPT),
            self._measure_finished_jobs,
            partial(self._measure_other_rows, TORCH_EXPORT),
            self._measure_compiled,
        )

    def _start(self) -> Iterator[Finding]:
        """Start the export of the U-Net, and read the artifacts."""
        if self._plan.unet_rows:
            variables = {"UNET_WIDTH": str(self._plan.unet_width)}
            self._compiler.start(self._models, [Job(ARTIFACT, UNET.model)], variables)
        for case in self._plan.cases:
            try:
                self._step_graphs[case] = graphs.read(self._check.artifacts, case)
            except Exception as error:  # the other models are measured
                self._meter.fail(case.model, str(error))
        if self._check.is_rehearsal:
            yield from self._start_compilers()
        clocks.warm_up(self._device.torch)
        yield Note(
            "Microseconds of one step: of the step graph, or of the only graph of a model without steps. "
            "Tensors hold random numbers and stay on the device. The kernels of a step are launched one by "
            "one, or together as a CUDA graph. Figures are medians of groups of calls."
        )

    def _measure_families(self, runtime: str) -> Iterator[Finding]:
        yield from self._measure_rows(runtime, self._plan.rows, "")

    def _measure_other_rows(self, runtime: str) -> Iterator[Finding]:
        yield from self._measure_rows(runtime, self._plan.other_rows, "-more")

    def _measure_rows(self, runtime: str, rows: Sequence[int], suffix: str) -> Iterator[Finding]:
        for case, step_graph in self._step_graphs.items():
            graph = self._opened(case, runtime, step_graph)
            for count in rows if graph else ():
                assert graph is not None
                self._meter.measure(Series(case.model, runtime), step_graph, graph, count)
        yield from self._tables(runtime, tuple(self._step_graphs), rows, suffix)

    def _opened(self, case: Case, runtime: str, step_graph: StepGraph) -> Graph | None:
        """Return a graph in a runtime of the server, opened once; None if that fails."""
        if (case, runtime) not in self._open:
            function = partial(graphs.open_graph, step_graph, runtime, self._device)
            graph = self._meter.open(f"{case.model}, {runtime}", function)
            if graph is None:
                return None
            self._open[case, runtime] = graph
        return self._open[case, runtime]

    def _tables(
        self, runtime: str, cases: Sequence[Case], rows: Sequence[int], suffix: str = ""
    ) -> Iterator[Table]:
        series = [Series(case.model, runtime, launch) for case in cases for launch in LAUNCHES]
        name = f"{runtime.lower().replace('.', '-').replace(' ', '-')}{suffix}"
        titles = (f"{runtime}: microseconds of a step, by rows", f"{runtime}: of these, on the host")
        tables = (
            self._meter.table(f"step-time-{name}", titles[0], series, rows),
            self._meter.host_table(f"step-host-time-{name}", titles[1], series, rows),
        )
        yield from (table for table in tables if table.rows)

    def _report_targets(self) -> Iterator[Finding]:
        """Compare with the targets what was measured, and start the compilers, which disturb host times."""
        few, many = (
            RATIO_ROWS if RATIO_ROWS[1] in self._plan.rows else (self._plan.rows[0], self._plan.rows[-1])
        )
        for case in self._step_graphs:
            best = partial(self._meter.best, case.model, TORCHSCRIPT)
            metric = f"{case.model}: time of {many} rows / time of {few}"
            yield Result(metric, format_number(best(many) / best(few)), RATIO_TARGET)
        launch = REPLAY if self._device.is_cuda else LAUNCHES[0]
        host = [seconds for (series, _), seconds in self._meter.host.items() if series.launch == launch]
        longest = format_number(MICROSECONDS * max(host, default=math.nan))
        yield Result(f"host time of a step, {launch}, longest of all models", f"{longest} µs", HOST_TARGET)
        if not self._check.is_rehearsal:
            yield from self._start_compilers()

    def _start_compilers(self) -> Iterator[Finding]:
        if not shutil.which("g++"):
            yield Note("Not compiled: this machine has no C++ compiler.")
            return
        for task in (AOT_INDUCTOR, TORCH_COMPILE):
            jobs = [job for job in self._jobs if job.task == task and job.name != UNET.model]
            if jobs:
                self._compiler.start(self._check.artifacts, jobs, _KNOWN_PROCESSOR)

    @property
    def _jobs(self) -> list[Job]:
        if not shutil.which("g++"):
            return []
        tasks = ((AOT_INDUCTOR, self._plan.packages), (TORCH_COMPILE, self._plan.compiled))
        return [Job(task, case.model) for task, cases in tasks for case in cases]

    def _measure_unet(self, is_last_try: bool) -> Iterator[Finding]:
        """Measure the U-Net, unless its export takes long: then other models come first."""
        if self._is_unet_done:
            return
        seconds = min(_EXPORT_SECONDS, self._meter.seconds_left / 2)
        outcome = self._compiler.wait(Job(ARTIFACT, UNET.model), seconds)
        if outcome is None and not is_last_try:
            return
        self._is_unet_done = True
        if outcome is None or outcome.error:
            self._meter.fail(UNET.model, outcome.error if outcome else "its export took too long")
            return
        for job in self._jobs:
            if job.name == UNET.model:
                self._compiler.start(self._models, [job])
        step_graph = graphs.read(self._models, UNET)
        parameters = networks.count_parameters(networks.UNet(self._plan.unet_width))
        yield Note(
            f"U-Net: {parameters:,} parameters, {networks.CHANNELS} x {networks.SIDE} x {networks.SIDE}, one "
            f"step of DDIM; its export took {outcome.seconds:.0f} s."
        )
        for runtime, precisions in _UNET_RUNTIMES.items():
            yield from self._measure_unet_runtime(step_graph, runtime, precisions)

    def _measure_unet_runtime(
        self, step_graph: StepGraph, runtime: str, precisions: Sequence[Precision]
    ) -> Iterator[Finding]:
        rows = self._plan.unet_rows
        graph = self._opened(UNET, runtime, step_graph)
        if graph is None:
            return
        for name in precisions:
            for count in rows:
                self._meter.measure(Series(UNET.model, runtime, precision=name), step_graph, graph, count)
        series = [Series(UNET.model, runtime, launch, name) for name in precisions for launch in LAUNCHES]
        title = f"U-Net, {runtime}: microseconds of a step, by rows"
        yield self._meter.table(f"step-time-unet-{graphs.FORMATS[runtime]}", title, series, rows)
        if self._device.is_cuda:
            yield self._peak_table(series, rows)

    def _peak_table(self, series: Sequence[Series], rows: Sequence[int]) -> Table:
        measured = [entry for entry in series if any((entry, count) in self._meter.peaks for count in rows)]
        cells = [
            (
                entry.runtime,
                entry.precision,
                *(
                    format_number(self._meter.peaks.get((entry, count), math.nan) / MEBIBYTE)
                    for count in rows
                ),
            )
            for entry in measured
        ]
        name = f"peak-memory-unet-{graphs.FORMATS[series[0].runtime]}"
        title = "U-Net: MiB that a step needs for a moment, beyond weights, inputs and outputs, by rows"
        return Table(name, title, ("runtime", "precision", *map(str, rows)), cells)

    def _profile(self) -> Iterator[Finding]:
        """Run the profiler in a process of its own."""
        few, unet = self._plan.profile_rows
        models = [(self._check.artifacts / case.model, few) for case in self._step_graphs]
        if (UNET, TORCHSCRIPT) in self._open:
            models.append((self._models / UNET.model, unet))
        try:
            output = subprocess.run(
                profiling.command(self._check.device, models, self._plan.profile_calls),
                env={**os.environ, "OMP_NUM_THREADS": str(self._plan.threads)},
                capture_output=True,
                text=True,
                timeout=max(1.0, min(self._plan.profile_seconds, self._meter.seconds_left)),
            ).stdout
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
            self._meter.fail("profiler", "its process took too long")
        found = profiling.parse_output(output)
        for entry in found:
            if entry.error:
                self._meter.fail(f"{entry.model}, profiler, {entry.launch}", entry.error)
        yield from _report_profiles([entry for entry in found if not entry.error], self._device.is_cuda)

    def _measure_onnx(self) -> Iterator[Finding]:
        if self._device.is_cuda and not has_cuda_provider():
            yield Note("Not measured: this ONNX Runtime has no CUDA provider.")
            return
        yield from self._measure_families(ONNX)
        if (UNET, TORCHSCRIPT) in self._open:
            step_graph = graphs.read(self._models, UNET)
            if graphs.FORMATS[ONNX] in step_graph.files:
                yield from self._measure_unet_runtime(step_graph, ONNX, ("float32",))

    def _measure_compiled(self) -> Iterator[Finding]:
        """Measure what the compilers have made and will make until the end."""
        while self._pending and self._meter.seconds_left > 0:
            yield from self._measure_finished_jobs()
            time.sleep(_POLL_SECONDS)
        for job in self._pending:
            self._meter.fail(str(job), "it was not compiled in time")
        for runtime in (AOT_INDUCTOR, TORCH_COMPILE):
            yield from self._tables(runtime, self._plan.cases, self._plan.rows)
            yield from self._tables(runtime, (UNET,), self._plan.unet_rows, "-unet")
        yield from self._report_compile_times()

    def _measure_finished_jobs(self) -> Iterator[Finding]:
        finished = [(job, outcome) for job in self._pending if (outcome := self._compiler.outcome(job))]
        for job, outcome in finished:
            self._pending.remove(job)
            if outcome.error:
                self._meter.fail(str(job), outcome.error)
            else:
                self._measure_job(job)
        yield from ()

    def _measure_job(self, job: Job) -> None:
        try:
            with compiling.time_limit(max(1.0, min(_LOAD_SECONDS, self._meter.seconds_left))):
                self._measure_compiled_graph(job)
        except TimeoutError as error:
            self._meter.fail(str(job), str(error))

    def _measure_compiled_graph(self, job: Job) -> None:
        is_unet = job.name == UNET.model
        models = self._models if is_unet else self._check.artifacts
        step_graph = graphs.read(models, graphs.CASES[job.name])
        graph = self._meter.open(str(job), partial(self._open_compiled, job, step_graph))
        rows = self._plan.unet_rows if is_unet else self._plan.rows
        for count in rows if graph else ():
            assert graph is not None
            self._meter.measure(Series(job.name, job.task), step_graph, graph, count)

    def _open_compiled(self, job: Job, step_graph: StepGraph) -> Graph:
        if job.task == AOT_INDUCTOR:
            return graphs.open_package(self._compiler.package(job.name))
        return graphs.open_compiled(step_graph, self._device.torch)

    def _report_compile_times(self) -> Iterator[Finding]:
        outcomes = [(job, self._compiler.outcome(job)) for job in self._jobs]
        cells = [
            (job.task, job.name, format_number(outcome.seconds))
            for job, outcome in outcomes
            if outcome and not outcome.error
        ]
        if cells:
            title = "seconds of a compilation"
            yield Table("compile-time", title, ("compiler", "model", "seconds"), cells)


# Inductor does not compile a program to test the vector instructions of the processor.
_KNOWN_PROCESSOR = {"TORCHINDUCTOR_VEC_ISA_OK": "1"}
# Runtimes of the U-Net and their precisions: the lower ones are for comparison.
_UNET_RUNTIMES: dict[str, tuple[Precision, ...]] = {
    TORCHSCRIPT: ("float32",),
    TORCH_EXPORT: ("float32", "TF32", "bfloat16"),
}
_POLL_SECONDS = 0.2
# How long the other measurements wait for the export of the U-Net.
_EXPORT_SECONDS = 20.0
# Time limit of a measurement of a compiled graph: torch.compile may not find a kernel in its cache.
_LOAD_SECONDS = 25.0


def _report_profiles(profiles: Sequence[profiling.Profile], is_cuda: bool) -> Iterator[Finding]:
    if not profiles:
        yield Note("Not measured: the profiler returned no figures.")
        return
    columns = ("model", "launch", "rows", "kernels a step", "kernels, µs", "step, µs", "busy")
    cells = [
        (
            *(entry.model, entry.launch, str(entry.rows), format_number(entry.kernels)),
            *(format_number(MICROSECONDS * value) for value in (entry.kernel_seconds, entry.step_seconds)),
            format_number(entry.busy),
        )
        for entry in profiles
    ]
    title = f"kernels of a step and the busy share of the device, {profiling.RUNTIME}"
    yield Table("step-kernels", title, columns, cells)
    for entry in profiles if is_cuda else ():  # operators on a CPU contain others
        metric = f"{entry.model}, {entry.rows} rows, {entry.launch}: busy share in a bare loop"
        yield Result(metric, format_number(entry.busy), BUSY_TARGET)
