"""Step batching beside request batching and no batching, on the same artifacts and the same arrivals."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import artifacts
from benchmarks.load import Arrival, Observed, poisson
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import LATENCIES, latencies, of_each, ratio, spread
from benchmarks.suites import short_among_long
from benchmarks.suites.base import Bench

MODES = ("step", "request", "none")
LOADS = (0.3, 0.6, 0.9)
TARGET_LOAD = 0.6

TEXT = """\
Three servers with the modes `step`, `request` and `none` of benchmarks.batching get the same Poisson arrivals in turns. Request
batching is that of servers whose unit is a call: a batch keeps its width to the end of its longest row, and
is answered then. Capacity is what step batching makes of a burst of such requests, all due at once; the
loads are shares of it. A latency counts from when its request was due. *Mixed steps* is diffusion with 5 to
50 steps, *mixed families* adds PixelCNN (64 steps), MALA chains (10 to 100) and text (16 to 128 tokens);
one request in four has 4 rows, the others 1. Bursts, the arrivals at 60 %, who waits then, and single steps
among chains are measured three times, with other arrivals each time; those at 30 and 90 % once. The targets
at 60 %: p50 and p99 at most a third of request batching's; a burst drained 1.3 times as fast; the slowest
hundredth of single steps at most 3 steps later among chains than alone."""


@dataclass(frozen=True)
class Kind:
    """Requests of one program whose length is drawn from a few."""

    model: str
    parameter: str = ""
    choices: Sequence[int] = (0,)

    def arrival(self, at: float, seed: int, random: np.random.Generator) -> Arrival:
        chosen = int(random.choice(self.choices))
        parameters = {self.parameter: chosen} if self.parameter else {}
        rows = int(random.choice((1, 1, 1, 4)))
        return Arrival(at, self.model, self.model, rows, seed, parameters)


DIFFUSION = Kind(artifacts.DIFFUSION, "steps", (5, 10, 20, 50))
TEXTS = Kind(artifacts.LSTM, "tokens", (16, 64, 128))
WORKLOADS: dict[str, Sequence[Kind]] = {
    "mixed steps": (DIFFUSION,),
    "mixed families": (
        DIFFUSION,
        Kind(artifacts.PIXELCNN),
        Kind(artifacts.EBM, "steps", (10, 30, 100)),
        TEXTS,
    ),
}
QUICK_WORKLOADS: dict[str, Sequence[Kind]] = {"mixed lengths": (TEXTS,)}


@dataclass(frozen=True)
class Outcome:
    """What one server made of one run of arrivals."""

    observed: Observed
    rows_per_step: float


# By load and mode, one for each repeat.
Outcomes = dict[float, dict[str, list[Outcome]]]


def run(bench: Bench) -> Section:
    """Measure bursts, then arrivals at shares of the capacity, then single steps among chains."""
    workloads = QUICK_WORKLOADS if bench.is_quick else WORKLOADS
    models = bench.models(*sorted({kind.model for kinds in workloads.values() for kind in kinds}))
    tables, plots = [], []
    with _servers(models, MODES[: 2 if bench.is_quick else None]) as servers:
        for name, kinds in workloads.items():
            capacity, table = _bursts(bench, name, kinds, servers)
            outcomes = _loads(bench, kinds, capacity, servers)
            tables += [table, _latencies(name, outcomes)]
            if len(kinds) > 1:
                tables.append(_by_kind(name, kinds, outcomes[TARGET_LOAD]))
            plots.append(_plot(name, outcomes))
        if not bench.is_quick:
            tables.append(short_among_long.table(bench, servers["step"]))
    return Section("Scheduling", TEXT, tables, plots)


def arrivals(kinds: Sequence[Kind], times: Sequence[float], seed: int) -> list[Arrival]:
    """A request for each time, of kinds and lengths drawn with a seed."""
    random = np.random.default_rng(seed)
    return [
        kinds[int(random.integers(len(kinds)))].arrival(time, number, random)
        for number, time in enumerate(times)
    ]


@contextmanager
def _servers(models: Path, modes: Sequence[str]) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {mode: stack.enter_context(_server(models, mode)) for mode in modes}


@contextmanager
def _server(models: Path, mode: str) -> Iterator[Server]:
    with samovar_server(models, "--intra-op-threads", "1", batching=mode) as server:
        yield server


def _bursts(
    bench: Bench, name: str, kinds: Sequence[Kind], servers: dict[str, Server]
) -> tuple[float, Table]:
    """Requests per second of bursts, and step batching's capacity."""
    rates: dict[str, list[float]] = {mode: [] for mode in servers}
    count = int(bench.either(30, 100))
    for repeat in range(bench.few_repeats):
        burst = arrivals(kinds, [0.0] * count, repeat)
        for mode, server in servers.items():
            rates[mode].append(bench.callers.open(server.address, burst).rate)
    columns = ("scheduling", "requests/s", "step over it")
    rows = [(mode, str(spread(rates[mode])), str(ratio(rates["step"], rates[mode]))) for mode in servers]
    return float(np.median(rates["step"])), Table(columns, rows, f"{name}: bursts of {count} requests")


