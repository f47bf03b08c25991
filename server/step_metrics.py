"""Turns of programs, tallied in plain numbers and made into Prometheus series when somebody asks.

There are thousands of turns a second, all taken by one thread, and the library's own series
would cost each of them a twentieth of a small step. Whoever asks meanwhile may miss the last turn.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core.spec import ProgramKey

_SECONDS = tuple(0.00005 * 2**exponent for exponent in range(17))
_ROWS = tuple(float(2**exponent) for exponent in range(10))
_LABELS = ("model", "operation", "format")


@dataclass
class Distribution:
    """How many values fell into each bucket, the last of which has no bound, and what they come to."""

    bounds: Sequence[float]
    total: float = 0.0
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.total += value
        self.counts[bisect_left(self.bounds, value)] += 1

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """Values up to each bound."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


@dataclass
class StepStats:
    """What is counted of one program's turns."""

    steps: int = 0
    padding_rows: int = 0
    seconds: Distribution = field(default_factory=lambda: Distribution(_SECONDS))
    rows: Distribution = field(default_factory=lambda: Distribution(_ROWS))


class StepMetricsCollector(Collector):
    """The tallies of all programs; versions of a model share one."""

    def __init__(self) -> None:
        self._stats: dict[ProgramKey, StepStats] = {}
        self._series: dict[tuple[str, str, str], StepStats] = {}

    def expect(self, program: ProgramKey) -> StepStats:
        """The tally of a program, whose series start at 0, so that rates see their first turn."""
        labels = program.model, program.name, program.format
        if labels not in self._series:
            # As a whole, because it may be read at this moment.
            self._series = {**self._series, labels: StepStats()}
        return self._stats.setdefault(program, self._series[labels])

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """One turn of a program advanced so many rows, padded to a bucket."""
        stats = self._stats.get(program) or self.expect(program)
        stats.steps += 1
        stats.padding_rows += bucket - rows
        stats.seconds.observe(seconds)
        stats.rows.observe(rows)

    def collect(self) -> Iterator[Metric]:
        """The series as they are now."""
        steps = CounterMetricFamily(
            "samovar_steps", "Turns of a program: each advances all its rows.", labels=_LABELS
        )
        padding = CounterMetricFamily(
            "samovar_padding_rows", "Rows computed only to fill a batch.", labels=_LABELS
        )
        seconds = HistogramMetricFamily(
            "samovar_step_duration_seconds", "Time of one turn of a program.", labels=_LABELS
        )
        rows = HistogramMetricFamily("samovar_step_rows", "Rows that shared a turn.", labels=_LABELS)
        for labels, stats in self._series.items():
            steps.add_metric(labels, stats.steps)
            padding.add_metric(labels, stats.padding_rows)
            seconds.add_metric(labels, stats.seconds.buckets, stats.seconds.total)
            rows.add_metric(labels, stats.rows.buckets, stats.rows.total)
        yield from (steps, padding, seconds, rows)
