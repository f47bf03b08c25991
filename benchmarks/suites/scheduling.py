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
from benchmarks.spread import milliseconds, percentile, ratio, short, spread
from benchmarks.suites.base import Bench

MODES = ("step", "request", "none")
LOADS = (0.3, 0.6, 0.9)
CHAINS, CHAIN_STEPS = 512, 400

TEXT = """\
Three servers with `--scheduling step`, `request` and `none` get the same Poisson arrivals in turns. Request
batching is that of servers whose unit is a call: a batch keeps its width to the end of its longest row, and
is answered then. Capacity is what step batching makes of a burst of such requests, all due at once; the
loads are shares of it. A latency counts from when its request was due. *Mixed steps* is diffusion with 5 to
50 steps, *mixed families* adds PixelCNN (64 steps), MALA chains (10 to 100) and text (16 to 128 tokens);
one request in four has 4 rows, the others 1. The targets at 60 %: p50 and p99 at most a third of request
batching's; a burst drained 1.3 times as fast."""


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
WORKLOADS: dict[str, Sequence[Kind]] = {
    "mixed steps": (DIFFUSION,),
    "mixed families": (
        DIFFUSION,
        Kind(artifacts.PIXELCNN),
        Kind(artifacts.EBM, "steps", (10, 30, 100)),
        Kind(artifacts.LSTM, "tokens", (16, 64, 128)),
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What one server made of one run of arrivals."""

    observed: Observed
    rows_per_step: float


def run(bench: Bench) -> Section:
    """Measure bursts, then arrivals at shares of the capacity, then single steps among chains."""
    workloads = {name: WORKLOADS[name] for name in list(WORKLOADS)[: 1 if bench.is_quick else None]}
    shown = {artifacts.EBM} | {kind.model for kinds in workloads.values() for kind in kinds}
    models = bench.models(*sorted(shown))
    tables, plots = [], []
    with _servers(models, MODES[: 2 if bench.is_quick else None]) as servers:
        for name, kinds in workloads.items():
            capacity, table = _bursts(bench, name, kinds, servers)
            outcomes = _loads(bench, kinds, capacity, servers)
            tables += [table, _latencies(name, outcomes)]
            if len(kinds) > 1:
                tables.append(_by_kind(name, kinds, outcomes))
            plots.append(_plot(name, outcomes))
        tables.append(_among_chains(bench, servers["step"]))
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
    with samovar_server(models, "--scheduling", mode, "--threads", "1") as server:
        yield server


def _bursts(
    bench: Bench, name: str, kinds: Sequence[Kind], servers: dict[str, Server]
) -> tuple[float, Table]:
    """Requests per second of bursts, and step batching's capacity."""
    rates: dict[str, list[float]] = {mode: [] for mode in servers}
    count = int(bench.either(30, 100))
    for repeat in range(1 if bench.is_quick else 3):
        burst = arrivals(kinds, [0.0] * count, repeat)
        for mode, server in servers.items():
            rates[mode].append(bench.callers.open(server.address, burst).rate)
    columns = ("scheduling", "requests/s", "step over it")
    rows = [(mode, str(spread(rates[mode])), str(ratio(rates["step"], rates[mode]))) for mode in servers]
    return float(np.median(rates["step"])), Table(columns, rows, f"{name}: bursts of {count} requests")


def _loads(
    bench: Bench, kinds: Sequence[Kind], capacity: float, servers: dict[str, Server]
) -> dict[float, dict[str, Outcome]]:
    loads = LOADS[1:2] if bench.is_quick else LOADS
    seconds = bench.either(0.5, 4.0)
    outcomes = {}
    for load in loads:
        rate = load * capacity
        times = poisson(rate, max(10, round(rate * seconds)), np.random.default_rng(1))
        due = arrivals(kinds, times, seed=2)
        outcomes[load] = {mode: _outcome(bench, server, due) for mode, server in servers.items()}
    return outcomes


def _outcome(bench: Bench, server: Server, due: Sequence[Arrival]) -> Outcome:
    rows, steps = server.metric("samovar_step_rows_sum"), server.metric("samovar_steps_total")
    observed = bench.callers.open(server.address, due)
    rows, steps = server.metric("samovar_step_rows_sum") - rows, server.metric("samovar_steps_total") - steps
    return Outcome(observed, rows / steps)


def _latencies(name: str, outcomes: dict[float, dict[str, Outcome]]) -> Table:
    rows = []
    for load, by_mode in outcomes.items():
        base = by_mode["request"].observed.latencies
        for mode, outcome in by_mode.items():
            latencies = outcome.observed.latencies
            percentiles = [percentile(latencies, percent) for percent in (50, 95, 99)]
            of_request = [percentile(latencies, each) / percentile(base, each) for each in (50, 99)]
            rows.append(
                (
                    f"{100 * load:.0f} %",
                    mode,
                    str(len(latencies)),
                    *map(milliseconds, percentiles),
                    " and ".join(map(short, of_request)),
                    short(outcome.observed.rate),
                    short(outcome.rows_per_step),
                )
            )
    columns = ["load", "scheduling", "requests", "p50 ms", "p95 ms", "p99 ms"]
    columns += ["p50 and p99 over request's", "requests/s", "rows a step"]
    return Table(columns, rows, f"{name}: Poisson arrivals")


def _by_kind(name: str, kinds: Sequence[Kind], outcomes: dict[float, dict[str, Outcome]]) -> Table:
    """Who waits: latencies of each model's requests at the middle load."""
    load = LOADS[1]
    rows = [
        (mode, kind.model, *(milliseconds(percentile(of_kind, percent)) for percent in (50, 95, 99)))
        for mode, outcome in outcomes[load].items()
        for kind in kinds
        if len(of_kind := outcome.observed.of(kind.model))
    ]
    columns = ("scheduling", "model", "p50 ms", "p95 ms", "p99 ms")
    return Table(columns, rows, f"{name}: who waits at {100 * load:.0f} %")


def _plot(name: str, outcomes: dict[float, dict[str, Outcome]]) -> Plot:
    loads = [100 * load for load in outcomes]
    lines = [
        Line(
            f"{mode}, p{percent}",
            loads,
            [1000 * percentile(outcomes[load][mode].observed.latencies, percent) for load in outcomes],
        )
        for mode in next(iter(outcomes.values()))
        for percent in (50, 99)
    ]
    file = f"scheduling-{name.replace(' ', '-')}"
    return Plot(file, f"Latency, {name}", "load, % of capacity", "milliseconds", lines, is_log_x=False)


def _among_chains(bench: Bench, server: Server) -> Table:
    """One-step requests alone, and while a large batch job runs chains of many steps in the same program."""
    count = int(bench.either(20, 200))
    gap = bench.either(0.05, 0.1)
    probes = [Arrival(0.2 + gap * i, "one step", artifacts.EBM, 1, i, {"steps": 1}) for i in range(count)]
    alone = bench.callers.open(server.address, probes).of("one step")
    number = int(bench.either(CHAINS / 4, CHAINS))
    chains = [Arrival(0.0, "chain", artifacts.EBM, number, 1, {"steps": CHAIN_STEPS})]
    seconds, steps = server.metric("samovar_step_duration_seconds_sum"), server.metric("samovar_steps_total")
    among = bench.callers.open(server.address, [*chains, *probes]).of("one step")
    seconds = server.metric("samovar_step_duration_seconds_sum") - seconds
    step = seconds / (server.metric("samovar_steps_total") - steps)
    rows = [
        (name, *(milliseconds(percentile(each, percent)) for percent in (50, 95, 99)))
        for name, each in (("alone", alone), ("among chains", among))
    ]
    extra = (percentile(among, 99) - percentile(alone, 99)) / step
    rows.append(("step time, mean", milliseconds(step), "", ""))
    rows.append(("p99 among − p99 alone, in steps (target 3)", "", "", short(extra)))
    title = (
        f"One-step requests while a job of {number} chains of {CHAIN_STEPS} steps runs in the same program"
    )
    return Table(("", "p50 ms", "p95 ms", "p99 ms"), rows, title)
