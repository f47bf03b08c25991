"""What it costs when much waits, and when many models are loaded."""

import asyncio
import time
import tracemalloc
from collections.abc import Sequence

import samovar
from benchmarks import artifacts
from benchmarks.load import Closed
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.spread import milliseconds, percentile, short
from benchmarks.suites.base import Bench
from benchmarks.suites.calls import METHOD, request
from server.request import Request, Work
from server.scheduler import Limits, Scheduler
from server.spec import ProgramKey

WAITING = (10, 100, 1000, 10_000, 100_000)
MODELS = (1, 10, 50)
KEY = ProgramKey("toy", "1", "none", "sample")
CAPACITY = 64
ROWS_A_REQUEST = 100
STEPS = 10

TEXT = """\
*Scheduler*: rows wait as requests of one row each, the dearest way, in the scheduler alone, without graphs;
`µs a turn` is a turn's `next_turn`, `charge` and `finish` with 8 rows that come and go. *Server*: rows wait
in requests of 100 rows over the wire, and the memory is what the whole process has grown by. The target: at
most 1 KB a waiting row, and a turn that does not depend on how many wait."""


def run(bench: Bench) -> Section:
    """Measure the scheduler by itself, a server with rows waiting, and servers with many models."""
    numbers = WAITING[:4] if bench.is_quick else WAITING
    memory = [row_bytes(count) for count in numbers]
    turns = [turn_seconds(count) for count in numbers]
    scheduler = Table(
        ("rows waiting", "bytes a row", "µs a turn"),
        [(f"{n:,}", short(b), short(1e6 * t)) for n, b, t in zip(numbers, memory, turns, strict=True)],
        "Scheduler",
    )
    micro = [1e6 * turn for turn in turns]
    lines = (Line("next_turn + charge + finish", numbers, micro),)
    plot = Plot("scale", "Scheduling cost", "rows waiting", "microseconds a turn", lines, is_log_y=False)
    servers = () if bench.is_quick else (_waiting(bench, numbers), _loaded(bench))
    return Section("Scale", TEXT, (scheduler, *servers), (plot,))


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
        turn = scheduler.next_turn()
        assert turn is not None
        active += [admission.request for admission in turn.admissions]
        scheduler.charge(KEY, CAPACITY, 1e-3)
        leaving, active = active[:8], active[8:]
        for each in leaving:
            scheduler.finish(each, 1)
            _submit(scheduler)
    return (time.perf_counter() - start) / turns


def _scheduler() -> Scheduler:
    scheduler = Scheduler(Limits(max_waiting_rows=1_000_000))
    scheduler.open_lane(KEY, CAPACITY)
    return scheduler


def _submit(scheduler: Scheduler) -> Request:
    request = Request(KEY, 1, STEPS, _ignore, work=Work({"steps": STEPS}, {}))
    scheduler.submit(request)
    return request


def _ignore(events: Sequence[object]) -> None:
    """Nobody reads these."""


def _waiting(bench: Bench, numbers: Sequence[int]) -> Table:
    """Memory and step time of a server while rows of long chains wait."""
    models, rows = bench.models(artifacts.EBM), []
    for count in numbers[2:]:
        with samovar_server(models, "--threads", "1") as server:
            bench.callers.run(hold, server.address, 1, 0.5)
            before = server.resident_bytes
            holding = bench.callers.begin(hold, server.address, count // ROWS_A_REQUEST, 6.0)
            _until_waiting(server, round(0.9 * (count - CAPACITY)))
            began = _steps(server)
            time.sleep(2.0)
            seconds, steps = (now - then for now, then in zip(_steps(server), began, strict=True))
            grown = server.resident_bytes - before
            holding.result()
        rows.append((f"{count:,}", short(grown / count), milliseconds(seconds / max(steps, 1))))
    return Table(("rows waiting", "resident bytes a row", "step ms"), rows, "Server")


def hold(address: str, requests: int, seconds: float) -> None:
    """Ask for rows that will not be done for long, wait, and go away."""
    asyncio.run(_hold(address, requests, seconds))


async def _hold(address: str, requests: int, seconds: float) -> None:
    async def ask(client: samovar.AsyncClient, seed: int) -> None:
        await client.sample(artifacts.EBM, ROWS_A_REQUEST, seed=seed, parameters={"steps": 10_000})

    async with samovar.AsyncClient(address, timeout=None) as client:
        asked = [asyncio.ensure_future(ask(client, seed)) for seed in range(requests)]
        await asyncio.sleep(seconds)
        for each in asked:
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


def _steps(server: Server) -> tuple[float, float]:
    """Seconds spent in steps, and how many."""
    return server.metric("samovar_step_duration_seconds_sum"), server.metric("samovar_steps_total")


def _until_waiting(server: Server, rows: int, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while server.metric("samovar_rows_waiting") < rows:
        if time.monotonic() > deadline:
            raise RuntimeError(f"the server did not hold {rows} waiting rows within {seconds:.0f} s")
        time.sleep(0.05)


def _loaded(bench: Bench) -> Table:
    """Start-up time, memory and call latency by the number of models."""
    rows = []
    for count in MODELS:
        models = artifacts.copies(count, bench.directory / "copies" / str(count))
        start = time.perf_counter()
        with samovar_server(models) as server:
            started = time.perf_counter() - start
            load = Closed(server.address, METHOD, request(artifacts.TINY, 1, f"{artifacts.TINY}-0"), 1, 0.5)
            latencies = bench.callers.closed(load).latencies
            megabytes = server.resident_bytes / 2**20
        rows.append((str(count), short(started), short(megabytes), milliseconds(percentile(latencies, 50))))
    return Table(("models", "seconds to SERVING", "resident MiB", "p50 ms of a call"), rows, "Models loaded")
