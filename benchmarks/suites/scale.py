"""What it costs when much waits, and when many models are loaded."""

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import samovar
from benchmarks import artifacts
from benchmarks.load import Arrival, Closed
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import milliseconds, percentile, short, spread
from benchmarks.suites.base import Bench
from benchmarks.suites.calls import METHOD, request
from server.core.request import Request
from server.core.spec import ProgramKey
from server.engine.scheduler import Limits, Scheduler

WAITING = (10, 100, 1000, 10_000, 100_000)
MODELS = (1, 10, 50)
KEY = ProgramKey("toy", "1", "none", "sample")
CAPACITY = 64
ROWS_A_REQUEST = 100
STEPS = 10
GAP_SECONDS = 0.02
# The memory of fewer rows drowns in what a process grows by anyhow.
MANY = 1000
ROWS_WAITING = "samovar_queued_rows"

TEXT = """\
*Scheduler*: rows wait as requests of one row each, the dearest way, in the scheduler alone, without graphs;
`µs a turn` is a turn's `next_turn`, `charge` and `finish` with 8 rows that come and go. *Server*: rows of
a batch job wait in requests of 100 rows over the wire while all its slots are busy, the memory is what the
whole process has grown by, and the latency is that of interactive calls of one row and one step in the same
program, which come due every 20 ms. *Models loaded* are copies of one tiny MLP under different names: what a
model costs besides its weights. Server and models are single runs. The target: at most 1 KB a waiting row,
and a turn that does not depend on how many wait."""


def run(bench: Bench) -> Section:
    """Measure the scheduler by itself, a server with rows waiting, and servers with many models."""
    numbers = WAITING[:4] if bench.is_quick else WAITING
    scheduler, plot = _turns(bench, numbers)
    servers = () if bench.is_quick else (waiting(bench, numbers), loaded(bench, MODELS))
    return Section("Scale", TEXT, (scheduler, *servers), (plot,))


def _turns(bench: Bench, numbers: Sequence[int]) -> tuple[Table, Plot]:
    """Memory and time of the scheduler by itself."""
    micro = [spread([1e6 * turn_seconds(count) for _ in range(bench.few_repeats)]) for count in numbers]
    rows = [(f"{n:,}", short(row_bytes(n)), str(turn)) for n, turn in zip(numbers, micro, strict=True)]
    lines = (Line("next_turn + charge + finish", numbers, [turn.median for turn in micro]),)
    plot = Plot("scale", "Scheduling cost", "rows waiting", "microseconds a turn", lines, is_log_y=False)
    return Table(("rows waiting", "bytes a row", "µs a turn"), rows, "Scheduler"), plot


def row_bytes(count: int) -> float:
    """Memory per waiting row of so many requests of one row, as the scheduler holds them."""
    scheduler = _scheduler()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [_submit(scheduler) for _ in range(count)]
        return (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()


def turn_seconds(waiting: int, turns: int = 2000) -> float:
    """Time of one turn of the scheduler while so many requests wait: rows enter, leave, and others come."""
    scheduler = _scheduler()
    for _ in range(waiting):
        _submit(scheduler)
    active: list[Request] = []
    start = time.perf_counter()
    for _ in range(turns):
        turn = scheduler.next_step()
        assert turn is not None
        active += [admission.request for admission in turn.admissions]
        scheduler.record_step_time(KEY, CAPACITY, 1e-3)
        leaving, active = active[:8], active[8:]
        for each in leaving:
            scheduler.finish(each, 1)
            _submit(scheduler)
    return (time.perf_counter() - start) / turns


def _scheduler() -> Scheduler:
    scheduler = Scheduler(Limits(max_queued_rows=1_000_000))
    scheduler.add_program(KEY, CAPACITY)
    return scheduler


def _submit(scheduler: Scheduler) -> Request:
    request = Request(KEY, 1, STEPS, parameters={"steps": STEPS})
    scheduler.submit(request, _ignore, 0.0)
    return request


def _ignore(events: Sequence[object]) -> None:
    """Nobody reads these."""


def waiting(bench: Bench, numbers: Sequence[int]) -> Table:
    """Memory, step time and latency of a server while rows of long chains wait."""
    models = bench.models(artifacts.EBM)
    rows = []
    for count in numbers:
        with samovar_server(models, "--intra-op-threads", "1", "--max-batch-rows", str(CAPACITY)) as server:
            rows.append(_while_waiting(bench, server, count))
    columns = ("rows waiting", "resident bytes a row", "step ms", "p50 ms of a call", "p99 ms of a call")
    return Table(columns, rows, "Server")


def _while_waiting(bench: Bench, server: Server, count: int) -> tuple[str, ...]:
    with holding(server.address, 2 * CAPACITY):
        _until_waiting(server, CAPACITY)
    before = server.resident_bytes
    number = int(bench.either(10, 100))
    due = [Arrival(GAP_SECONDS * i, "call", artifacts.EBM, 1, i, {"steps": 1}) for i in range(number)]
    with holding(server.address, count + CAPACITY):
        _until_waiting(server, count)
        held, grown, began = server.metric(ROWS_WAITING), server.resident_bytes - before, _steps(server)
        latencies = bench.callers.open(server.address, due).of("call")
        seconds, steps = (now - then for now, then in zip(_steps(server), began, strict=True))
    percentiles = (percentile(latencies, percent) for percent in (50, 99))
    memory = short(grown / held) if count >= MANY else "–"
    return f"{held:,.0f}", memory, milliseconds(seconds / steps), *map(milliseconds, percentiles)


@contextmanager
def holding(address: str, rows: int) -> Iterator[None]:
    """Meanwhile a batch job of so many rows is there, none of which will be done for long."""
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(lambda: asyncio.run(_hold(address, rows, is_over)))
        try:
            yield
        finally:
            is_over.set()
            held.result()


async def _hold(address: str, rows: int, is_over: threading.Event) -> None:
    async def ask(client: samovar.AsyncClient, first: int) -> None:
        count = min(ROWS_A_REQUEST, rows - first)
        parameters = {"steps": 10_000}
        await client.sample(artifacts.EBM, count, seed=first, parameters=parameters, priority="batch")

    async with samovar.AsyncClient(address, timeout=None) as client:
        asked = [asyncio.ensure_future(ask(client, first)) for first in range(0, rows, ROWS_A_REQUEST)]
        await asyncio.to_thread(is_over.wait)
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _steps(server: Server) -> tuple[float, float]:
    """Seconds spent in steps, and how many."""
    return server.metric("samovar_step_duration_seconds_sum"), server.metric("samovar_steps_total")


def _until_waiting(server: Server, rows: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while server.metric(ROWS_WAITING) < rows:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server did not hold {rows} waiting rows within {seconds:.0f} s")
        time.sleep(0.05)


def loaded(bench: Bench, numbers: Sequence[int]) -> Table:
    """Start-up time, memory and call latency by the number of models."""
    rows = []
    for count in numbers:
        models = artifacts.copies(count, bench.directory / "copies" / str(count))
        start = time.perf_counter()
        with samovar_server(models) as server:
            started = time.perf_counter() - start
            load = Closed(server.address, METHOD, request(artifacts.TINY, 1, f"{artifacts.TINY}-0"), 1, 0.5)
            latencies = bench.callers.closed(load).latencies
            megabytes = server.resident_bytes / 2**20
        rows.append((str(count), short(started), short(megabytes), milliseconds(percentile(latencies, 50))))
    return Table(("models", "seconds to SERVING", "resident MiB", "p50 ms of a call"), rows, "Models loaded")
