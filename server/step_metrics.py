"""Prometheus metrics of steps, counted as plain numbers and converted to series when they are scraped.

One thread executes thousands of steps a second. An update of the library's own series takes about a twentieth
of a small step. A concurrent scrape may miss the latest step.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core.spec import ProgramKey

# Upper bounds of buckets: 50 microseconds to 3.3 s, and 1 to 512 rows.
_SECONDS = tuple(0.00005 * 2**exponent for exponent in range(17))
_ROWS = tuple(float(2**exponent) for exponent in range(10))
_LABELS = ("model", "operation", "format")


@dataclass
class Distribution:
    """Histogram: the number of values in each bucket, and the sum of the values.

    Attributes:
        bounds: inclusive upper bounds of the buckets; one more bucket has no bound.
        total: sum of the values.
        counts: number of values in each bucket.
    """

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
        """Cumulative counts by upper bound, as Prometheus expects them."""
        names = [*map(str, self.bounds), "+Inf"]
        return list(zip(names, map(float, accumulate(self.counts)), strict=True))


@dataclass
class StepStats:
    """Statistics of the steps of one program; `seconds` and `rows` are distributions over steps."""

    steps: int = 0
    padding_rows: int = 0
    seconds: Distribution = field(default_factory=lambda: Distribution(_SECONDS))
    rows: Distribution = field(default_factory=lambda: Distribution(_ROWS))


class StepMetricsCollector(Collector):
    """Statistics of all programs; the versions of a model share one series."""

    def __init__(self) -> None:
        self._stats: dict[ProgramKey, StepStats] = {}
        self._series: dict[tuple[str, str, str], StepStats] = {}

    def expect(self, program: ProgramKey) -> StepStats:
        """Return the statistics of a program. New series start at 0, so that rates include the first step."""
        labels = program.model, program.name, program.format
        if labels not in self._series:
            # Replaced, not modified, because another thread may iterate over it in `collect`.
            self._series = {**self._series, labels: StepStats()}
        return self._stats.setdefault(program, self._series[labels])

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """Count a step of `rows` rows, padded to `bucket` rows, that took `seconds`."""
        stats = self._stats.get(program) or self.expect(program)
        stats.steps += 1
        stats.padding_rows += bucket - rows
        stats.seconds.observe(seconds)
        stats.rows.observe(rows)

    def collect(self) -> Iterator[Metric]:
        """Yield the series with their current values."""
        steps = CounterMetricFamily(
            "samovar_steps", "Steps of a program; a step advances all rows of a batch.", labels=_LABELS
        )
        padding = CounterMetricFamily(
            "samovar_padding_rows", "Rows computed only to pad batches to a bucket size.", labels=_LABELS
        )
        seconds = HistogramMetricFamily(
            "samovar_step_duration_seconds", "Seconds of one step.", labels=_LABELS
        )
        rows = HistogramMetricFamily(
            "samovar_step_rows", "Rows of one step, without padding.", labels=_LABELS
        )
        for labels, stats in self._series.items():
            steps.add_metric(labels, stats.steps)
            padding.add_metric(labels, stats.padding_rows)
            seconds.add_metric(labels, stats.seconds.buckets, stats.seconds.total)
            rows.add_metric(labels, stats.rows.buckets, stats.rows.total)
        yield from (steps, padding, seconds, rows)
