"""One call's side of a request: where the engine's events reach the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from server.core.request import Completed, Event, Failed, Preview, Request, Rows
from server.core.spec import ProgramKey

MAX_PREVIEWS = 16

# While other calls are open, a bunch of requests waits for more: so many rounds of the event loop for each
# that the last bunch had. One that comes by itself is soon handed over, and where many come bunches grow.
ROUNDS_EACH = 32
MOST_ROUNDS = 1024


class EngineClient(Protocol):
    """Who computes requests: the engine, or a link to the process that it runs in."""

    def submit(self, request: Request, wakes: bool = True) -> None:
        """Queue a request, whose events go to its `deliver`; refused, it raises or delivers the error."""
        ...

    def notify(self) -> None:
        """See to what was submitted."""
        ...

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader of a request has taken so many of its rows."""
        ...

    def release(self, request: Request) -> None:
        """Nobody reads a request any more, whether or not it has ended."""
        ...


class CallObserver(Protocol):
    """Whom the edge tells of calls; called on the event loop."""

    def on_call_start(self) -> None: ...

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None: ...

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None: ...


class ThreadBridge:
    """Between an event loop and the device thread: what is ready goes over together.

    Each time that one thread wakes the other they contend for the interpreter, which costs more than a
    small graph does. So requests are handed over after some rounds of the event loop, which take
    microseconds where there is nothing else to do; and one wake-up tells all calls what a turn had for them.
    """

    def __init__(self, engine: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._requests: dict[Request, ResponseStream] = {}
        self._news: deque[tuple[ResponseStream, Sequence[Event]]] = deque()
        self._has_rung = False
        self._rounds = ROUNDS_EACH
        self.num_open = 0

    def submit(self, request: Request, call: "ResponseStream") -> None:
        """Have a request submitted, on the event loop; if the engine will not, the call gets the error."""
        if not self._requests:
            self._hand_over(self._rounds if self.num_open else 0)
        self._requests[request] = call

    def release(self, request: Request) -> None:
        """Nobody reads a request any more, whether or not it has been handed over."""
        if self._requests.pop(request, None) is None:
            self._engine.release(request)

    def put(self, call: "ResponseStream", events: Sequence[Event]) -> None:
        """Leave events for a call, on any thread."""
        self._news.append((call, events))
        if not self._has_rung:
            self._has_rung = True
            self._loop.call_soon_threadsafe(self._tell)

    def _hand_over(self, rounds: int) -> None:
        """Submit what there is, after so many rounds."""
        if rounds >= 0:
            self._loop.call_soon(self._hand_over, rounds - 1)
            return
        requests, self._requests = self._requests, {}
        self._rounds = min(ROUNDS_EACH * len(requests), MOST_ROUNDS)
        for request, call in requests.items():
            try:
                self._engine.submit(request, wakes=False)
            except Exception as error:  # whatever it was, the call is where it is answered
                request.close_reason = "refused"
                call.take([Failed(error)])
        self._engine.notify()

    def _tell(self) -> None:
        # Before the news are read: what comes later rings again.
        self._has_rung = False
        while self._news:
            call, events = self._news.popleft()
            call.take(events)


class ResponseStream:
    """The events of one request, in order. As a context manager it leaves the request at the end.

    Rows that have been read are acknowledged to the engine: it computes no more
    rows ahead of a slow reader than the request's window. Of previews such a reader
    gets the newest. One who wants the `whole` answer is not woken before its end.
    """

    def __init__(self, engine: EngineClient, exchange: ThreadBridge, whole: bool = False) -> None:
        self._engine = engine
        self._exchange = exchange
        self._whole = whole
        self._withheld: list[Event] = []
        self._previews: deque[Event] = deque(maxlen=MAX_PREVIEWS)
        self._results: list[Event] = []
        self._read: list[Event] = []
        self._arrival: asyncio.Future[None] | None = None
        self._request: Request | None = None

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events, on the thread that computes."""
        if self._whole:
            self._withheld += events
            if not isinstance(events[-1], Completed | Failed):
                return
            events = self._withheld
        self._exchange.put(self, events)

    def take(self, events: Sequence[Event]) -> None:
        """Take events, on the event loop."""
        if isinstance(events[-1], Preview):
            self._previews.extend(events)
        else:
            self._results += events
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def submit(self, request: Request) -> None:
        """Hand the request to the engine, once; if it will not take it, `next` raises why."""
        self._exchange.submit(request, self)
        self._request = request

    def __enter__(self) -> "ResponseStream":
        self._exchange.num_open += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._exchange.num_open -= 1
        if self._request is not None:
            self._exchange.release(self._request)

    async def next(self) -> list[Event]:
        """What has arrived since it was last asked, once there is any; nothing after the request's end.

        Raises the error that the request failed with, once what came before it has been read.
        """
        self._acknowledge()
        if self._read and isinstance(self._read[-1], Completed):
            return []
        while not self._results and not self._previews:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        results, self._results = self._results, []
        if len(results) > 1 and isinstance(results[-1], Failed):
            self._results.append(results.pop())
        # Results last: no preview of a row ever follows the row itself.
        self._read = [*_drained(self._previews), *results]
        if isinstance(last := self._read[-1], Failed):
            raise last.error
        return self._read

    def _acknowledge(self) -> None:
        """Tell the engine what was read since it was last told, while that still matters to it."""
        if self._request is None or self._request.is_closed:
            return
        taken = sum(len(event.indices) for event in self._read if isinstance(event, Rows))
        if taken:
            self._engine.acknowledge(self._request, taken)


def _drained(events: deque[Event]) -> list[Event]:
    return [events.popleft() for _ in range(len(events))]
