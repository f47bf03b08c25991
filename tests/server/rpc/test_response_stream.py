"""Response streams: every call gets its own events, once and in order."""

import asyncio
from collections.abc import Iterator

import pytest

from server.core.errors import Overloaded
from server.core.request import Completed, Event, Failed, Preview, Rows, Timings
from server.engine.engine import Engine
from server.engine.scheduler import Limits, Scheduler
from server.rpc.response_stream import MAX_PREVIEWS, ResponseStream, ThreadBridge
from tests.support.programs import KEY, RecordingObserver, new_runner, request

MAX_ROWS = 4


@pytest.fixture
def observer() -> RecordingObserver:
    return RecordingObserver()


@pytest.fixture
def engine(observer: RecordingObserver) -> Iterator[Engine]:
    started = Engine(Scheduler(Limits(max_queued_rows=MAX_ROWS)), observer)
    started.add(KEY, new_runner())
    started.start()
    yield started
    started.stop()


async def _events(engine: Engine, bridge: ThreadBridge, rows: int) -> list[Event]:
    events: list[Event] = []
    with ResponseStream(engine, bridge) as stream:
        stream.submit(request(rows=rows))
        while batch := await stream.next():
            events += batch
    return events


def _new_stream(engine: Engine, whole: bool = False) -> ResponseStream:
    return ResponseStream(engine, ThreadBridge(engine, asyncio.get_running_loop()), whole)


@pytest.mark.asyncio
async def test_concurrent_streams_get_their_own_rows_and_end(engine: Engine) -> None:
    bridge = ThreadBridge(engine, asyncio.get_running_loop())
    responses = await asyncio.gather(*(_events(engine, bridge, 1) for _ in range(MAX_ROWS)))
    for events in responses:
        assert [type(event) for event in events] == [Rows, Completed]
    assert bridge.num_open == 0


@pytest.mark.asyncio
async def test_stream_of_rejected_request_raises_and_others_continue(engine: Engine) -> None:
    bridge = ThreadBridge(engine, asyncio.get_running_loop())
    rejected, served = await asyncio.gather(
        _events(engine, bridge, MAX_ROWS + 1), _events(engine, bridge, MAX_ROWS), return_exceptions=True
    )
    assert isinstance(rejected, Overloaded)
    assert isinstance(served, list)
    assert sum(len(event.indices) for event in served if isinstance(event, Rows)) == MAX_ROWS
    assert engine.num_queued == engine.num_running == 0


@pytest.mark.asyncio
async def test_stream_released_at_once_never_reaches_the_engine(
    engine: Engine, observer: RecordingObserver
) -> None:
    bridge = ThreadBridge(engine, asyncio.get_running_loop())
    with ResponseStream(engine, bridge) as stream:
        stream.submit(request())
    await _events(engine, bridge, MAX_ROWS)
    assert observer.dequeued == 1
    assert observer.rows == MAX_ROWS
    assert engine.num_queued == 0


@pytest.mark.asyncio
async def test_slow_reader_gets_the_newest_previews(engine: Engine) -> None:
    stream = _new_stream(engine)
    for step in range(MAX_PREVIEWS + 3):
        stream.receive([Preview(Rows([0], {}), [step])])
    read = await stream.next()
    steps = [event.steps_done[0] for event in read if isinstance(event, Preview)]
    assert steps == list(range(3, MAX_PREVIEWS + 3))


@pytest.mark.asyncio
async def test_whole_stream_is_not_woken_before_the_end(engine: Engine) -> None:
    stream = _new_stream(engine, whole=True)
    reading = asyncio.create_task(stream.next())
    events: list[Event] = [Rows([0], {}), Rows([1], {}), Completed(Timings(0.0, 0.0, 0.0))]
    stream.deliver(events[:1])
    for _ in range(10):
        await asyncio.sleep(0)
    assert not reading.done()
    stream.deliver(events[1:])
    assert await reading == events


@pytest.mark.asyncio
async def test_rows_before_a_failure_are_read_first(engine: Engine) -> None:
    stream = _new_stream(engine)
    rows = Rows([0], {})
    stream.receive([rows, Failed(Overloaded("no", 1.0))])
    assert await stream.next() == [rows]
    with pytest.raises(Overloaded):
        await stream.next()