def _loads(bench: Bench, kinds: Sequence[Kind], capacity: float, servers: dict[str, Server]) -> Outcomes:
    loads = (TARGET_LOAD,) if bench.is_quick else LOADS
    seconds = bench.either(0.5, 3.5)
    outcomes: Outcomes = {load: {mode: [] for mode in servers} for load in loads}
    for load in loads:
        for repeat in range(bench.few_repeats if load == TARGET_LOAD else 1):
            due = _poisson(kinds, load * capacity, seconds, repeat)
            for mode, server in servers.items():
                outcomes[load][mode].append(_outcome(bench, server, due))
    return outcomes


def _poisson(kinds: Sequence[Kind], rate: float, seconds: float, repeat: int) -> list[Arrival]:
    times = poisson(rate, max(10, round(rate * seconds)), np.random.default_rng(repeat))
    return arrivals(kinds, times, seed=100 + repeat)


def _outcome(bench: Bench, server: Server, due: Sequence[Arrival]) -> Outcome:
    rows, steps = server.metric("samovar_step_rows_sum"), server.metric("samovar_steps_total")
    observed = bench.callers.open(server.address, due)
    rows, steps = server.metric("samovar_step_rows_sum") - rows, server.metric("samovar_steps_total") - steps
    return Outcome(observed, rows / steps)


def _latencies(name: str, outcomes: Outcomes) -> Table:
    rows = [
        (f"{100 * load:.0f} %", mode, *_figures(repeats, by_mode["request"]))
        for load, by_mode in outcomes.items()
        for mode, repeats in by_mode.items()
    ]
    columns = ["load", "scheduling", "requests", *LATENCIES]
    columns += ["p50 over request's", "p99 over request's", "requests/s", "rows a step"]
    return Table(columns, rows, f"{name}: Poisson arrivals")


def _figures(repeats: Sequence[Outcome], of_request: Sequence[Outcome]) -> list[str]:
    """The cells of one mode at one load."""
    ours, base = ([each.observed.latencies for each in side] for side in (repeats, of_request))
    quotients = [ratio(of_each(ours, percent), of_each(base, percent)) for percent in (50, 99)]
    rates = spread([each.observed.rate for each in repeats])
    widths = spread([each.rows_per_step for each in repeats])
    number = sum(map(len, ours))
    return [f"{number:,}", *latencies(ours), *map(str, (*quotients, rates, widths))]


def _by_kind(name: str, kinds: Sequence[Kind], outcomes: dict[str, list[Outcome]]) -> Table:
    """Who waits: latencies of each model's requests at the load that has a target."""
    rows = [
        (mode, kind.model, *latencies([each.observed.of(kind.model) for each in repeats]))
        for mode, repeats in outcomes.items()
        for kind in kinds
    ]
    title = f"{name}: who waits at {100 * TARGET_LOAD:.0f} %"
    return Table(("scheduling", "model", *LATENCIES), rows, title)


def _plot(name: str, outcomes: Outcomes) -> Plot:
    def latency(load: float, mode: str, percent: float) -> float:
        repeats = [outcome.observed.latencies for outcome in outcomes[load][mode]]
        return 1000 * float(np.median(of_each(repeats, percent)))

    loads = [100 * load for load in outcomes]
    lines = [
        Line(f"{mode}, p{percent}", loads, [latency(load, mode, percent) for load in outcomes])
        for mode in next(iter(outcomes.values()))
        for percent in (50, 99)
    ]
    file = f"scheduling-{name.replace(' ', '-')}"
    return Plot(file, f"Latency, {name}", "load, % of capacity", "milliseconds", lines, is_log_x=False)
