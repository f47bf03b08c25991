"""Engine access from another process: requests and events cross a connection in batches.

IpcEngineClient is the worker's end, on its event loop; IpcEngineServer is the engine's end, on two threads.
Both send pickled lists of (verb, arguments); each verb is a method of the other end. Deadlines need no
conversion: the monotonic clock is the same for all processes of a machine.
"""

import asyncio
import itertools
import logging
import pickle
import threading
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from server.core.errors import Unavailable
from server.core.request import Completed, Deliver, Event, Failed, Request
from server.models.registry import Model
from server.rpc.instrumentation import CallObserver
from server.rpc.response_stream import EngineClient

log = logging.getLogger(__name__)

Message = tuple[Any, ...]

# Metrics and releases of ended requests wait this long for a request to be sent with.
FLUSH_INTERVAL_SECONDS = 0.05


class IpcEngineClient:
    """Engine client and call observer in a gRPC worker process.

    Args:
        connection: the connection to the engine's process.
        loop: the worker's event loop.
        on_open: called with the served models once they are ready.
        on_close: called when the engine's process asks this one to stop, or has exited; in the second case
            every open request fails with Unavailable first.
    """

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        on_open: Callable[[Sequence[Model]], None],
        on_close: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._on_close = on_close
        self._ids = itertools.count()
        self._id_of: dict[Request, int] = {}
        # Receivers of the events of requests that have not ended.
        self._receivers: dict[int, Deliver] = {}
        self._unsent: list[Message] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_disconnected = False
        self._verbs: dict[str, Callable[..., None]] = {
            "open": on_open,
            "deliver": self._deliver,
            "close": on_close,
        }
        loop.add_reader(connection.fileno(), self._receive)

    def submit(self, request: Request, deliver: Deliver, notify: bool = True) -> None:
        """Queue a request in the engine's process."""
        number = next(self._ids)
        self._id_of[request], self._receivers[number] = number, deliver
        self._unsent.append(("submit", number, request))
        if notify:
            self.notify()

    def notify(self) -> None:
        """Send all unsent messages."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unsent:
            messages, self._unsent = self._unsent, []
            try:
                self._connection.send_bytes(pickle.dumps(messages, pickle.HIGHEST_PROTOCOL))
            except OSError:
                self._disconnect()

    def acknowledge(self, request: Request, rows: int) -> None:
        """Record that the caller has read `rows` rows."""
        if (number := self._id_of.get(request)) is not None:
            self._unsent.append(("acknowledge", number, rows))
            self.notify()

    def release(self, request: Request) -> None:
        """Free a request's buffers, and cancel it if it is open."""
        if (number := self._id_of.pop(request, None)) is None:
            return
        is_open = self._receivers.pop(number, None) is not None
        self._unsent.append(("release", number))
        if is_open:
            self.notify()
        else:
            self._send_soon()

    def on_call_start(self) -> None:
        """Count a call in the engine's process."""
        self._unsent.append(("call_start",))
        self._send_soon()

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """Count the end of a call in the engine's process."""
        self._unsent.append(("call_end", method, model, code, seconds))
        self._send_soon()

    def listening(self) -> None:
        """Report that this worker accepts connections."""
        self._unsent.append(("listening",))
        self.notify()

    def close(self) -> None:
        """Send all unsent messages and close the connection."""
        self.notify()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()

    def _send_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_INTERVAL_SECONDS, self.notify)

    def _receive(self) -> None:
        try:
            messages = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._disconnect()
            return
        for verb, *arguments in messages:
            self._verbs[verb](*arguments)

    def _deliver(self, number: int, events: Sequence[Event]) -> None:
        has_ended = isinstance(events[-1], Completed | Failed)
        deliver = self._receivers.pop(number, None) if has_ended else self._receivers.get(number)
        if deliver is not None:
            deliver(events)

    def _disconnect(self) -> None:
        """Fail all open requests: the engine's process has exited."""
        if self._is_disconnected:
            return
        self._is_disconnected = True
        self._loop.remove_reader(self._connection.fileno())
        failed = [Failed(Unavailable("the engine's process exited"))]
        for number in list(self._receivers):
            self._deliver(number, failed)
        self._on_close()


class WorkerObserver(CallObserver, Protocol):
    """Callbacks for calls and workers, invoked on the connection's thread in the engine's process."""

    def on_worker_lost(self, calls: int) -> None:
        """A worker disconnected with `calls` calls in flight."""

    def on_worker_restart(self) -> None:
        """A worker that exited unexpectedly was replaced."""


class IpcEngineServer:
    """The engine's end of a worker's connection: one thread receives requests, another sends events."""

    def __init__(self, connection: Connection, engine: EngineClient, observer: WorkerObserver) -> None:
        self._connection = connection
        self._engine = engine
        self._observer = observer
        self._requests: dict[int, Request] = {}
        self._unsent: SimpleQueue[Message | None] = SimpleQueue()
        self._num_calls = 0
        self.is_listening = threading.Event()
        self._threads = [
            threading.Thread(target=self._receive, name="ipc-receive", daemon=True),
            threading.Thread(target=self._send, name="ipc-send", daemon=True),
        ]

    def start(self) -> None:
        """Serve the worker until it disconnects."""
        for thread in self._threads:
            thread.start()

    def open(self, models: Sequence[Model]) -> None:
        """Send the served models to the worker, which then accepts calls."""
        self._unsent.put(("open", models))

    def close(self) -> None:
        """Ask the worker to finish its calls and exit."""
        self._unsent.put(("close",))

    def _receive(self) -> None:
        verbs: dict[str, Callable[..., None]] = {
            "listening": self.is_listening.set,
            "submit": self._submit,
            "acknowledge": self._acknowledge,
            "release": self._release,
            "call_start": self._count_call_start,
            "call_end": self._count_call_end,
        }
        try:
            while True:
                for verb, *arguments in pickle.loads(self._connection.recv_bytes()):
                    verbs[verb](*arguments)
                self._engine.notify()
        except (EOFError, OSError):
            self._disconnect()

    def _disconnect(self) -> None:
        """Release all requests of a worker that has exited."""
        for number in list(self._requests):
            self._release(number)
        self._observer.on_worker_lost(self._num_calls)
        self._unsent.put(None)

    def _submit(self, number: int, request: Request) -> None:
        self._requests[number] = request
        self._engine.submit(request, partial(self._post, number), notify=False)

    def _acknowledge(self, number: int, rows: int) -> None:
        self._engine.acknowledge(self._requests[number], rows)

    def _release(self, number: int) -> None:
        self._engine.release(self._requests.pop(number))

    def _count_call_start(self) -> None:
        self._num_calls += 1
        self._observer.on_call_start()

    def _count_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        self._num_calls -= 1
        self._observer.on_call_end(method, model, code, seconds)

    def _post(self, number: int, events: Sequence[Event]) -> None:
        self._unsent.put(("deliver", number, events))

    def _send(self) -> None:
        """Send all queued messages together, until the worker has disconnected."""
        try:
            while (message := self._unsent.get()) is not None:
                messages = [message, *_pop_all(self._unsent)]
                self._connection.send_bytes(pickle.dumps(messages, pickle.HIGHEST_PROTOCOL))
        except OSError:
            log.debug("worker disconnected while events were being sent")


def _pop_all(queue: SimpleQueue[Message | None]) -> list[Message]:
    """Return the messages in a queue; a None stays in it."""
    messages: list[Message] = []
    while True:
        try:
            message = queue.get_nowait()
        except Empty:
            return messages
        if message is None:
            queue.put(None)
            return messages
        messages.append(message)
