"""Rows of random traffic, compared byte by byte with the same rows alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks import artifacts
from benchmarks.load import Clients, LoadResult, OpenLoopRequest, poisson
from benchmarks.report import Result, Section, Table
from benchmarks.servers import samovar_server
from benchmarks.suites.base import Bench
from benchmarks.suites.scheduling import Kind

KINDS = (
    Kind(artifacts.DIFFUSION, "steps", (2, 5, 10)),
    Kind(artifacts.EBM, "steps", (1, 10, 30)),
    Kind(artifacts.LSTM, "tokens", (8, 32)),
    Kind(artifacts.PIXELCNN),
)
MAX_ROWS = 24
REQUESTS_PER_SECOND = 60.0
CANCELLED_SHARE = 0.15
CANCEL_AFTER_SECONDS = (0.02, 2.0)
DISCARDED_STEPS = "samovar_discarded_row_steps_total"

TEXT = """\
Requests of 1 to 24 rows with random programs, lengths and seeds arrive faster than the server completes them,
so batches mix rows of all requests. Some requests are cancelled after a random time, many of them while their
rows are in a batch; the rows of the others are compared. A second server gets each request that was not
cancelled alone, split in two at a random row. The bytes of every row must be the same."""


def run(bench: Bench) -> Section:
    """Compare random traffic in ONNX, and less of it in TorchScript."""
    kinds = bench.select_cases(KINDS)
    rows = compare(bench, kinds, "onnx", int(bench.scale(120, 10_000)))
    if not bench.is_quick:
        rows += compare(bench, kinds, "torchscript", 400)
    columns = ("format", "model", "rows", "equal rows", "cancelled requests", "discarded row steps")
    table = Table("determinism", "rows with the same bytes", columns, rows)
    return Section("Determinism", TEXT, results(table), (table,))


def results(table: Table) -> list[Result]:
    """Return the number of equal rows in each format."""
    return [
        Result(f"{row[0]}: rows with the same bytes", f"{row[3]} of {row[2]}", "all")
        for row in table.rows
        if row[1] == "all"
    ]


def compare(bench: Bench, kinds: Sequence[Kind], format: str, num_rows: int) -> list[tuple[str, ...]]:
    """Return the table rows of each model and of all models, with their format."""
    models = bench.models(*(kind.model for kind in kinds), formats=(format,))
    rows = compare_traffic(bench.clients, models, kinds, num_rows, "--intra-op-threads", "1")
    return [(format, *row) for row in rows]


def compare_traffic(
    clients: Clients, models: Path, kinds: Sequence[Kind], num_rows: int, *options: str
) -> list[tuple[str, ...]]:
    """Send random traffic to a server with these options, and each request alone to a second one.

    Returns:
        For each model and for all: the model, its rows, those with equal bytes, the cancelled requests, and
        the steps that the server discarded.
    """
    traffic = draw_traffic(num_rows, kinds)
    with samovar_server(models, *options) as server:
        mixed = clients.run_open(server.address, traffic, keep_outputs=True)
        discarded = f"{server.metric(DISCARDED_STEPS):,.0f}"
    with samovar_server(models, *options) as server:
        alone = clients.run_sequential(server.address, split(not_cancelled(traffic)))
    equal = count_equal_rows(traffic, mixed, alone)
    rows = [(kind.model, *_counts(traffic, mixed, equal, kind.model), "") for kind in kinds]
    return [*rows, ("all", *_counts(traffic, mixed, equal), discarded)]


def _counts(
    traffic: Sequence[OpenLoopRequest], mixed: LoadResult, equal: Mapping[int, int], model: str = ""
) -> tuple[str, ...]:
    indices = [index for index, request in enumerate(traffic) if model in ("", request.model)]
    rows = sum(traffic[index].rows for index in indices if index in equal)
    equal_rows = sum(equal.get(index, 0) for index in indices)
    cancelled = sum(index not in equal and not mixed.outputs[index] for index in indices)
    return f"{rows:,}", f"{equal_rows:,}", f"{cancelled:,}"


def draw_traffic(num_rows: int, kinds: Sequence[Kind] = KINDS, seed: int = 0) -> list[OpenLoopRequest]:
    """Draw requests, until the ones that are not cancelled have at least `num_rows` rows."""
    random = np.random.default_rng(seed)
    times = poisson(REQUESTS_PER_SECOND, 2 * num_rows, random)
    traffic: list[OpenLoopRequest] = []
    while sum(request.rows for request in not_cancelled(traffic)) < num_rows:
        kind = kinds[int(random.integers(len(kinds)))]
        request = kind.request(times[len(traffic)], int(random.integers(2**32)), random)
        rows, first_row = int(random.integers(1, MAX_ROWS + 1)), int(random.integers(1000))
        cancel_after = random.uniform(*CANCEL_AFTER_SECONDS) if random.random() < CANCELLED_SHARE else None
        traffic.append(replace(request, rows=rows, first_row=first_row, cancel_after=cancel_after))
    return traffic


def not_cancelled(traffic: Sequence[OpenLoopRequest]) -> list[OpenLoopRequest]:
    """Return the requests that the client does not cancel."""
    return [request for request in traffic if request.cancel_after is None]


def split(traffic: Sequence[OpenLoopRequest], seed: int = 1) -> list[OpenLoopRequest]:
    """Return two requests for each one, split at a random row; the second one may have no rows."""
    random = np.random.default_rng(seed)
    parts = []
    for request in traffic:
        rows = int(random.integers(0, request.rows)) + 1
        parts.append(replace(request, rows=rows))
        parts.append(replace(request, rows=request.rows - rows, first_row=request.first_row + rows))
    return parts


def count_equal_rows(
    traffic: Sequence[OpenLoopRequest], mixed: LoadResult, alone: LoadResult
) -> dict[int, int]:
    """Return the equal rows of each request that was not cancelled, by its index in `traffic`."""
    indices = [index for index, request in enumerate(traffic) if request.cancel_after is None]
    halves = zip(alone.outputs[::2], alone.outputs[1::2], strict=True)
    return {
        index: _count_equal_rows(traffic[index].rows, mixed.outputs[index], first + second)
        for index, (first, second) in zip(indices, halves, strict=True)
    }


def _count_equal_rows(rows: int, a: bytes, b: bytes) -> int:
    if not a or len(a) != len(b):
        return 0
    size = len(a) // rows
    return sum(a[row * size : (row + 1) * size] == b[row * size : (row + 1) * size] for row in range(rows))
