"""Requests of one step among long chains in the same program: do they wait for a step, or for a chain?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import artifacts
from benchmarks.load import Arrival
from benchmarks.report import Table
from benchmarks.servers import Server
from benchmarks.statistics import LATENCIES, Floats, latencies, of_each, spread
from benchmarks.suites.base import Bench
from samovar._messages import Priority

CHAIN_STEPS = 400
SINGLE = "one step"
SINGLES = 150
GAP_SECONDS = 0.04
# Single steps come due while the chains are in full swing, and chains again when the last ones are done.
FROM, TO, AGAIN = 0.1, 0.8, 1.5


@dataclass(frozen=True)
class Chains:
    """What a server is busy with: so many requests of so many rows, of 400 steps each."""

    title: str
    requests: int
    rows: int
    priority: Priority = "interactive"

    def arrivals(self, at: float) -> list[Arrival]:
        first = Arrival(
            at, "chain", artifacts.EBM, self.rows, 0, {"steps": CHAIN_STEPS}, priority=self.priority
        )
        return [replace(first, seed=seed) for seed in range(self.requests)]


NEIGHBOURS = (
    Chains("a batch job of 512 chains", 1, 512, "batch"),
    Chains("an interactive request of 64 chains", 1, 64),
    Chains("64 interactive requests of a chain each", 64, 1),
)


@dataclass(frozen=True)
class Sample:
    """Latencies of single steps, and the mean seconds of the server's steps meanwhile."""

    latencies: Floats
    step: float


def table(
    bench: Bench, server: Server, neighbours: Sequence[Chains] = NEIGHBOURS, number: int = SINGLES
) -> Table:
    """So many single steps alone and among each kind of chains, in turns."""
    alone = [Arrival(GAP_SECONDS * i, SINGLE, artifacts.EBM, 1, i, {"steps": 1}) for i in range(number)]
    loads = {"alone": alone}
    for chains in neighbours:
        length = bench.callers.open(server.address, chains.arrivals(0.0)).seconds
        loads[f"among {chains.title}"] = among(chains, length, number)
    samples: dict[str, list[Sample]] = {name: [] for name in loads}
    for _ in range(bench.few_repeats):
        for name, due in loads.items():
            samples[name].append(_measure(bench, server, due))
    rows = [_row(name, each, samples["alone"]) for name, each in samples.items()]
    columns = ("", *LATENCIES, "step ms", "p99 − p99 alone, in steps (target 3)")
    return Table(columns, rows, f"Requests of one step among chains of {CHAIN_STEPS} in the same program")


def among(chains: Chains, length: float, number: int) -> list[Arrival]:
    """So many single steps while chains that take so long are under way, which come again and again."""
    window = (TO - FROM) * length
    at_once = max(1, min(number, int(window / GAP_SECONDS)))
    due = []
    for turn in range(math.ceil(number / at_once)):
        start = turn * AGAIN * length
        due += chains.arrivals(start)
        due += [
            Arrival(start + FROM * length + window * i / at_once, SINGLE, artifacts.EBM, 1, i, {"steps": 1})
            for i in range(at_once)
        ]
    return due


def _measure(bench: Bench, server: Server, due: Sequence[Arrival]) -> Sample:
    seconds, steps = _steps(server)
    observed = bench.callers.open(server.address, due).of(SINGLE)
    later_seconds, later_steps = _steps(server)
    return Sample(observed, (later_seconds - seconds) / (later_steps - steps))


def _steps(server: Server) -> tuple[float, float]:
    return server.metric("samovar_step_duration_seconds_sum"), server.metric("samovar_steps_total")


def _row(name: str, samples: list[Sample], alone: list[Sample]) -> tuple[str, ...]:
    observed, before = ([sample.latencies for sample in side] for side in (samples, alone))
    pairs = zip(of_each(observed, 99), of_each(before, 99), samples, strict=True)
    extra = spread([(slowest - usual) / sample.step for slowest, usual, sample in pairs])
    step = spread([1000 * sample.step for sample in samples])
    return name, *latencies(observed), str(step), "" if samples is alone else str(extra)
