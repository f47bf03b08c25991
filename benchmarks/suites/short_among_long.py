"""Latency of requests of one step while long requests of the same program run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import artifacts
from benchmarks.load import OpenLoopRequest
from benchmarks.report import Result, Table
from benchmarks.servers import Server
from benchmarks.statistics import LATENCY_COLUMNS, Floats, latency_cells, percentile_of_each, spread
from benchmarks.suites.base import Bench
from samovar._messages import Priority

NAME = "scheduling-short-among-long"
EXTRA_COLUMN = "p99 − p99 alone, in steps"
LONG_STEPS = 400
SHORT = "one step"
NUM_SHORT = 150
GAP_SECONDS = 0.04
# In units of the duration of the long requests: short requests are due from START to END, and the long ones
# start again after PERIOD.
START, END, PERIOD = 0.1, 0.8, 1.5


@dataclass(frozen=True)
class LongRequests:
    """Concurrent requests of LONG_STEPS steps: `requests` requests of `rows` rows each."""

    title: str
    requests: int
    rows: int
    priority: Priority = "interactive"

    def at(self, seconds: float) -> list[OpenLoopRequest]:
        """Return the requests, all due at the same time."""
        parameters = {"steps": LONG_STEPS}
        request = OpenLoopRequest(
            seconds, "long", artifacts.EBM, self.rows, 0, parameters, priority=self.priority
        )
        return [replace(request, seed=seed) for seed in range(self.requests)]


LONG_REQUESTS = (
    LongRequests("a batch job of 512 chains", 1, 512, "batch"),
    LongRequests("an interactive request of 64 chains", 1, 64),
    LongRequests("64 interactive requests of one chain", 64, 1),
)


@dataclass(frozen=True)
class Sample:
    """Latencies of the short requests, and the mean duration of a step of the server, in seconds."""

    latencies: Floats
    step_seconds: float


def measure(
    bench: Bench,
    server: Server,
    long_requests: Sequence[LongRequests] = LONG_REQUESTS,
    num_short: int = NUM_SHORT,
) -> Table:
    """Measure the short requests alone and next to each kind of long requests."""
    loads = {"alone": [_short_request(GAP_SECONDS * index, index) for index in range(num_short)]}
    for long in long_requests:
        duration = bench.clients.run_open(server.address, long.at(0.0)).seconds
        loads[f"next to {long.title}"] = mix(long, duration, num_short)
    samples: dict[str, list[Sample]] = {name: [] for name in loads}
    for _ in range(bench.few_repeats):
        for name, requests in loads.items():
            samples[name].append(_measure(bench, server, requests))
    rows = [_row(name, repeats, samples["alone"]) for name, repeats in samples.items()]
    columns = ("load", *LATENCY_COLUMNS, "step ms", EXTRA_COLUMN)
    title = f"requests of one step next to requests of {LONG_STEPS} steps of the same program"
    return Table(NAME, title, columns, rows)


def results(table: Table) -> list[Result]:
    """Return the delay next to each kind of long requests."""
    return [
        Result(f"one step {row[0]}: p99 − p99 alone, in steps", table.cell(EXTRA_COLUMN, row[0]), "≤ 3")
        for row in table.rows
        if row[0] != "alone"
    ]


def mix(long: LongRequests, duration: float, num_short: int) -> list[OpenLoopRequest]:
    """Return at least `num_short` short requests that are due while the long ones run.

    Args:
        long: the long requests; they are repeated until there are enough short ones.
        duration: seconds that the long requests take.
        num_short: number of short requests.
    """
    window = (END - START) * duration
    per_period = max(1, min(num_short, int(window / GAP_SECONDS)))
    requests = []
    for period in range(math.ceil(num_short / per_period)):
        start = period * PERIOD * duration
        requests += long.at(start)
        requests += [
            _short_request(start + START * duration + window * index / per_period, index)
            for index in range(per_period)
        ]
    return requests


def _short_request(at: float, seed: int) -> OpenLoopRequest:
    return OpenLoopRequest(at, SHORT, artifacts.EBM, 1, seed, {"steps": 1})


def _measure(bench: Bench, server: Server, requests: Sequence[OpenLoopRequest]) -> Sample:
    seconds, steps = server.step_metrics()
    latencies = bench.clients.run_open(server.address, requests).latencies_of(SHORT)
    later_seconds, later_steps = server.step_metrics()
    return Sample(latencies, (later_seconds - seconds) / (later_steps - steps))


def _row(name: str, samples: list[Sample], alone: list[Sample]) -> tuple[str, ...]:
    latencies, latencies_alone = ([sample.latencies for sample in side] for side in (samples, alone))
    p99s = zip(
        percentile_of_each(latencies, 99), percentile_of_each(latencies_alone, 99), samples, strict=True
    )
    extra_steps = spread([(p99 - p99_alone) / sample.step_seconds for p99, p99_alone, sample in p99s])
    step = spread([1000 * sample.step_seconds for sample in samples])
    return name, *latency_cells(latencies), str(step), "" if samples is alone else str(extra_steps)
