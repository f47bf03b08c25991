"""Callers, in a process of their own: as many as asked for, or arriving by chance.

In a closed loop each caller waits for its answer before it calls again, and bytes go out as they
are: what is measured is the server. In an open loop the real client calls at given times, whether
or not the server keeps up; a latency counts from the time at which the call was due.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, TypeVar

import grpc
import grpc.aio
import numpy as np

import samovar
from benchmarks.statistics import Floats
from samovar._channel import CHANNEL_OPTIONS
from samovar._messages import Priority

T = TypeVar("T")
Method = Callable[[bytes], Awaitable[bytes]]
# Seconds, NaN for a call that failed; the value's bytes, where they are kept; what went wrong.
Answer = tuple[float, bytes, str]

WARM_UP_SECONDS = 0.3
CALLERS_A_CHANNEL = 8
# Channels of one process share a connection unless told otherwise, and one connection has one front end.
OWN_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Closed:
    """So many callers that call a unary method with the same bytes for so long."""

    address: str
    method: str
    request: bytes
    callers: int
    seconds: float


@dataclass(frozen=True)
class Arrival:
    """One call of the client, due `at` seconds after the start and cancelled `patience` seconds later."""

    at: float
    kind: str
    model: str
    rows: int
    seed: int
    parameters: Mapping[str, float | int | str] = field(default_factory=dict)
    first_row: int = 0
    priority: Priority = "interactive"
    patience: float | None = None


@dataclass(frozen=True)
class Observed:
    """What callers saw: seconds of each call, by its end; the wall time, and the callers' own CPU time.

    `kinds` and `outputs` go with `latencies`; a call that failed has a latency of NaN and its error.
    """

    latencies: Floats
    seconds: float
    cpu_seconds: float
    kinds: Sequence[str] = ()
    outputs: Sequence[bytes] = ()
    errors: Sequence[str] = ()

    @property
    def rate(self) -> float:
        """Calls that were answered, per second."""
        return int(np.isfinite(self.latencies).sum()) / self.seconds

    @property
    def cores(self) -> float:
        """How much of one core the callers themselves took."""
        return self.cpu_seconds / self.seconds

    def of(self, kind: str) -> Floats:
        """Latencies of the answered calls of one kind."""
        chosen = np.array([each == kind for each in self.kinds], bool) & np.isfinite(self.latencies)
        return self.latencies[chosen]


class Callers:
    """The process that calls."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def closed(self, load: Closed) -> Observed:
        """Run a closed loop, after a short one to warm up."""
        return self._pool.submit(_run_closed, load).result()

    def open(self, address: str, arrivals: Sequence[Arrival], keep: bool = False) -> Observed:
        """Make calls when they are due, to the last answer; with `keep`, hold what was answered."""
        return self._pool.submit(_run_open, address, arrivals, keep).result()

    def one_by_one(self, address: str, arrivals: Sequence[Arrival]) -> Observed:
        """Make calls one after the other, whenever they are due; hold what was answered."""
        return self._pool.submit(_run_one_by_one, address, arrivals).result()

    def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run anything else there."""
        return self._pool.submit(function, *arguments).result()


@contextmanager
def callers() -> Iterator[Callers]:
    """A process to call from; spawned, because gRPC does not survive a fork."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield Callers(pool)


def poisson(rate: float, count: int, random: np.random.Generator) -> list[float]:
    """Times of so many arrivals that come independently of each other, `rate` of them a second."""
    times: list[float] = np.cumsum(random.exponential(1 / rate, count)).tolist()
    return times


def _run_closed(load: Closed) -> Observed:
    return asyncio.run(_closed(load))


def _run_open(address: str, arrivals: Sequence[Arrival], keep: bool) -> Observed:
    return asyncio.run(_open(address, arrivals, keep))


def _run_one_by_one(address: str, arrivals: Sequence[Arrival]) -> Observed:
    return asyncio.run(_one_by_one(address, arrivals))


async def _closed(load: Closed) -> Observed:
    async with _methods(load) as methods:
        await _call_until(methods, load, time.perf_counter() + WARM_UP_SECONDS)
        start, cpu = time.perf_counter(), time.process_time()
        latencies = await _call_until(methods, load, start + load.seconds)
        return Observed(np.array(latencies), time.perf_counter() - start, time.process_time() - cpu)


@asynccontextmanager
async def _methods(load: Closed) -> AsyncIterator[list[Any]]:
    """The method over as many connections as the callers have."""
    options = (*CHANNEL_OPTIONS, OWN_CONNECTION)
    number = math.ceil(load.callers / CALLERS_A_CHANNEL)
    channels = [grpc.aio.insecure_channel(load.address, options) for _ in range(number)]
    try:
        yield [channel.unary_unary(load.method) for channel in channels]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _call_until(methods: Sequence[Method], load: Closed, end: float) -> list[float]:
    latencies: list[float] = []

    async def caller(method: Method) -> None:
        while (start := time.perf_counter()) < end:
            await method(load.request)
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(caller(methods[number % len(methods)]) for number in range(load.callers)))
    return latencies


async def _open(address: str, arrivals: Sequence[Arrival], keep: bool) -> Observed:
    async with samovar.AsyncClient(address, timeout=None) as client:
        for model in {arrival.model for arrival in arrivals}:
            await client.sample(model, 1, seed=0)
        start, cpu = time.perf_counter(), time.process_time()
        calls = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
            calls.append(asyncio.ensure_future(_call(client, arrival, start + arrival.at, keep)))
        results = await asyncio.gather(*calls)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _observed(arrivals, results, seconds, cpu_seconds)


async def _one_by_one(address: str, arrivals: Sequence[Arrival]) -> Observed:
    async with samovar.AsyncClient(address, timeout=None) as client:
        start, cpu = time.perf_counter(), time.process_time()
        results = [await _call(client, each, time.perf_counter(), True) for each in arrivals]
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _observed(arrivals, results, seconds, cpu_seconds)


def _observed(
    arrivals: Sequence[Arrival], results: Sequence[Answer], seconds: float, cpu_seconds: float
) -> Observed:
    latencies, outputs, errors = zip(*results, strict=True)
    kinds = [arrival.kind for arrival in arrivals]
    return Observed(np.array(latencies), seconds, cpu_seconds, kinds, outputs, [e for e in errors if e])


async def _call(client: samovar.AsyncClient, arrival: Arrival, due: float, keep: bool) -> Answer:
    if not arrival.rows:
        return 0.0, b"", ""
    try:
        result = await asyncio.wait_for(_sample(client, arrival), arrival.patience)
    except TimeoutError:
        return float("nan"), b"", CANCELLED
    except samovar.SamovarError as error:
        return float("nan"), b"", str(error)
    return time.perf_counter() - due, result.value.tobytes() if keep else b"", ""


async def _sample(client: samovar.AsyncClient, arrival: Arrival) -> samovar.Result:
    return await client.sample(
        arrival.model,
        arrival.rows,
        seed=arrival.seed,
        first_row=arrival.first_row,
        parameters=arrival.parameters,
        priority=arrival.priority,
    )
