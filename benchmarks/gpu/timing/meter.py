"""Measurements of step graphs: kept by model, runtime, precision, launch and rows, and shown as tables."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu.base import Note
from benchmarks.gpu.timing import clocks
from benchmarks.gpu.timing.clocks import Precision
from benchmarks.gpu.timing.graphs import StepGraph
from benchmarks.gpu.timing.profiling import KERNELS, REPLAY
from benchmarks.report import Table, write_csv
from benchmarks.statistics import format_number
from server.runtime import Device, Graph, is_device_lost, is_out_of_memory, summarize_error

LAUNCHES = (KERNELS, REPLAY)
MICROSECONDS = 1e6
_HOST_SECONDS = 0.1
_MAX_ERROR_CHARACTERS = 200


@dataclass(frozen=True)
class Series:
    """Measurements that differ in rows only."""

    model: str
    runtime: str
    launch: str = KERNELS
    precision: Precision = "float32"


@dataclass
class Meter:
    """Measures until a point in time; an error of one measurement does not prevent the others.

    Attributes:
        device: device to measure.
        seconds: seconds of one measurement.
        end: time of the monotonic clock after which it measures no more.
        steps: seconds of a step, by series and rows.
        host: seconds in which the host enqueues a step.
        peaks: bytes of GPU memory that a step needs for a moment.
    """

    device: Device
    seconds: float
    end: float
    steps: dict[tuple[Series, int], float] = field(default_factory=dict)
    host: dict[tuple[Series, int], float] = field(default_factory=dict)
    peaks: dict[tuple[Series, int], int] = field(default_factory=dict)
    _failures: list[str] = field(default_factory=list)
    _skipped: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def open(self, label: str, function: Callable[[], Graph]) -> Graph | None:
        """Return the graph that a function opens; None if it fails or no time is left."""
        graph = None
        with self._attempt(label) as is_attempted:
            graph = function() if is_attempted else None
        return graph

    def measure(self, series: Series, step_graph: StepGraph, graph: Graph, rows: int) -> None:
        """Measure a graph with its kernels one by one and, on a GPU, as a CUDA graph.

        Args:
            series: what to measure; both launches are measured, in its precision.
            step_graph: the tensors of the graph.
            graph: the graph in the runtime of the series.
            rows: rows of a step.
        """
        device = self.device.torch
        label = f"{series.model}, {series.runtime}, {series.precision}, {rows} rows"
        with (
            self._attempt(label) as is_attempted,
            clocks.precision(series.precision, device),
        ):
            if not is_attempted:
                return
            call = step_graph.bind(graph, rows, device)
            self._time(series, KERNELS, rows, call)
            self.peaks[series, rows] = clocks.peak_bytes(call, device)
            if self.device.is_cuda:
                self._time(series, REPLAY, rows, clocks.capture(call))

    def _time(self, series: Series, launch: str, rows: int, call: clocks.Call) -> None:
        device = self.device.torch
        key = Series(series.model, series.runtime, launch, series.precision), rows
        seconds = clocks.median_seconds(call, device, self.seconds)
        host_calls = max(1, min(clocks.HOST_CALLS, round(_HOST_SECONDS / seconds)))
        self.host[key] = clocks.host_seconds(call, device, host_calls)
        self.steps[key] = seconds

    @contextmanager
    def _attempt(self, label: str) -> Iterator[bool]:
        """Return a context that keeps an error as text; its value is whether time is left."""
        if self.seconds_left <= 0:
            self._skipped.append(label)
            yield False
            return
        try:
            yield True
        except TimeoutError:
            raise
        except Exception as error:  # runtimes and compilers raise exceptions of any type
            if is_device_lost(error):
                raise
            self.fail(label, summarize_error(error))
            if is_out_of_memory(error) and self.device.is_cuda:
                torch.cuda.empty_cache()

    def fail(self, label: str, reason: str) -> None:
        """Keep the reason for which something was not measured."""
        self._failures.append(f"{label}: {reason[:_MAX_ERROR_CHARACTERS]}")

    def notes(self) -> Iterator[Note]:
        """Yield what failed or was skipped since the last call."""
        if self._failures:
            yield Note(f"Not measured because of errors: {'; '.join(self._failures)}.")
        if self._skipped:
            yield Note(f"Not measured for lack of time: {'; '.join(self._skipped)}.")
        self._failures, self._skipped = [], []

    def best(self, model: str, runtime: str, rows: int) -> float:
        """Return the seconds of a step in the faster launch; NaN without a measurement."""
        times = [self.steps.get((Series(model, runtime, launch), rows), math.nan) for launch in LAUNCHES]
        return min((seconds for seconds in times if not math.isnan(seconds)), default=math.nan)

    def table(self, name: str, title: str, series: Sequence[Series], rows: Sequence[int]) -> Table:
        """Return the times of some series in microseconds, without the series that have none."""
        return _table(name, title, self.steps, series, rows)

    def host_table(self, name: str, title: str, series: Sequence[Series], rows: Sequence[int]) -> Table:
        """Return the host times of some series in microseconds, without the series that have none."""
        return _table(name, title, self.host, series, rows)

    def write(self, directory: Path) -> None:
        """Write all measurements to the file step-time.csv."""
        columns = ("model", "runtime", "launch", "precision", "rows", "step µs", "host µs", "peak bytes")
        cells = [
            (
                *(series.model, series.runtime, series.launch, series.precision, str(rows)),
                *(f"{MICROSECONDS * seconds:.3f}" for seconds in (step, self.host[series, rows])),
                str(self.peaks.get((series, rows), "")),
            )
            for (series, rows), step in self.steps.items()
        ]
        write_csv(Table("step-time", "", columns, cells), directory)


def _table(
    name: str,
    title: str,
    measured: dict[tuple[Series, int], float],
    series: Sequence[Series],
    rows: Sequence[int],
) -> Table:
    columns = ("model", "runtime", "launch", "precision", *map(str, rows))
    cells = [
        (
            *(entry.model, entry.runtime, entry.launch, entry.precision),
            *(format_number(MICROSECONDS * measured.get((entry, count), math.nan)) for count in rows),
        )
        for entry in series
        if any((entry, count) in measured for count in rows)
    ]
    return Table(name, title, columns, cells)
