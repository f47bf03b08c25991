"""Step batching compared with request batching and no batching, on the same artifacts and arrivals."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import artifacts
from benchmarks.load import LoadResult, OpenLoopRequest, poisson
from benchmarks.report import Line, Plot, Result, Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import LATENCY_COLUMNS, latency_cells, percentile_of_each, ratio, spread
from benchmarks.suites import short_among_long
from benchmarks.suites.base import Bench

MODES = ("step", "request", "none")
LOADS = (0.3, 0.6, 0.9)
TARGET_LOAD = 0.6

TEXT = """\
Three servers get the same requests, one server after the other:

* *step*: continuous batching, as Samovar does it. Rows enter and leave the batch at every step.
* *request*: request-level batching (Orca, OSDI 2022). A batch keeps its width until its longest row is done,
  and all its requests are answered then.
* *none*: one request at a time.

Capacity is the rate at which step batching completes a burst of requests that are all due at once. Loads are
fractions of it, with Poisson arrivals. The latency of a request counts from the time at which it was due.
*Mixed steps* is diffusion with 5 to 50 steps; *mixed families* adds PixelCNN (64 steps), MALA chains (10 to
100 steps) and text (16 to 128 tokens). One request in four has 4 rows, the others have 1. Bursts, arrivals at
60 % and requests of one step are measured three times with different arrivals, those at 30 and 90 % once."""


@dataclass(frozen=True)
class Kind:
    """Requests for one model, with a parameter drawn from a few values."""

    model: str
    parameter: str = ""
    choices: Sequence[int] = (0,)

    def request(self, at: float, seed: int, random: np.random.Generator) -> OpenLoopRequest:
        """Draw a request that is due `at` seconds after the start."""
        value = int(random.choice(self.choices))
        parameters = {self.parameter: value} if self.parameter else {}
        rows = int(random.choice((1, 1, 1, 4)))
        return OpenLoopRequest(at, self.model, self.model, rows, seed, parameters)


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
    """Load result of one server, and the mean number of rows in its steps."""

    load: LoadResult
    rows_per_step: float


# The outcomes of all repeats, by load and batching mode.
Outcomes = dict[float, dict[str, list[Outcome]]]


def run(bench: Bench) -> Section:
    """Measure bursts, Poisson arrivals, and requests of one step next to long ones."""
    workloads = QUICK_WORKLOADS if bench.is_quick else WORKLOADS
    models = bench.models(*sorted({kind.model for kinds in workloads.values() for kind in kinds}))
    tables, plots = [], []
    with _start_servers(models, MODES[: 2 if bench.is_quick else None]) as servers:
        for name, kinds in workloads.items():
            workload, outcomes = measure_workload(bench, name, kinds, servers)
            tables += workload
            if len(kinds) > 1:
                tables.append(_model_table(name, kinds, outcomes[TARGET_LOAD]))
            plots.append(_plot(name, outcomes))
        if not bench.is_quick:
            tables.append(short_among_long.measure(bench, servers["step"]))
    return Section("Scheduling", TEXT, results(tables), tables, plots)


def results(tables: Sequence[Table]) -> list[Result]:
    """Return the deciding figures of the tables of this benchmark."""
    found = []
    for table in tables:
        workload = table.title.partition(":")[0]
        if table.name.endswith("bursts"):
            speedup = table.cell("step / this mode", "request")
            found.append(Result(f"{workload}: burst throughput, step / request batching", speedup, "≥ 1.3"))
        if table.name.endswith("arrivals"):
            for percent in (50, 99):
                quotient = table.cell(f"p{percent} / request batching", "60 %", "step")
                metric = f"{workload}: p{percent} at 60 % load, step / request batching"
                found.append(Result(metric, quotient, "≤ 0.333"))
        if table.name == short_among_long.NAME:
            found += short_among_long.results(table)
    return found


def draw_requests(kinds: Sequence[Kind], times: Sequence[float], seed: int) -> list[OpenLoopRequest]:
    """Draw a request of a random kind for each time."""
    random = np.random.default_rng(seed)
    return [
        kinds[int(random.integers(len(kinds)))].request(time, index, random)
        for index, time in enumerate(times)
    ]


@contextmanager
def _start_servers(models: Path, modes: Sequence[str]) -> Iterator[dict[str, Server]]:
    with ExitStack() as stack:
        yield {
            mode: stack.enter_context(samovar_server(models, "--intra-op-threads", "1", batching=mode))
            for mode in modes
        }


def measure_workload(
    bench: Bench, name: str, kinds: Sequence[Kind], servers: dict[str, Server], loads: Sequence[float] = LOADS
) -> tuple[list[Table], Outcomes]:
    """Measure bursts and Poisson arrivals; return their tables, and the outcomes of the arrivals by load."""
    capacity, bursts = _measure_bursts(bench, name, kinds, servers)
    outcomes = _measure_loads(bench, kinds, capacity, servers, loads)
    return [bursts, _latency_table(name, outcomes)], outcomes


def _measure_bursts(
    bench: Bench, name: str, kinds: Sequence[Kind], servers: dict[str, Server]
) -> tuple[float, Table]:
    """Return the capacity in requests per second, and the table of bursts."""
    rates: dict[str, list[float]] = {mode: [] for mode in servers}
    count = int(bench.scale(30, 100))
    for repeat in range(bench.few_repeats):
        burst = draw_requests(kinds, [0.0] * count, repeat)
        for mode, server in servers.items():
            rates[mode].append(bench.clients.run_open(server.address, burst).rate)
    columns = ("batching", "requests/s", "step / this mode")
    rows = [(mode, str(spread(rates[mode])), str(ratio(rates["step"], rates[mode]))) for mode in servers]
    table = Table(f"{_slug(name)}-bursts", f"{name}: bursts of {count} requests", columns, rows)
    return float(np.median(rates["step"])), table


def _measure_loads(
    bench: Bench, kinds: Sequence[Kind], capacity: float, servers: dict[str, Server], loads: Sequence[float]
) -> Outcomes:
    loads = (TARGET_LOAD,) if bench.is_quick else loads
    seconds = bench.scale(0.5, 3.5)
    outcomes: Outcomes = {load: {mode: [] for mode in servers} for load in loads}
    for load in loads:
        for repeat in range(bench.few_repeats if load == TARGET_LOAD else 1):
            requests = _poisson_requests(kinds, load * capacity, seconds, repeat)
            for mode, server in servers.items():
                outcomes[load][mode].append(_measure(bench, server, requests))
    return outcomes


def _poisson_requests(
    kinds: Sequence[Kind], rate: float, seconds: float, repeat: int
) -> list[OpenLoopRequest]:
    times = poisson(rate, max(10, round(rate * seconds)), np.random.default_rng(repeat))
    return draw_requests(kinds, times, seed=100 + repeat)


def _measure(bench: Bench, server: Server, requests: Sequence[OpenLoopRequest]) -> Outcome:
    rows, steps = server.metric("samovar_step_rows_sum"), server.metric("samovar_steps_total")
    load = bench.clients.run_open(server.address, requests)
    rows, steps = server.metric("samovar_step_rows_sum") - rows, server.metric("samovar_steps_total") - steps
    return Outcome(load, rows / steps)


def _latency_table(name: str, outcomes: Outcomes) -> Table:
    rows = [
        (f"{100 * load:.0f} %", mode, *_latency_row(repeats, by_mode["request"]))
        for load, by_mode in outcomes.items()
        for mode, repeats in by_mode.items()
    ]
    columns = ["load", "batching", "requests", *LATENCY_COLUMNS]
    columns += ["p50 / request batching", "p99 / request batching", "requests/s", "rows per step"]
    return Table(f"{_slug(name)}-arrivals", f"{name}: Poisson arrivals", columns, rows)


def _latency_row(repeats: Sequence[Outcome], request_batching: Sequence[Outcome]) -> list[str]:
    latencies, baseline = (
        [outcome.load.latencies for outcome in side] for side in (repeats, request_batching)
    )
    ratios = [
        ratio(percentile_of_each(latencies, percent), percentile_of_each(baseline, percent))
        for percent in (50, 99)
    ]
    rates = spread([outcome.load.rate for outcome in repeats])
    widths = spread([outcome.rows_per_step for outcome in repeats])
    count = sum(map(len, latencies))
    return [f"{count:,}", *latency_cells(latencies), *map(str, (*ratios, rates, widths))]


def _model_table(name: str, kinds: Sequence[Kind], outcomes: dict[str, list[Outcome]]) -> Table:
    """Return the latencies of the requests of each model at the target load."""
    rows = [
        (
            mode,
            kind.model,
            *latency_cells([outcome.load.latencies_of(kind.model) for outcome in repeats]),
        )
        for mode, repeats in outcomes.items()
        for kind in kinds
    ]
    title = f"{name}: latency of each model at {100 * TARGET_LOAD:.0f} %"
    return Table(f"{_slug(name)}-models", title, ("batching", "model", *LATENCY_COLUMNS), rows)


def _plot(name: str, outcomes: Outcomes) -> Plot:
    def latency(load: float, mode: str, percent: float) -> float:
        repeats = [outcome.load.latencies for outcome in outcomes[load][mode]]
        return 1000 * float(np.median(percentile_of_each(repeats, percent)))

    loads = [100 * load for load in outcomes]
    lines = [
        Line(f"{mode}, p{percent}", loads, [latency(load, mode, percent) for load in outcomes])
        for mode in next(iter(outcomes.values()))
        for percent in (50, 99)
    ]
    return Plot(_slug(name), f"Latency, {name}", "load, % of capacity", "milliseconds", lines, is_log_x=False)


def _slug(name: str) -> str:
    return f"scheduling-{name.replace(' ', '-')}"
