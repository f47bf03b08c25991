"""Cost of many queued rows, and of many loaded models."""

import asyncio
import threading
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import samovar
from benchmarks import artifacts
from benchmarks.load import ClosedLoop, OpenLoopRequest
from benchmarks.report import Line, Plot, Result, Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.statistics import format_milliseconds, format_number, percentile, spread
from benchmarks.suites.base import Bench
from benchmarks.suites.calls import METHOD, make_request
from server.core.request import Request
from server.core.spec import ProgramKey
from server.engine.scheduler import Limits, Scheduler

QUEUED_ROWS = (10, 100, 1000, 10_000, 100_000)
NUM_MODELS = (1, 10, 50)
KEY = ProgramKey("toy", "1", "none", "sample")
CAPACITY = 64
ROWS_PER_STEP = 8
ROWS_PER_REQUEST = 100
STEPS = 10
GAP_SECONDS = 0.02
# With fewer queued rows, other growth of the process hides their memory.
MIN_ROWS_FOR_MEMORY = 1000
QUEUED_ROWS_METRIC = "samovar_queued_rows"
SCHEDULER_TABLE = "scale-scheduler"

TEXT = """\
*Scheduler*: the scheduler alone, without graphs. Rows are queued as requests of one row, the most expensive
way. A step is `next_step`, `record_step_time` and `finish`, with 8 rows that enter and leave. *Server*: a
batch job queues rows in requests of 100 rows while all slots are busy. Memory is the growth of the whole
process. Latency is that of interactive calls of one row and one step to the same program, one every 20 ms.
*Loaded models*: copies of one tiny MLP with different names. Server and loaded models are single runs."""


def run(bench: Bench) -> Section:
    """Measure the scheduler alone, a server with queued rows, and servers with many models."""
    counts = QUEUED_ROWS[:4] if bench.is_quick else QUEUED_ROWS
    scheduler, plot = _measure_scheduler(bench, counts)
    servers = () if bench.is_quick else (measure_queued(bench, counts), measure_models(bench, NUM_MODELS))
    tables = (scheduler, *servers)
    return Section("Scale", TEXT, results(tables), tables, (plot,))


def results(tables: Sequence[Table]) -> list[Result]:
    """Return memory and time of the scheduler for the smallest and the largest queue."""
    rows = next(table.rows for table in tables if table.name == SCHEDULER_TABLE)
    return [
        Result(f"scheduler, {rows[-1][0]} queued rows: bytes per queued row", rows[-1][1], "≤ 1024"),
        *(
            Result(f"scheduler, {row[0]} queued rows: µs per step", row[2], "constant")
            for row in (rows[0], rows[-1])
        ),
    ]


def _measure_scheduler(bench: Bench, counts: Sequence[int]) -> tuple[Table, Plot]:
    micros = [spread([1e6 * step_seconds(count) for _ in range(bench.few_repeats)]) for count in counts]
    rows = [
        (f"{count:,}", format_number(row_bytes(count)), str(micro))
        for count, micro in zip(counts, micros, strict=True)
    ]
    line = Line("next_step + record_step_time + finish", counts, [micro.median for micro in micros])
    plot = Plot("scale", "Scheduling cost", "queued rows", "microseconds per step", (line,), is_log_y=False)
    columns = ("queued rows", "bytes per queued row", "µs per step")
    return Table(SCHEDULER_TABLE, "scheduler", columns, rows), plot


def row_bytes(num_queued: int) -> float:
    """Return the memory of the scheduler per queued row, with requests of one row."""
    scheduler = _scheduler()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        requests = [_submit(scheduler) for _ in range(num_queued)]
        return (tracemalloc.get_traced_memory()[0] - before) / len(requests)
    finally:
        tracemalloc.stop()


def step_seconds(num_queued: int, num_steps: int = 2000) -> float:
    """Return the seconds of one step of the scheduler with `num_queued` queued requests.

    In each step, ROWS_PER_STEP rows enter, as many leave, and as many requests arrive.
    """
    scheduler = _scheduler()
    for _ in range(num_queued):
        _submit(scheduler)
    running: list[Request] = []
    start = time.perf_counter()
    for _ in range(num_steps):
        step = scheduler.next_step()
        assert step is not None
        running += [admission.request for admission in step.admissions]
        scheduler.record_step_time(KEY, CAPACITY, 1e-3)
        finished, running = running[:ROWS_PER_STEP], running[ROWS_PER_STEP:]
        for request in finished:
            scheduler.finish(request, 1)
            _submit(scheduler)
    return (time.perf_counter() - start) / num_steps


