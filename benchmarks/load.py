"""Load generators in a process of their own: closed loops and open loops.

In a closed loop, each client waits for the reply before its next call. Replies are not parsed, so the server
is measured rather than the client. In an open loop, the real client calls at given times, whether or not the
server keeps up. The latency of a call counts from the time at which it was due.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio
import numpy as np

import samovar
from benchmarks.statistics import Floats
from samovar._channel import CHANNEL_OPTIONS
from samovar._messages import Priority

T = TypeVar("T")
Method = Callable[[bytes], Awaitable[bytes]]

WARM_UP_SECONDS = 0.3
CLIENTS_PER_CONNECTION = 8
# By default, the channels of a process share a connection, and a connection is served by one gRPC worker.
SEPARATE_CONNECTION = ("grpc.use_local_subchannel_pool", 1)
CANCELLED = "cancelled"


@dataclass(frozen=True)
class ClosedLoop:
    """Clients that repeat one unary call.

    Attributes:
        address: HOST:PORT.
        method: full name of the gRPC method.
        request: serialized request.
        clients: number of concurrent clients.
        seconds: duration, in addition to a warm-up.
    """

    address: str
    method: str
    request: bytes
    clients: int
    seconds: float


@dataclass(frozen=True)
class OpenLoopRequest:
    """Request of an open loop.

    Attributes:
        at: seconds after the start at which the request is due.
        kind: label for statistics.
        model: model name.
        rows: number of rows; a request without rows is not sent.
        seed: seed of the rows.
        parameters: parameters that differ from their defaults.
        first_row: index of the first row.
        priority: priority of the request.
        cancel_after: seconds after which the client cancels the request; None if it does not.
    """

    at: float
    kind: str
    model: str
    rows: int
    seed: int
    parameters: Mapping[str, float | int | str] = field(default_factory=dict)
    first_row: int = 0
    priority: Priority = "interactive"
    cancel_after: float | None = None


class _Reply(NamedTuple):
    """Latency in seconds (NaN if the call failed), the bytes of the value if they are kept, and the error."""

    latency: float
    output: bytes
    error: str


@dataclass(frozen=True)
class LoadResult:
    """Measurements of the clients.

    Attributes:
        latencies: seconds of each call; NaN for a call that failed.
        seconds: wall time.
        cpu_seconds: CPU time of the client process.
        kinds: kind of each call of an open loop.
        outputs: bytes of the value of each call, if they were kept.
        errors: messages of the calls that failed.
    """

    latencies: Floats
    seconds: float
    cpu_seconds: float
    kinds: Sequence[str] = ()
    outputs: Sequence[bytes] = ()
    errors: Sequence[str] = ()

    @property
    def rate(self) -> float:
        """Successful calls per second."""
        return int(np.isfinite(self.latencies).sum()) / self.seconds

    @property
    def cores(self) -> float:
        """CPU cores that the clients used."""
        return self.cpu_seconds / self.seconds

    def latencies_of(self, kind: str) -> Floats:
        """Return the latencies of the successful calls of one kind."""
        is_kind = np.array([value == kind for value in self.kinds], bool)
        return self.latencies[is_kind & np.isfinite(self.latencies)]


class Clients:
    """Process that runs load generators."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run_closed(self, load: ClosedLoop) -> LoadResult:
        """Run a closed loop after a warm-up."""
        return self._pool.submit(_run_closed, load).result()

    def run_open(
        self, address: str, requests: Sequence[OpenLoopRequest], keep_outputs: bool = False
    ) -> LoadResult:
        """Send each request when it is due, and wait for all replies."""
        return self._pool.submit(_run_open, address, requests, keep_outputs).result()

    def run_sequential(self, address: str, requests: Sequence[OpenLoopRequest]) -> LoadResult:
        """Send one request after the other, regardless of when they are due, and keep the outputs."""
        return self._pool.submit(_run_sequential, address, requests).result()

    def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a function in the process."""
        return self._pool.submit(function, *arguments).result()


@contextmanager
def start_clients() -> Iterator[Clients]:
    """Start the client process. It is spawned, because gRPC does not survive a fork."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield Clients(pool)


