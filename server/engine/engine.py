"""The engine: one loop, schedule -> run -> deliver, on a thread of its own.

Runs the programs of every model, whatever their family. Reached through submit,
acknowledge and leave, which never wait for a graph. Knows no transport.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from server.core.errors import DeadlineExceeded, ModelFailed, Unavailable
from server.core.request import Completed, Event, Failed, Preview, Request, Timings
from server.core.restart_policy import RestartPolicy
from server.core.spec import ProgramKey
from server.engine.scheduler import ScheduledStep, Scheduler
from server.execution.program_runner import ProgramRunner, Readout
from server.runtime import is_device_lost

log = logging.getLogger(__name__)

# So many restarts within the period are one too many.
MAX_RESTARTS = 3
RESTART_PERIOD_SECONDS = 300.0
# A request of which so many rows came out non-finite is not worth finishing.
MAX_NONFINITE_ROWS = 16


class Observer(Protocol):
    """Whom the engine tells what it did; called on the device thread."""

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None: ...

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None: ...

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None: ...

    def on_error(self, program: ProgramKey, kind: str) -> None: ...

    def on_restart(self) -> None: ...


class Engine:
    """Owns the device thread, the scheduler and the programs' slots.

    When the device thread is struck by what no program accounts for, open requests fail, `renew`
    opens the programs' graphs again, and the loop goes on. Should that not help, `on_death` is told.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        renew: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._reload_graphs = renew
        self._on_death = on_death
        self._restarts = RestartPolicy(MAX_RESTARTS, RESTART_PERIOD_SECONDS)
        self._programs: dict[ProgramKey, ProgramRunner] = {}
        self._deferred: dict[ProgramKey, list[Readout]] = {}
        self._changed = threading.Condition()
        self._is_stopping = False
        self._is_down = False
        self._thread = threading.Thread(target=self._loop, name="device", daemon=True)

    @property
    def num_queued(self) -> int:
        """Rows that wait for a slot."""
        with self._changed:
            return self._scheduler.num_queued

    @property
    def num_running(self) -> int:
        """Rows in slots."""
        with self._changed:
            return self._scheduler.num_running

    def add(self, key: ProgramKey, program: ProgramRunner) -> None:
        """Make a program known, ready to run."""
        with self._changed:
            self._programs[key] = program
            self._scheduler.add_program(key, program.capacity, program.spec.least_steps)

    def start(self) -> None:
        """Start the device thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the present step; whatever is unfinished fails with ServerUnavailable."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(Unavailable("the server is stopping"))

    def submit(self, request: Request, wakes: bool = True) -> None:
        """Queue a request. Its events go to `request.deliver`, on the device thread, which it `wakes`.

        Raises InvalidRequest when it is larger than all that may wait, Overloaded when too much waits,
        DeadlineExceeded when it cannot be done in time, ServerUnavailable when stopping.
        """
        with self._changed:
            if self._is_stopping:
                raise Unavailable("the server is stopping")
            if self._is_down:
                raise Unavailable("the engine failed and starts again; try again")
            request.submitted_at = self._clock()
            self._scheduler.submit(request, request.submitted_at)
            if wakes:
                self._changed.notify()

    def notify(self) -> None:
        """Look for work, if the device thread sleeps."""
        with self._changed:
            self._changed.notify()

    def release(self, request: Request) -> None:
        """Nobody reads a request any more: what it holds is free, and what is unfinished stops."""
        with self._changed:
            self._scheduler.release(request)
            # A call ends at its deadline for whatever reason; the transport may be the first to notice.
            is_late = request.deadline is not None and request.deadline <= self._clock()
            if self._scheduler.close(request, "deadline" if is_late else "cancelled"):
                self._changed.notify()

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader of a request has taken so many of its rows."""
        with self._changed:
            self._scheduler.acknowledge(request, rows)
            self._changed.notify()

    def _loop(self) -> None:
        while True:
            try:
                while (turn := self._next_step()) is not None:
                    self._execute(turn)
                return
            except BaseException:  # whatever it was, nobody else would tell the clients
                log.critical("the device thread was struck down", exc_info=True)
            if not self._restart():
                self._on_death()
                return

    def _restart(self) -> bool:
        """Fail what is open and begin anew; False when that is no use."""
        is_hopeless = self._restarts.is_exhausted(self._clock())
        with self._changed:
            self._is_down = True
        self._observer.on_restart()
        self._fail_all(Unavailable("the engine failed; try again"))
        try:
            if not is_hopeless:
                self._reload_graphs()
                for program in self._programs.values():
                    program.clear()
        except BaseException:
            log.critical("the programs could not be opened again", exc_info=True)
            is_hopeless = True
        with self._changed:
            self._scheduler.forget_dropped()
            self._is_down, self._is_stopping = is_hopeless, self._is_stopping or is_hopeless
        return not is_hopeless

    def _next_step(self) -> ScheduledStep | None:
        with self._changed:
            while not self._is_stopping:
                self._drop_expired()
                if turn := self._scheduler.next_step():
                    return turn
                self._changed.wait(self._wait_timeout())
        return None

    def _wait_timeout(self) -> float | None:
        """Seconds until a deadline passes, or for ever."""
        deadline = self._scheduler.next_deadline()
        if deadline is None:
            return None
        return min(max(0.0, deadline - self._clock()), threading.TIMEOUT_MAX)

    def _execute(self, turn: ScheduledStep) -> None:
        program = self._programs[turn.program]
        try:
            readouts = self._run(program, turn)
        except Exception as error:
            if is_device_lost(error):
                raise
            log.exception("%s failed; its rows are dropped", turn.program)
            self._observer.on_error(turn.program, "graph")
            held = self._deferred.pop(turn.program, [])
            joining = (admission.request for admission in turn.admissions)
            taking_part = {*program.slots.requests, *joining, *(readout.request for readout in held)}
            self._fail(taking_part, ModelFailed(f"{turn.program} failed: {type(error).__name__}"))
            self._count_discarded(held)
            return
        self._deliver(self._defer(program, turn, readouts) if turn.width else readouts)

    def _run(self, program: ProgramRunner, turn: ScheduledStep) -> list[Readout]:
        for request in turn.dropped:
            self._observer.on_steps_discarded(turn.program, program.slots.drop(request), request.close_reason)
        now = self._clock()
        for admission in turn.admissions:
            if admission.first == 0:
                admission.request.started_at = now
            program.slots.admit(admission.request, admission.first, admission.count)
        if not (rows := program.slots.num_active):
            return []
        taking_part = program.slots.requests
        readouts = program.advance(turn.width)
        seconds = self._clock() - now
        for _ in range(program.pop_oom_count()):
            self._observer.on_error(turn.program, "out_of_memory")
        for request in taking_part:
            request.model_seconds += seconds
        bucket = program.bucket(max(rows, turn.width))
        self._observer.on_step(turn.program, rows, bucket, seconds)
        with self._changed:
            self._scheduler.record_step_time(turn.program, bucket, seconds)
        return readouts

    def _defer(
        self, program: ProgramRunner, turn: ScheduledStep, readouts: Sequence[Readout]
    ) -> list[Readout]:
        """A batch of whole requests is answered at once, when no row of it is left."""
        held = [*self._deferred.pop(turn.program, ()), *readouts]
        if not program.slots.num_active:
            return held
        self._deferred[turn.program] = held
        return []

    def _deliver(self, readouts: Sequence[Readout]) -> None:
        """Settle a turn's readouts first, then tell their readers, who wake up and want the interpreter."""
        with self._changed:
            news = [(readout.request, self._record(readout)) for readout in readouts]
        for request, events in news:
            if events:
                request.deliver(events)

    def _record(self, readout: Readout) -> list[Event]:
        """Count a readout; what its reader is to be told."""
        request, count = readout.request, len(readout.rows.indices)
        if request.is_closed:
            self._count_discarded([readout])
            return []
        if not readout.is_finished:
            return [Preview(readout.rows, readout.steps_done)]
        events: list[Event] = []
        if readout.is_finite:
            self._observer.on_rows_delivered(request.program, count)
            events.append(readout.rows)
        else:
            self._record_nonfinite(readout)
        self._scheduler.finish(request, count)
        if len(request.nonfinite_rows) >= MAX_NONFINITE_ROWS:
            self._scheduler.close(request, "failed")
        if request.is_closed:
            events.append(Failed(_loss(request)) if request.lost else Completed(self._timings(request)))
        return events

    def _record_nonfinite(self, readout: Readout) -> None:
        """Rows that came out non-finite are nobody's answer, and no reader will acknowledge them."""
        request, indices = readout.request, readout.rows.indices
        request.nonfinite_rows += tuple(indices)
        self._scheduler.acknowledge(request, len(indices))
        for _ in indices:
            self._observer.on_error(request.program, "non_finite")
        self._observer.on_steps_discarded(request.program, sum(readout.steps_done), "failed")

    def _timings(self, request: Request) -> Timings:
        return Timings(
            queue=request.started_at - request.submitted_at,
            run=self._clock() - request.started_at,
            compute=request.model_seconds,
        )

    def _drop_expired(self) -> None:
        now = self._clock()
        for request in self._scheduler.expired(now):
            has_passed = request.deadline is not None and request.deadline <= now
            what = "passed" if has_passed else "cannot be met by the rows that wait, at the measured pace,"
            done = f"{request.finished} of {request.rows} rows were done"
            self._close(request, DeadlineExceeded(f"the deadline {what} when {done}"), "deadline")

    def _fail_all(self, error: Exception) -> None:
        """Fail every open request and empty the slots."""
        self._fail(self._scheduler.open_requests(), error)
        for key, program in self._programs.items():
            self._count_discarded(self._deferred.pop(key, ()))
            for request, steps in program.slots.empty().items():
                self._observer.on_steps_discarded(key, steps, request.close_reason)

    def _count_discarded(self, readouts: Iterable[Readout]) -> None:
        """Count the steps of rows that were read out for requests that are closed."""
        for readout in readouts:
            if readout.is_finished:
                request = readout.request
                self._observer.on_steps_discarded(
                    request.program, sum(readout.steps_done), request.close_reason
                )

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        with self._changed:
            for request in requests:
                try:
                    self._close(request, error, "failed")
                except Exception:  # one that cannot be told must not keep the others from knowing
                    log.exception("a client could not be told that its request failed")

    def _close(self, request: Request, error: Exception, reason: str) -> None:
        if self._scheduler.close(request, reason):
            request.deliver([Failed(error)])


def _loss(request: Request) -> ModelFailed:
    """What a request fails with of which rows came out non-finite."""
    rows = "row" if len(request.nonfinite_rows) == 1 else "rows"
    which = ", ".join(map(str, sorted(request.nonfinite_rows)[:MAX_NONFINITE_ROWS]))
    rest = "all others are done" if request.is_complete else "what was left has been dropped"
    return ModelFailed(f"{request.program}: {rows} {which} came out non-finite; {rest}")