def _scheduler() -> Scheduler:
    scheduler = Scheduler(Limits(max_queued_rows=1_000_000))
    scheduler.add_program(KEY, CAPACITY)
    return scheduler


def _submit(scheduler: Scheduler) -> Request:
    request = Request(KEY, 1, STEPS, parameters={"steps": STEPS})
    scheduler.submit(request, _ignore, 0.0)
    return request


def _ignore(events: Sequence[object]) -> None:
    pass


def measure_queued(bench: Bench, counts: Sequence[int]) -> Table:
    """Measure memory, step time and latency of a server with queued rows."""
    models = bench.models(artifacts.EBM)
    rows = []
    for count in counts:
        with samovar_server(models, "--intra-op-threads", "1", "--max-batch-rows", str(CAPACITY)) as server:
            rows.append(_measure_queued(bench, server, count))
    columns = ("queued rows", "resident bytes per queued row", "step ms", "call p50 ms", "call p99 ms")
    return Table("scale-server", "server with queued rows", columns, rows)


def _measure_queued(bench: Bench, server: Server, num_queued: int) -> tuple[str, ...]:
    with queue_rows(server.address, 2 * CAPACITY):
        _wait_until_queued(server, CAPACITY)
    resident = server.resident_bytes
    count = int(bench.scale(10, 100))
    requests = [
        OpenLoopRequest(GAP_SECONDS * index, "call", artifacts.EBM, 1, index, {"steps": 1})
        for index in range(count)
    ]
    with queue_rows(server.address, num_queued + CAPACITY):
        _wait_until_queued(server, num_queued)
        queued, growth = server.metric(QUEUED_ROWS_METRIC), server.resident_bytes - resident
        before = server.step_metrics()
        latencies = bench.clients.run_open(server.address, requests).latencies_of("call")
        seconds, steps = (after - start for after, start in zip(server.step_metrics(), before, strict=True))
    percentiles = (percentile(latencies, percent) for percent in (50, 99))
    memory = format_number(growth / queued) if num_queued >= MIN_ROWS_FOR_MEMORY else "–"
    return (
        f"{queued:,.0f}",
        memory,
        format_milliseconds(seconds / steps),
        *map(format_milliseconds, percentiles),
    )


@contextmanager
def queue_rows(address: str, rows: int) -> Iterator[None]:
    """Keep a batch job of `rows` rows open; its rows have too many steps to finish."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as thread:
        job = thread.submit(lambda: asyncio.run(_queue_rows(address, rows, stop)))
        try:
            yield
        finally:
            stop.set()
            job.result()


async def _queue_rows(address: str, rows: int, stop: threading.Event) -> None:
    async def call(client: samovar.AsyncClient, first: int) -> None:
        count = min(ROWS_PER_REQUEST, rows - first)
        parameters = {"steps": 10_000}
        await client.sample(artifacts.EBM, count, seed=first, parameters=parameters, priority="batch")

    async with samovar.AsyncClient(address, timeout=None) as client:
        calls = [asyncio.ensure_future(call(client, first)) for first in range(0, rows, ROWS_PER_REQUEST)]
        await asyncio.to_thread(stop.wait)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def _wait_until_queued(server: Server, rows: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while server.metric(QUEUED_ROWS_METRIC) < rows:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{server.address}: fewer than {rows} queued rows after {seconds:.0f} s")
        time.sleep(0.05)


def measure_models(bench: Bench, counts: Sequence[int]) -> Table:
    """Measure start-up time, memory and latency by the number of models."""
    rows = []
    for count in counts:
        models = artifacts.make_copies(count, bench.directory / "copies" / str(count))
        request = make_request(artifacts.TINY, 1, f"{artifacts.TINY}-0")
        start = time.perf_counter()
        with samovar_server(models) as server:
            start_up = time.perf_counter() - start
            latencies = bench.clients.run_closed(
                ClosedLoop(server.address, METHOD, request, 1, 0.5)
            ).latencies
            mebibytes = server.resident_bytes / 2**20
        p50 = format_milliseconds(percentile(latencies, 50))
        rows.append((str(count), format_number(start_up), format_number(mebibytes), p50))
    columns = ("models", "seconds to SERVING", "resident MiB", "call p50 ms")
    return Table("scale-models", "loaded models", columns, rows)