def poisson(rate: float, count: int, random: np.random.Generator) -> list[float]:
    """Return the first `count` arrival times of a Poisson process with `rate` arrivals per second."""
    times: list[float] = np.cumsum(random.exponential(1 / rate, count)).tolist()
    return times


def _run_closed(load: ClosedLoop) -> LoadResult:
    return asyncio.run(_closed(load))


def _run_open(address: str, requests: Sequence[OpenLoopRequest], keep_outputs: bool) -> LoadResult:
    return asyncio.run(_open(address, requests, keep_outputs))


def _run_sequential(address: str, requests: Sequence[OpenLoopRequest]) -> LoadResult:
    return asyncio.run(_sequential(address, requests))


async def _closed(load: ClosedLoop) -> LoadResult:
    async with _connect(load) as methods:
        await _call_until(methods, load, time.perf_counter() + WARM_UP_SECONDS)
        start, cpu = time.perf_counter(), time.process_time()
        latencies = await _call_until(methods, load, start + load.seconds)
        return LoadResult(np.array(latencies), time.perf_counter() - start, time.process_time() - cpu)


@asynccontextmanager
async def _connect(load: ClosedLoop) -> AsyncIterator[list[Any]]:
    """Yield the method of each connection."""
    options = (*CHANNEL_OPTIONS, SEPARATE_CONNECTION)
    count = math.ceil(load.clients / CLIENTS_PER_CONNECTION)
    channels = [grpc.aio.insecure_channel(load.address, options) for _ in range(count)]
    try:
        yield [channel.unary_unary(load.method) for channel in channels]
    finally:
        await asyncio.gather(*(channel.close() for channel in channels))


async def _call_until(methods: Sequence[Method], load: ClosedLoop, end: float) -> list[float]:
    latencies: list[float] = []

    async def client(method: Method) -> None:
        while (start := time.perf_counter()) < end:
            await method(load.request)
            latencies.append(time.perf_counter() - start)

    await asyncio.gather(*(client(methods[index % len(methods)]) for index in range(load.clients)))
    return latencies


async def _open(address: str, requests: Sequence[OpenLoopRequest], keep_outputs: bool) -> LoadResult:
    async with samovar.AsyncClient(address, timeout=None) as client:
        for model in {request.model for request in requests}:
            await client.sample(model, 1, seed=0)
        start, cpu = time.perf_counter(), time.process_time()
        calls = []
        for request in requests:
            await asyncio.sleep(max(0.0, start + request.at - time.perf_counter()))
            calls.append(asyncio.ensure_future(_call(client, request, start + request.at, keep_outputs)))
        replies = await asyncio.gather(*calls)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _result(requests, replies, seconds, cpu_seconds)


async def _sequential(address: str, requests: Sequence[OpenLoopRequest]) -> LoadResult:
    async with samovar.AsyncClient(address, timeout=None) as client:
        start, cpu = time.perf_counter(), time.process_time()
        replies = [await _call(client, request, time.perf_counter(), True) for request in requests]
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return _result(requests, replies, seconds, cpu_seconds)


def _result(
    requests: Sequence[OpenLoopRequest], replies: Sequence[_Reply], seconds: float, cpu_seconds: float
) -> LoadResult:
    return LoadResult(
        np.array([reply.latency for reply in replies]),
        seconds,
        cpu_seconds,
        [request.kind for request in requests],
        [reply.output for reply in replies],
        [reply.error for reply in replies if reply.error],
    )


async def _call(
    client: samovar.AsyncClient, request: OpenLoopRequest, due: float, keep_output: bool
) -> _Reply:
    if not request.rows:
        return _Reply(0.0, b"", "")
    try:
        result = await asyncio.wait_for(_sample(client, request), request.cancel_after)
    except TimeoutError:
        return _Reply(math.nan, b"", CANCELLED)
    except samovar.SamovarError as error:
        return _Reply(math.nan, b"", str(error))
    return _Reply(time.perf_counter() - due, result.value.tobytes() if keep_output else b"", "")


async def _sample(client: samovar.AsyncClient, request: OpenLoopRequest) -> samovar.Result:
    return await client.sample(
        request.model,
        request.rows,
        seed=request.seed,
        first_row=request.first_row,
        parameters=request.parameters,
        priority=request.priority,
    )
