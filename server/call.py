"""One call's side of a request: where the device thread's events reach the event loop."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from server.engine import Engine
from server.request import Completed, Event, Failed, Preview, Request, Rows

MAX_PREVIEWS = 16


class Call:
    """The events of one request, in order. As a context manager it cancels what is unfinished.

    Rows that have been read are acknowledged to the engine: it computes no more
    rows ahead of a slow reader than the request's window. Of previews such a reader
    gets the newest.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._previews: deque[Event] = deque(maxlen=MAX_PREVIEWS)
        self._results: list[Event] = []
        self._arrived = asyncio.Event()
        self._request: Request | None = None

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events, on any thread."""
        if isinstance(events[-1], Preview):
            self._previews.extend(events)
            events = ()
        self._loop.call_soon_threadsafe(self._wake, events)

    def submit(self, request: Request) -> None:
        """Hand the request to the engine, once; Overloaded or ServerUnavailable when it will not."""
        self._engine.submit(request)
        self._request = request

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._request is not None and not self._request.is_closed:
            self._engine.cancel(self._request)

    async def batches(self) -> AsyncIterator[list[Event]]:
        """Everything that has arrived since the last batch, until the request has ended.

        Raises the error that the request failed with.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            results, self._results = self._results, []
            # Taken after the results: no preview of a row ever follows the row itself.
            batch = [*_drained(self._previews), *results]
            last = batch[-1] if batch else None
            if isinstance(last, Failed):
                raise last.error
            if batch:
                yield batch
            self._acknowledge(batch)
            if isinstance(last, Completed):
                return

    def _wake(self, results: Sequence[Event]) -> None:
        self._results += results
        self._arrived.set()

    def _acknowledge(self, batch: list[Event]) -> None:
        taken = sum(len(event.indices) for event in batch if isinstance(event, Rows))
        if taken and self._request is not None:
            self._engine.acknowledge(self._request, taken)


def _drained(events: deque[Event]) -> list[Event]:
    return [events.popleft() for _ in range(len(events))]
