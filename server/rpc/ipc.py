"""The engine from another process: requests go over a connection in bunches, events come back likewise.

`Link` is the front end's end, on its event loop; `Host` is the engine's, on two threads. Both
speak in pickled lists of (verb, arguments), each verb a method of the other end. Deadlines may
travel as they are: the monotonic clock is one for all processes of a machine.
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

from server.core.errors import SamovarError, Unavailable
from server.core.request import Completed, Event, Failed, Request, RowInputs
from server.core.spec import ProgramKey
from server.models.registry import Model
from server.rpc.response_stream import CallObserver, EngineClient

log = logging.getLogger(__name__)

Message = tuple[Any, ...]

# What counts calls may go with the next request, or after so long.
FLUSH_INTERVAL_SECONDS = 0.05
# What a request's owner knows of it; the counts and times are the scheduler's and the engine's.
_REQUEST_FIELDS = (
    "program",
    "rows",
    "steps",
    "seed",
    "first_row",
    "deadline",
    "preview_every",
    "max_unread_rows",
    "is_batch",
    "has_early_exit",
    "buffered_bytes",
)


class IpcEngineClient:
    """The engine, as a front end sees it, and whom it tells of calls.

    `opened` is told the models once they are ready, `closed` when the engine's process wants this
    one to end, or is gone: then every open request fails with ServerUnavailable.
    """

    def __init__(
        self,
        connection: Connection,
        loop: asyncio.AbstractEventLoop,
        opened: Callable[[Sequence[Model]], None],
        closed: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._loop = loop
        self._closed = closed
        self._numbers = itertools.count()
        self._requests: dict[int, Request] = {}
        self._numbered: dict[Request, int] = {}
        self._unsent: list[Message] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_lost = False
        self._verbs: dict[str, Callable[..., None]] = {
            "open": opened,
            "deliver": self._deliver,
            "close": closed,
        }
        loop.add_reader(connection.fileno(), self._receive)

    def submit(self, request: Request, wakes: bool = True) -> None:
        """Send a request; should the engine refuse it, the error is delivered."""
        number = next(self._numbers)
        self._requests[number], self._numbered[request] = request, number
        facts = tuple(getattr(request, name) for name in _REQUEST_FIELDS)
        self._unsent.append(("submit", number, facts, request.inputs.parameters, request.inputs.inputs))
        if wakes:
            self.notify()

    def notify(self) -> None:
        """Send what there is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unsent:
            messages, self._unsent = self._unsent, []
            try:
                self._connection.send_bytes(pickle.dumps(messages, pickle.HIGHEST_PROTOCOL))
            except OSError:
                self._lose()

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader of a request has taken so many of its rows."""
        if (number := self._numbered.get(request)) is not None:
            self._unsent.append(("acknowledge", number, rows))
            self.notify()

    def release(self, request: Request) -> None:
        """Nobody reads a request any more."""
        if (number := self._numbered.pop(request, None)) is not None:
            self._requests.pop(number, None)
            self._unsent.append(("leave", number))
            if request.is_closed:
                self._send_soon()
            else:
                self.notify()

    def on_call_start(self) -> None:
        """A call has come in."""
        self._count("began")

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """A call has ended."""
        self._count("ended", method, model, code, seconds)

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None:
        """A request that has ended had waited so long for its first step."""
        self._count("queued", program, seconds)

    def listening(self) -> None:
        """This front end can be reached."""
        self._unsent.append(("listening",))
        self.notify()

    def close(self) -> None:
        """Send what is left, and hang up."""
        self.notify()
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()

    def _count(self, *message: Any) -> None:
        self._unsent.append(message)
        self._send_soon()

    def _send_soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(FLUSH_INTERVAL_SECONDS, self.notify)

    def _receive(self) -> None:
        try:
            messages = pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            self._lose()
            return
        for verb, *arguments in messages:
            self._verbs[verb](*arguments)

    def _deliver(self, number: int, events: Sequence[Event]) -> None:
        if (request := self._requests.get(number)) is None:
            return
        if isinstance(events[-1], Completed | Failed):
            request.close_reason = "ended"
        request.deliver(events)

    def _lose(self) -> None:
        """The engine's process is gone."""
        if self._is_lost:
            return
        self._is_lost = True
        self._loop.remove_reader(self._connection.fileno())
        lost = [Failed(Unavailable("the engine's process has ended"))]
        for number in list(self._requests):
            self._deliver(number, lost)
        self._closed()


