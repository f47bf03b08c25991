"""One call's side of a request: where the device thread's events reach the event loop."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from server.engine import Engine
from server.request import Completed, Event, Failed, Preview, Request, Rows

MAX_PENDING = 256


class Call:
    """The events of one request, in order. As a context manager it cancels what is unfinished.

    Rows that have been read are acknowledged to the engine: it computes no more
    rows ahead of a slow reader than the request's window.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[Sequence[Event]] = asyncio.Queue()
        self._request: Request | None = None

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events, on any thread. A reader that lags behind misses previews, never rows."""
        if isinstance(events[-1], Preview) and self._arrived.qsize() >= MAX_PENDING:
            return
        self._loop.call_soon_threadsafe(self._arrived.put_nowait, events)

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
            batch = list(await self._arrived.get())
            while not self._arrived.empty():
                batch += self._arrived.get_nowait()
            last = batch[-1]
            if isinstance(last, Failed):
                raise last.error
            yield batch
            self._acknowledge(batch)
            if isinstance(last, Completed):
                return

    def _acknowledge(self, batch: list[Event]) -> None:
        taken = sum(len(event.indices) for event in batch if isinstance(event, Rows))
        if taken and self._request is not None:
            self._engine.acknowledge(self._request, taken)
