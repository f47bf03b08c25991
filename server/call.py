"""One call's side of a request: where the device thread's events reach the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence

from server.engine import Engine
from server.request import Completed, Event, Failed, Preview, Request, Rows

MAX_PREVIEWS = 16


class Mailbox:
    """What the device thread has for an event loop: one wake-up tells every call that has news."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._news: deque[tuple[Call, Sequence[Event]]] = deque()
        self._has_rung = False

    def put(self, call: "Call", events: Sequence[Event]) -> None:
        """Leave events for a call, on any thread."""
        self._news.append((call, events))
        if not self._has_rung:
            self._has_rung = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        # Before the news are read: what comes later rings again.
        self._has_rung = False
        while self._news:
            call, events = self._news.popleft()
            call.take(events)


class Call:
    """The events of one request, in order. As a context manager it cancels what is unfinished.

    Rows that have been read are acknowledged to the engine: it computes no more
    rows ahead of a slow reader than the request's window. Of previews such a reader
    gets the newest.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox) -> None:
        self._engine = engine
        self._mailbox = mailbox
        self._previews: deque[Event] = deque(maxlen=MAX_PREVIEWS)
        self._results: list[Event] = []
        self._read: list[Event] = []
        self._arrival: asyncio.Future[None] | None = None
        self._request: Request | None = None

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events, on any thread."""
        self._mailbox.put(self, events)

    def take(self, events: Sequence[Event]) -> None:
        """Take events, on the event loop."""
        if isinstance(events[-1], Preview):
            self._previews.extend(events)
        else:
            self._results += events
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def submit(self, request: Request) -> None:
        """Hand the request to the engine, once; Overloaded or ServerUnavailable when it will not."""
        self._engine.submit(request)
        self._request = request

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._request is not None and not self._request.is_closed:
            self._engine.cancel(self._request)

    async def next(self) -> list[Event]:
        """What has arrived since it was last asked, once there is any; nothing after the request's end.

        Raises the error that the request failed with.
        """
        self._acknowledge()
        if self._read and isinstance(self._read[-1], Completed):
            return []
        while not self._results and not self._previews:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        results, self._results = self._results, []
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
