"""Rows from random traffic against the same rows alone, byte by byte."""

from collections.abc import Sequence

import numpy as np

from benchmarks import artifacts
from benchmarks.load import Arrival, Observed, poisson
from benchmarks.report import Section, Table
from benchmarks.servers import samovar_server
from benchmarks.suites.base import Bench
from benchmarks.suites.scheduling import Kind

KINDS = (
    Kind(artifacts.DIFFUSION, "steps", (2, 5, 10)),
    Kind(artifacts.EBM, "steps", (1, 10, 30)),
    Kind(artifacts.LSTM, "tokens", (8, 32)),
    Kind(artifacts.PIXELCNN),
)
MOST_ROWS = 24
REQUESTS_A_SECOND = 60.0

TEXT = """\
Requests of 1 to 24 rows with programs, lengths and seeds drawn by chance arrive faster than they can be
served, so that rows of all kinds ride together. Then a second server process gets each request alone, split
in two at a place drawn by chance. The target: every row's bytes are the same."""


def run(bench: Bench) -> Section:
    """Draw traffic, run it twice, compare."""
    kinds = KINDS[: 1 if bench.is_quick else None]
    models = bench.models(*(kind.model for kind in kinds))
    traffic = draw(int(bench.either(120, 10_000)), kinds)
    with samovar_server(models, "--threads", "1") as server:
        together = bench.callers.open(server.address, traffic, keep=True)
    with samovar_server(models, "--threads", "1") as server:
        alone = bench.callers.one_by_one(server.address, split(traffic))
    rows = []
    for kind in kinds:
        chosen = [index for index, arrival in enumerate(traffic) if arrival.model == kind.model]
        total = sum(traffic[index].rows for index in chosen)
        rows.append((kind.model, f"{total:,}", f"{sum(same(traffic, together, alone, i) for i in chosen):,}"))
    everything = sum(arrival.rows for arrival in traffic)
    equal = sum(same(traffic, together, alone, index) for index in range(len(traffic)))
    rows.append(("all", f"{everything:,}", f"{equal:,}"))
    return Section("Determinism", TEXT, (Table(("model", "rows", "byte-equal"), rows),))


def draw(rows: int, kinds: Sequence[Kind] = KINDS, seed: int = 0) -> list[Arrival]:
    """Requests of so many rows in all, and perhaps a few more."""
    random = np.random.default_rng(seed)
    times = poisson(REQUESTS_A_SECOND, rows, random)
    traffic: list[Arrival] = []
    while sum(arrival.rows for arrival in traffic) < rows:
        kind = kinds[int(random.integers(len(kinds)))]
        one = kind.arrival(times[len(traffic)], int(random.integers(2**32)), random)
        count, first = int(random.integers(1, MOST_ROWS + 1)), int(random.integers(1000))
        traffic.append(Arrival(one.at, one.kind, one.model, count, one.seed, one.parameters, first))
    return traffic


def split(traffic: list[Arrival], seed: int = 1) -> list[Arrival]:
    """Every request as two, cut at a place drawn by chance; the second may have no rows."""
    random = np.random.default_rng(seed)
    parts = []
    for each in traffic:
        place = int(random.integers(0, each.rows)) + 1
        common = (each.at, each.kind, each.model)
        parts.append(Arrival(*common, place, each.seed, each.parameters, each.first_row))
        parts.append(Arrival(*common, each.rows - place, each.seed, each.parameters, each.first_row + place))
    return parts


def same(traffic: list[Arrival], together: Observed, alone: Observed, index: int) -> int:
    """How many rows of a request came out the same."""
    rows, one = traffic[index].rows, together.outputs[index]
    other = alone.outputs[2 * index] + alone.outputs[2 * index + 1]
    if not one or len(one) != len(other):
        return 0
    size = len(one) // rows
    return sum(
        one[row * size : (row + 1) * size] == other[row * size : (row + 1) * size] for row in range(rows)
    )
