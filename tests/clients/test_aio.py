"""Tests of the asynchronous client: equality with the synchronous one, and cancellation."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from samovar import AsyncClient, Cancelled, Client, DeadlineExceeded, InvalidRequest, Preview, ServerError
from tests.support.fake_server import UNAVAILABLE, FakeServer, FakeService, bad_request, images

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=500) as client:
        yield client


async def test_clients_return_equal_results(async_client: AsyncClient, client: Client) -> None:
    rows = images(0, np.arange(5))
    for name in ("reconstruct", "encode", "score", "classify"):
        asynchronous = await getattr(async_client, name)("counter", rows, seed=3)
        synchronous = getattr(client, name)("counter", rows, seed=3)
        assert asynchronous.value.tobytes() == synchronous.value.tobytes()
        assert (asynchronous.run, asynchronous.timings) == (synchronous.run, synchronous.timings)
    latents = np.ones((2, 2))
    assert (await async_client.decode("counter", latents)).value.tolist() == client.decode(
        "counter", latents
    ).value.tolist()
    assert (await async_client.models()) == client.models()
    assert (await async_client.model("counter", "1")) == client.model("counter", "1")
    assert (await async_client.server_info()) == client.server_info()


async def test_sample_returns_rows_in_order(async_client: AsyncClient) -> None:
    result = await async_client.sample("counter", 7, seed=5, first_row=2)
    assert result.value.tolist() == images(5, np.arange(2, 9)).tolist()
    assert result.run.seed == 5
    assert result.timings.run == 1.0


async def test_calls_run_concurrently(async_client: AsyncClient) -> None:
    results = await asyncio.gather(*(async_client.sample("counter", 3, seed=seed) for seed in range(4)))
    assert [result.run.seed for result in results] == [0, 1, 2, 3]


async def test_stream_yields_previews_and_finished_rows(async_client: AsyncClient) -> None:
    events = [event async for event in async_client.stream("counter", 6, preview_every=2)]
    assert isinstance(events[0], Preview)
    assert [event.indices.tolist() for event in events[1:]] == [[5, 4], [3, 2], [1, 0]]


async def test_ordered_stream_yields_rows_in_order(async_client: AsyncClient) -> None:
    events = [event async for event in async_client.stream("counter", 6, ordered=True)]
    assert [event.indices.tolist() for event in events] == [list(range(6))]


async def test_stream_run_before_first_event_raises(async_client: AsyncClient) -> None:
    with pytest.raises(ServerError, match="before the first event"):
        _ = async_client.stream("counter").run


async def test_invalid_request_carries_violations(async_client: AsyncClient, service: FakeService) -> None:
    service.errors = [bad_request(rows="too many")]
    with pytest.raises(InvalidRequest) as caught:
        await async_client.sample("counter")
    assert [violation.field for violation in caught.value.violations] == ["rows"]


async def test_unavailable_server_is_retried(async_client: AsyncClient, service: FakeService) -> None:
    service.errors = [UNAVAILABLE, UNAVAILABLE]
    assert len((await async_client.sample("counter", 3)).value) == 3
    assert len(service.requests) == 3


async def test_stream_exit_cancels_call(async_client: AsyncClient, service: FakeService) -> None:
    service.blocks = True
    async with async_client.stream("counter", 6) as stream:
        assert (await anext(stream)).indices.tolist() == [5, 4]
    assert await asyncio.to_thread(service.cancelled.wait, 10)
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_stream_cancelled_before_start_raises_cancelled(async_client: AsyncClient) -> None:
    stream = async_client.stream("counter", 6)
    stream.cancel()
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_task_cancellation_cancels_call(async_client: AsyncClient, service: FakeService) -> None:
    service.blocks = True
    task = asyncio.create_task(async_client.sample("counter", 6))
    assert await asyncio.to_thread(service.blocked.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(service.cancelled.wait, 10)


async def test_timeout_covers_whole_call(async_client: AsyncClient, service: FakeService) -> None:
    service.blocks = True
    with pytest.raises(DeadlineExceeded):
        await async_client.sample("counter", 6, timeout=0.2)