class WorkerObserver(CallObserver, Protocol):
    """Whom the engine's end tells of calls; called on its own thread."""

    def on_worker_lost(self, calls: int) -> None: ...

    def on_worker_restart(self) -> None: ...


class IpcEngineServer:
    """The engine's end of a link: a thread hands requests over, another one sends events."""

    def __init__(self, connection: Connection, engine: EngineClient, observer: WorkerObserver) -> None:
        self._connection = connection
        self._engine = engine
        self._observer = observer
        self._requests: dict[int, Request] = {}
        self._unsent: SimpleQueue[Message | None] = SimpleQueue()
        self._num_calls = 0
        self.is_listening = threading.Event()
        self._threads = [
            threading.Thread(target=self._receive, name="link-in", daemon=True),
            threading.Thread(target=self._send, name="link-out", daemon=True),
        ]

    def start(self) -> None:
        """Listen to the front end, until it hangs up."""
        for thread in self._threads:
            thread.start()

    def open(self, models: Sequence[Model]) -> None:
        """Tell the front end what is served."""
        self._unsent.put(("open", models))

    def close(self) -> None:
        """Ask the front end to finish its calls and end."""
        self._unsent.put(("close",))

    def _receive(self) -> None:
        verbs: dict[str, Callable[..., None]] = {
            "listening": self.is_listening.set,
            "submit": self._submit,
            "acknowledge": self._acknowledge,
            "leave": self._leave,
            "began": self._began,
            "ended": self._ended,
            "queued": self._observer.on_dequeued,
        }
        try:
            while True:
                for verb, *arguments in pickle.loads(self._connection.recv_bytes()):
                    verbs[verb](*arguments)
                self._engine.notify()
        except (EOFError, OSError):
            self._hang_up()

    def _hang_up(self) -> None:
        """The front end is gone, and with it all who read."""
        for number in list(self._requests):
            self._leave(number)
        self._observer.on_worker_lost(self._num_calls)
        self._unsent.put(None)

    def _submit(self, number: int, facts: tuple[Any, ...], parameters: Any, inputs: Any) -> None:
        known = dict(zip(_REQUEST_FIELDS, facts, strict=True))
        request = Request(**known, inputs=RowInputs(parameters, inputs), deliver=partial(self._post, number))
        self._requests[number] = request
        try:
            self._engine.submit(request, wakes=False)
        except Exception as error:  # whatever it was, the call is where it is answered
            request.close_reason = "refused"
            travels = isinstance(error, SamovarError)
            self._post(number, [Failed(error if travels else RuntimeError(str(error)))])

    def _acknowledge(self, number: int, rows: int) -> None:
        request = self._requests[number]
        if not request.is_closed:
            self._engine.acknowledge(request, rows)

    def _leave(self, number: int) -> None:
        self._engine.release(self._requests.pop(number))

    def _began(self) -> None:
        self._num_calls += 1
        self._observer.on_call_start()

    def _ended(self, method: str, model: str, code: str, seconds: float) -> None:
        self._num_calls -= 1
        self._observer.on_call_end(method, model, code, seconds)

    def _post(self, number: int, events: Sequence[Event]) -> None:
        self._unsent.put(("deliver", number, events))

    def _send(self) -> None:
        """Send what there is, together, until there is nobody to send to."""
        try:
            while (message := self._unsent.get()) is not None:
                self._connection.send_bytes(
                    pickle.dumps([message, *_waiting(self._unsent)], pickle.HIGHEST_PROTOCOL)
                )
        except OSError:
            log.debug("a front end hung up while it was told something")


def _waiting(queue: SimpleQueue[Message | None]) -> list[Message]:
    """What else is in a queue; a None stays for the next look."""
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
