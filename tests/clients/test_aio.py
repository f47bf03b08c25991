"""The asyncio client: the same answers as the blocking one, and cancellation the asyncio way."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio

from samovar import AsyncClient, Cancelled, Client, DeadlineExceeded, InvalidRequest, Preview, ServerError
from tests.support.fake_server import UNAVAILABLE, Counting, Server, bad_request, images

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def aclient(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=20) as client:
        yield client


async def test_both_clients_answer_the_same(aclient: AsyncClient, client: Client) -> None:
    rows = images(0, np.arange(5))
    for name in ("reconstruct", "encode", "score", "classify"):
        one = await getattr(aclient, name)("counter", rows, seed=3)
        other = getattr(client, name)("counter", rows, seed=3)
        assert one.value.tobytes() == other.value.tobytes()
        assert (one.run, one.timings) == (other.run, other.timings)
    latents = np.ones((2, 2))
    assert (await aclient.decode("counter", latents)).value.tolist() == client.decode(
        "counter", latents
    ).value.tolist()
    assert (await aclient.models()) == client.models()
    assert (await aclient.model("counter", "1")) == client.model("counter", "1")
    assert (await aclient.server_info()) == client.server_info()


async def test_samples_come_in_the_order_of_their_rows(aclient: AsyncClient) -> None:
    result = await aclient.sample("counter", 7, seed=5, first_row=2)
    assert result.value.tolist() == images(5, np.arange(2, 9)).tolist()
    assert result.run.seed == 5
    assert result.timings.run == 1.0


async def test_calls_run_side_by_side(aclient: AsyncClient) -> None:
    results = await asyncio.gather(*(aclient.sample("counter", 3, seed=seed) for seed in range(4)))
    assert [result.run.seed for result in results] == [0, 1, 2, 3]


async def test_a_stream_tells_of_rows_as_they_finish(aclient: AsyncClient) -> None:
    events = [event async for event in aclient.stream("counter", 6, preview_every=2)]
    assert isinstance(events[0], Preview)
    assert [event.indices.tolist() for event in events[1:]] == [[5, 4], [3, 2], [1, 0]]


async def test_a_stream_may_be_read_in_the_order_of_its_rows(aclient: AsyncClient) -> None:
    events = [event async for event in aclient.stream("counter", 6, ordered=True)]
    assert [event.indices.tolist() for event in events] == [list(range(6))]


async def test_a_stream_does_not_know_what_runs_before_it_is_read(aclient: AsyncClient) -> None:
    with pytest.raises(ServerError, match="read its first event"):
        _ = aclient.stream("counter").run


async def test_errors_are_the_same(aclient: AsyncClient, service: Counting) -> None:
    service.refusals = [bad_request(rows="too many")]
    with pytest.raises(InvalidRequest) as caught:
        await aclient.sample("counter")
    assert [violation.field for violation in caught.value.violations] == ["rows"]


async def test_an_unavailable_server_is_asked_again(aclient: AsyncClient, service: Counting) -> None:
    service.refusals = [UNAVAILABLE, UNAVAILABLE]
    assert len((await aclient.sample("counter", 3)).value) == 3
    assert len(service.requests) == 3


async def test_leaving_a_stream_cancels_the_servers_work(aclient: AsyncClient, service: Counting) -> None:
    service.holds = True
    async with aclient.stream("counter", 6) as stream:
        assert (await anext(stream)).indices.tolist() == [5, 4]
    assert await asyncio.to_thread(service.cancelled.wait, 10)
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_a_stream_that_was_cancelled_before_it_began_stays_so(aclient: AsyncClient) -> None:
    stream = aclient.stream("counter", 6)
    stream.cancel()
    with pytest.raises(Cancelled):
        await anext(stream)


async def test_cancelling_a_task_cancels_its_call(aclient: AsyncClient, service: Counting) -> None:
    service.holds = True
    task = asyncio.create_task(aclient.sample("counter", 6))
    assert await asyncio.to_thread(service.reached.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(service.cancelled.wait, 10)


async def test_a_deadline_covers_the_whole_call(aclient: AsyncClient, service: Counting) -> None:
    service.holds = True
    with pytest.raises(DeadlineExceeded):
        await aclient.sample("counter", 6, timeout=0.2)
