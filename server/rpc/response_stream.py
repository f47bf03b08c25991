"""Response stream of a call: the engine's events, moved from the device thread to the event loop."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from server.core.request import Completed, Deliver, Event, Failed, Preview, Request, Rows

MAX_PREVIEWS = 16

# While other calls are open, submission is delayed by this many iterations of the event loop for each request
# of the previous submission, so that requests that arrive together are submitted together.
ROUNDS_PER_REQUEST = 32
MAX_ROUNDS = 1024


class EngineClient(Protocol):
    """The engine as callers see it: the engine itself, or a connection to its process."""

    def submit(self, request: Request, deliver: Deliver, notify: bool = True) -> None:
        """Queue a request. A rejected request is delivered its error; nothing is raised."""
        ...

    def notify(self) -> None:
        """Start the requests that were submitted with `notify=False`."""
        ...

    def acknowledge(self, request: Request, rows: int) -> None:
        """Record that the caller has read `rows` rows; ignored once the request has ended."""
        ...

    def release(self, request: Request) -> None:
        """Free a request's buffers, and cancel it if it is open."""
        ...


class ThreadBridge:
    """Moves requests from the event loop to the engine, and events back, in batches.

    Each time that one thread wakes the other they contend for the GIL, which costs more than a small graph.
    Requests are therefore submitted after some iterations of the event loop, which take microseconds when
    it is idle; and one wake-up of the event loop delivers the events of all calls.
    """

    def __init__(self, engine: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._unsubmitted: dict[Request, ResponseStream] = {}
        self._undelivered: deque[tuple[ResponseStream, Sequence[Event]]] = deque()
        self._is_delivery_scheduled = False
        self._rounds = ROUNDS_PER_REQUEST
        self.num_open = 0

    def submit(self, request: Request, stream: "ResponseStream") -> None:
        """Submit a request soon; called on the event loop."""
        if not self._unsubmitted:
            self._submit_after(self._rounds if self.num_open else 0)
        self._unsubmitted[request] = stream

    def release(self, request: Request) -> None:
        """Release a request, whether or not it has been submitted."""
        if self._unsubmitted.pop(request, None) is None:
            self._engine.release(request)

    def deliver(self, stream: "ResponseStream", events: Sequence[Event]) -> None:
        """Deliver events to a stream on the event loop; called on any thread."""
        self._undelivered.append((stream, events))
        if not self._is_delivery_scheduled:
            self._is_delivery_scheduled = True
            self._loop.call_soon_threadsafe(self._deliver_all)

    def _submit_after(self, rounds: int) -> None:
        """Submit all requests after `rounds` iterations of the event loop."""
        if rounds >= 0:
            self._loop.call_soon(self._submit_after, rounds - 1)
            return
        requests, self._unsubmitted = self._unsubmitted, {}
        self._rounds = min(ROUNDS_PER_REQUEST * len(requests), MAX_ROUNDS)
        for request, stream in requests.items():
            self._engine.submit(request, stream.deliver, notify=False)
        self._engine.notify()

    def _deliver_all(self) -> None:
        # Cleared first: an event that arrives during the loop schedules another delivery.
        self._is_delivery_scheduled = False
        while self._undelivered:
            stream, events = self._undelivered.popleft()
            stream.receive(events)


class ResponseStream:
    """Events of one request, in order; a context manager that releases the request at its end.

    Rows that were read are acknowledged to the engine, which computes no more unread rows than the request
    allows. A slow reader gets the newest previews only.

    Args:
        engine: acknowledges rows.
        bridge: submits the request and delivers its events.
        whole: deliver all events at the request's end, with one wake-up.
    """

    def __init__(self, engine: EngineClient, bridge: ThreadBridge, whole: bool = False) -> None:
        self._engine = engine
        self._bridge = bridge
        self._whole = whole
        self._withheld: list[Event] = []
        self._previews: deque[Event] = deque(maxlen=MAX_PREVIEWS)
        self._results: list[Event] = []
        self._read: list[Event] = []
        self._arrival: asyncio.Future[None] | None = None
        self._request: Request | None = None
        self._has_ended = False

    def deliver(self, events: Sequence[Event]) -> None:
        """Take events from the engine, on its thread."""
        if self._whole:
            self._withheld += events
            if not isinstance(events[-1], Completed | Failed):
                return
            events = self._withheld
        self._bridge.deliver(self, events)

    def receive(self, events: Sequence[Event]) -> None:
        """Take events on the event loop, and wake the reader."""
        last = events[-1]
        if isinstance(last, Preview):
            self._previews.extend(events)
        else:
            self._results += events
            self._has_ended = isinstance(last, Completed | Failed)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def submit(self, request: Request) -> None:
        """Submit the request, once; `next` raises the error if the engine rejects it."""
        self._bridge.submit(request, self)
        self._request = request

    def __enter__(self) -> "ResponseStream":
        self._bridge.num_open += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._bridge.num_open -= 1
        if self._request is not None:
            self._bridge.release(self._request)

    async def next(self) -> list[Event]:
        """Return the events since the last call, once there are any; an empty list after the end.

        Raises the error of a failed request once all earlier events have been read.
        """
        self._acknowledge_read()
        if self._read and isinstance(self._read[-1], Completed):
            return []
        while not self._results and not self._previews:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        results, self._results = self._results, []
        if len(results) > 1 and isinstance(results[-1], Failed):
            self._results.append(results.pop())
        previews = [self._previews.popleft() for _ in range(len(self._previews))]
        # Results last: a preview of a row never follows the row itself.
        self._read = [*previews, *results]
        if isinstance(last := self._read[-1], Failed):
            raise last.error
        return self._read

    def _acknowledge_read(self) -> None:
        if self._request is None or self._has_ended:
            return
        rows = sum(len(event.indices) for event in self._read if isinstance(event, Rows))
        if rows:
            self._engine.acknowledge(self._request, rows)
