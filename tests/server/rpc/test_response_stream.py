"""Where the event loop and the device thread meet: nothing is lost, and nothing is counted twice."""

import asyncio
from collections.abc import Iterator

import pytest

from server.core.errors import Overloaded
from server.core.request import Completed, Event, Failed, Preview, Request, Rows, Timings
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Scheduler
from server.rpc.response_stream import MAX_PREVIEWS, ResponseStream, ThreadBridge
from tests.support.programs import KEY, Reader, RecordingObserver, program, request

MOST = 4


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(Scheduler(Limits(max_queued_rows=MOST)), RecordingObserver())
    made.add(KEY, program())
    made.start()
    yield made
    made.stop()


def _asked(call: ResponseStream, rows: int = 1) -> Request:
    made = request(rows=rows)
    made.deliver = call.deliver
    return made


async def _events(engine: Engine, exchange: ThreadBridge, rows: int) -> list[Event]:
    call, events = ResponseStream(engine, exchange), list[Event]()
    with call:
        call.submit(_asked(call, rows))
        while batch := await call.next():
            events += batch
    return events


@pytest.mark.asyncio
async def test_calls_get_their_own_rows_and_then_nothing_more(engine: Engine) -> None:
    exchange = ThreadBridge(engine, asyncio.get_running_loop())
    answers = await asyncio.gather(*(_events(engine, exchange, 1) for _ in range(MOST)))
    for events in answers:
        assert [type(event) for event in events] == [Rows, Completed]
    assert exchange.num_open == 0


@pytest.mark.asyncio
async def test_what_the_engine_refuses_its_call_raises_and_others_go_on(engine: Engine) -> None:
    exchange = ThreadBridge(engine, asyncio.get_running_loop())
    refused, served = await asyncio.gather(
        _events(engine, exchange, MOST + 1), _events(engine, exchange, MOST), return_exceptions=True
    )
    assert isinstance(refused, Overloaded)
    assert isinstance(served, list)
    assert sum(len(event.indices) for event in served if isinstance(event, Rows)) == MOST
    assert engine.num_queued == engine.num_running == 0


@pytest.mark.asyncio
async def test_a_call_that_is_left_at_once_never_reaches_the_engine(engine: Engine) -> None:
    exchange = ThreadBridge(engine, asyncio.get_running_loop())
    reader = Reader()
    with ResponseStream(engine, exchange) as call:
        left = _asked(call)
        left.deliver = reader.deliver
        call.submit(left)
    await _events(engine, exchange, MOST)
    assert not left.is_closed
    assert not left.submitted_at
    assert not reader.events
    assert engine.num_queued == 0


@pytest.mark.asyncio
async def test_a_reader_that_lags_behind_gets_the_newest_previews(engine: Engine) -> None:
    call = ResponseStream(engine, ThreadBridge(engine, asyncio.get_running_loop()))
    for step in range(MAX_PREVIEWS + 3):
        call.take([Preview(Rows([0], {}), [step])])
    read = await call.next()
    assert [event.steps_done[0] for event in read if isinstance(event, Preview)] == list(
        range(3, MAX_PREVIEWS + 3)
    )


@pytest.mark.asyncio
async def test_one_who_wants_the_whole_answer_is_not_woken_before_its_end(engine: Engine) -> None:
    call = ResponseStream(engine, ThreadBridge(engine, asyncio.get_running_loop()), whole=True)
    reading = asyncio.create_task(call.next())
    parts: list[Event] = [Rows([0], {}), Rows([1], {}), Completed(Timings(0.0, 0.0, 0.0))]
    call.deliver(parts[:1])
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    call.deliver(parts[1:])
    assert await reading == parts


@pytest.mark.asyncio
async def test_what_was_done_before_a_failure_is_read_before_it(engine: Engine) -> None:
    call = ResponseStream(engine, ThreadBridge(engine, asyncio.get_running_loop()))
    done = Rows([0], {})
    call.take([done, Failed(Overloaded("no", 1.0))])
    assert await call.next() == [done]
    with pytest.raises(Overloaded):
        await call.next()
