"""Rows from random traffic against the same rows alone, byte by byte."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

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
CANCELLED_SHARE = 0.15
PATIENCE_SECONDS = (0.02, 2.0)
WASTED = "samovar_discarded_row_steps_total"

TEXT = """\
Requests of 1 to 24 rows with programs, lengths and seeds drawn by chance arrive faster than they can be
served, so that rows of all kinds ride together. Some are cancelled after a time drawn by chance, many of them
while their rows are in the batch: it is their neighbours' bytes that are compared. A second server process
gets each request that was not cancelled alone, split in two at a place drawn by chance. The target: every
row's bytes are the same."""


def run(bench: Bench) -> Section:
    """Draw traffic, run it twice, compare; then less of it in a second format."""
    kinds = bench.enough(KINDS)
    rows = compare(bench, kinds, "onnx", int(bench.either(120, 10_000)))
    if not bench.is_quick:
        rows += compare(bench, kinds, "torchscript", 400)
    columns = ("format", "model", "rows", "byte-equal", "requests cancelled", "row steps wasted by them")
    return Section("Determinism", TEXT, (Table(columns, rows),))


def compare(bench: Bench, kinds: Sequence[Kind], form: str, number: int) -> list[tuple[str, ...]]:
    """Rows, those that came out the same, and requests that were cancelled, by model and in all."""
    models = bench.models(*(kind.model for kind in kinds), formats=(form,))
    traffic = draw(number, kinds)
    with samovar_server(models, "--intra-op-threads", "1") as server:
        together = bench.callers.open(server.address, traffic, keep=True)
        wasted = f"{server.metric(WASTED):,.0f}"
    with samovar_server(models, "--intra-op-threads", "1") as server:
        alone = bench.callers.one_by_one(server.address, split(staying(traffic)))
    equal = same(traffic, together, alone)
    rows = [(form, kind.model, *_counts(traffic, together, equal, kind.model), "") for kind in kinds]
    return [*rows, (form, "all", *_counts(traffic, together, equal), wasted)]


def _counts(
    traffic: Sequence[Arrival], together: Observed, equal: Mapping[int, int], model: str = ""
) -> tuple[str, ...]:
    chosen = [index for index, arrival in enumerate(traffic) if model in ("", arrival.model)]
    rows = sum(traffic[index].rows for index in chosen if index in equal)
    same_rows = sum(equal.get(index, 0) for index in chosen)
    cancelled = sum(index not in equal and not together.outputs[index] for index in chosen)
    return f"{rows:,}", f"{same_rows:,}", f"{cancelled:,}"


def draw(rows: int, kinds: Sequence[Kind] = KINDS, seed: int = 0) -> list[Arrival]:
    """Requests that stay, of so many rows in all and perhaps a few more, among others that are cancelled."""
    random = np.random.default_rng(seed)
    times = poisson(REQUESTS_A_SECOND, 2 * rows, random)
    traffic: list[Arrival] = []
    while sum(arrival.rows for arrival in staying(traffic)) < rows:
        kind = kinds[int(random.integers(len(kinds)))]
        one = kind.arrival(times[len(traffic)], int(random.integers(2**32)), random)
        count, first = int(random.integers(1, MOST_ROWS + 1)), int(random.integers(1000))
        patience = random.uniform(*PATIENCE_SECONDS) if random.random() < CANCELLED_SHARE else None
        traffic.append(replace(one, rows=count, first_row=first, patience=patience))
    return traffic


def staying(traffic: Sequence[Arrival]) -> list[Arrival]:
    """The requests that are not cancelled."""
    return [arrival for arrival in traffic if arrival.patience is None]


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


def same(traffic: Sequence[Arrival], together: Observed, alone: Observed) -> dict[int, int]:
    """How many rows of each request that stayed came out the same, by its place in the traffic."""
    places = [place for place, arrival in enumerate(traffic) if arrival.patience is None]
    halves = zip(alone.outputs[::2], alone.outputs[1::2], strict=True)
    return {
        place: _same_rows(traffic[place].rows, together.outputs[place], first + second)
        for place, (first, second) in zip(places, halves, strict=True)
    }


def _same_rows(rows: int, one: bytes, other: bytes) -> int:
    if not one or len(one) != len(other):
        return 0
    size = len(one) // rows
    return sum(
        one[row * size : (row + 1) * size] == other[row * size : (row + 1) * size] for row in range(rows)
    )
