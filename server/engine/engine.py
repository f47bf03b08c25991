"""Engine: one loop on one thread that schedules, runs and delivers the steps of all requests.

Runs the programs of every model, regardless of its family. `submit`, `acknowledge` and `release` may be
called on any thread and never wait for a graph. Knows no transport.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from server.core.errors import DeadlineExceeded, ModelFailed, SamovarError, ServerError, Unavailable
from server.core.request import Completed, Deliver, Event, Failed, Preview, Request, Timings
from server.core.restart_policy import RestartPolicy
from server.core.spec import ProgramKey
from server.engine.program_queue import QueueEntry
from server.engine.scheduler import ScheduledStep, Scheduler
from server.execution.program_runner import ProgramRunner, Readout
from server.runtime import is_device_lost

log = logging.getLogger(__name__)

# The engine gives up after this many restarts within the period.
MAX_RESTARTS = 3
RESTART_PERIOD_SECONDS = 300.0
# A request with this many non-finite rows is closed before its other rows are done.
MAX_NONFINITE_ROWS = 16


class Observer(Protocol):
    """Callbacks for engine events, invoked on the device thread."""

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None:
        """The first row of a request entered a batch after `seconds` in the queue."""

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """A step of `rows` rows, padded to `bucket` rows, took `seconds`."""

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None:
        """`rows` finished rows were delivered."""

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None:
        """Rows that are never delivered had taken `steps` row-steps; `reason` is why they were dropped."""

    def on_error(self, program: ProgramKey, kind: str) -> None:
        """A "graph" raised, a row was "non_finite", or a batch ran "out_of_memory"."""

    def on_restart(self) -> None:
        """The device thread crashed and restarts."""


class Engine:
    """Owns the device thread, the scheduler and the program runners.

    If the device thread crashes, it fails all open requests, calls `reload_graphs` and resumes. After
    MAX_RESTARTS crashes within RESTART_PERIOD_SECONDS it stops and calls `on_death`.

    Args:
        scheduler: the scheduling policy, accessed under the engine's lock.
        observer: receives engine events.
        clock: monotonic time in seconds.
        reload_graphs: opens the graphs of every program again.
        on_death: called on the device thread when the engine gives up.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        reload_graphs: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._reload_graphs = reload_graphs
        self._on_death = on_death
        self._restarts = RestartPolicy(MAX_RESTARTS, RESTART_PERIOD_SECONDS)
        self._runners: dict[ProgramKey, ProgramRunner] = {}
        # Guards the scheduler, and is notified when there may be work.
        self._work = threading.Condition()
        self._is_stopping = False
        self._is_down = False
        self._thread = threading.Thread(target=self._serve, name="device", daemon=True)

    @property
    def num_queued(self) -> int:
        """Rows that wait for a slot."""
        with self._work:
            return self._scheduler.num_queued

    @property
    def num_running(self) -> int:
        """Rows in slots."""
        with self._work:
            return self._scheduler.num_running

    def add(self, key: ProgramKey, runner: ProgramRunner) -> None:
        """Add a program that is ready to run."""
        with self._work:
            self._runners[key] = runner
            self._scheduler.add_program(key, runner.capacity, runner.spec.least_steps)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop after the current step; unfinished requests fail with Unavailable."""
        with self._work:
            self._is_stopping = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._fail_all(Unavailable("the server is stopping"))

    def submit(self, request: Request, deliver: Deliver, notify: bool = True) -> None:
        """Queue a request; `deliver` takes its events, on the device thread.

        A rejected request is delivered its error as well, on the calling thread: InvalidRequest, Overloaded,
        DeadlineExceeded or Unavailable.

        Args:
            request: the rows to compute.
            deliver: takes Rows and Preview events, then one Completed or Failed.
            notify: whether to wake the device thread; otherwise call `notify` later.
        """
        try:
            with self._work:
                self._check_available()
                self._scheduler.submit(request, deliver, self._clock())
                if notify:
                    self._work.notify()
        except SamovarError as error:
            deliver([Failed(error)])
        except Exception:  # a caller learns of any failure from the events alone
            log.exception("cannot queue a request of %s", request.program)
            deliver([Failed(ServerError(f"cannot queue a request of {request.program}"))])

    def notify(self) -> None:
        """Wake the device thread, after `submit` with `notify=False`."""
        with self._work:
            self._work.notify()

    def acknowledge(self, request: Request, rows: int) -> None:
        """Record that the caller has read `rows` rows of a request."""
        with self._work:
            self._scheduler.acknowledge(request, rows)
            self._work.notify()

    def release(self, request: Request) -> None:
        """Free a request's buffers, and cancel it if it is open."""
        with self._work:
            self._scheduler.release(request)
            # The transport may notice a passed deadline first.
            is_late = request.deadline is not None and request.deadline <= self._clock()
            if self._scheduler.close(request, "deadline" if is_late else "cancelled"):
                self._work.notify()

    def _check_available(self) -> None:
        if self._is_stopping:
            raise Unavailable("the server is stopping")
        if self._is_down:
            raise Unavailable("the engine failed and is restarting; retry")

    def _serve(self) -> None:
        while True:
            try:
                while (step := self._schedule()) is not None:
                    readouts = self._run(step)
                    self._deliver(readouts)
                return
            except BaseException:  # any crash of this thread would leave callers waiting
                log.critical("device thread crashed; restarting the engine", exc_info=True)
            if not self._restart():
                self._on_death()
                return

    def _schedule(self) -> ScheduledStep | None:
        """Wait for the next step; None when the engine stops."""
        with self._work:
            while not self._is_stopping:
                self._close_expired()
                if step := self._scheduler.next_step():
                    self._record_admissions(step)
                    return step
                self._work.wait(self._wait_timeout())
        return None

    def _record_admissions(self, step: ScheduledStep) -> None:
        now = self._clock()
        for admission in step.admissions:
            if admission.first == 0 and (entry := self._scheduler.entry(admission.request)):
                entry.started_at = now
                self._observer.on_dequeued(step.program, now - entry.submitted_at)

    def _run(self, step: ScheduledStep) -> list[Readout]:
        """Run a step of a program; if a graph raises, its requests fail and nothing is read out."""
        runner = self._runners[step.program]
        start = self._clock()
        try:
            for entry in step.dropped:
                steps = runner.drop(entry.request)
                self._observer.on_steps_discarded(step.program, steps, entry.close_reason)
            runner.admit(step.admissions)
            if not runner.num_active:
                return []
            running = runner.requests
            result = runner.advance()
        except Exception as error:
            if is_device_lost(error):
                raise
            log.exception("%s failed; its requests fail", step.program)
            self._observer.on_error(step.program, "graph")
            requests = {*runner.requests, *(admission.request for admission in step.admissions)}
            self._fail(requests, ModelFailed(f"{step.program} failed: {type(error).__name__}"))
            return []
        seconds = self._clock() - start
        for _ in range(result.num_oom):
            self._observer.on_error(step.program, "out_of_memory")
        self._observer.on_step(step.program, result.rows, result.bucket, seconds)
        with self._work:
            self._scheduler.record_step_time(step.program, result.bucket, seconds)
            for request in running:
                if running_entry := self._scheduler.entry(request):
                    running_entry.compute_seconds += seconds
        return result.readouts

    def _deliver(self, readouts: Sequence[Readout]) -> None:
        """Record all readouts before any is delivered: callers that wake up contend for the GIL."""
        with self._work:
            deliveries = [self._record(readout) for readout in readouts]
        for request_events in deliveries:
            if request_events is not None:
                deliver, events = request_events
                deliver(events)

    def _record(self, readout: Readout) -> tuple[Deliver, Sequence[Event]] | None:
        """Account for a readout, and return the events to deliver, if any."""
        entry = self._scheduler.entry(readout.request)
        if entry is None or entry.is_closed:
            if readout.is_finished:
                self._discard(readout, entry.close_reason if entry else "failed")
            return None
        if not readout.is_finished:
            return entry.deliver, [Preview(readout.rows, readout.steps_done)]
        events = self._record_finished(entry, readout)
        return (entry.deliver, events) if events else None

    def _record_finished(self, entry: QueueEntry, readout: Readout) -> list[Event]:
        request, count = readout.request, len(readout.rows.indices)
        events: list[Event] = []
        if readout.is_finite:
            self._observer.on_rows_delivered(request.program, count)
            events.append(readout.rows)
        else:
            self._record_nonfinite(entry, readout)
        self._scheduler.finish(request, count)
        if len(entry.nonfinite_rows) >= MAX_NONFINITE_ROWS:
            self._scheduler.close(request, "failed")
        if entry.is_closed:
            events.append(
                Failed(_nonfinite_error(entry)) if entry.nonfinite_rows else Completed(self._timings(entry))
            )
        return events

    def _record_nonfinite(self, entry: QueueEntry, readout: Readout) -> None:
        """Drop non-finite rows: they are finished, but never delivered or acknowledged by the caller."""
        indices = readout.rows.indices
        entry.nonfinite_rows += tuple(indices)
        self._scheduler.acknowledge(entry.request, len(indices))
        for _ in indices:
            self._observer.on_error(entry.request.program, "non_finite")
        self._discard(readout, "failed")

    def _discard(self, readout: Readout, reason: str) -> None:
        self._observer.on_steps_discarded(readout.request.program, sum(readout.steps_done), reason)

    def _timings(self, entry: QueueEntry) -> Timings:
        return Timings(
            queue=entry.started_at - entry.submitted_at,
            run=self._clock() - entry.started_at,
            compute=entry.compute_seconds,
        )

    def _wait_timeout(self) -> float | None:
        """Return the seconds until the next deadline; None if there is none."""
        deadline = self._scheduler.next_deadline()
        if deadline is None:
            return None
        return min(max(0.0, deadline - self._clock()), threading.TIMEOUT_MAX)

    def _close_expired(self) -> None:
        now = self._clock()
        for entry in self._scheduler.expired(now):
            deadline, rows = entry.request.deadline, entry.request.rows
            has_passed = deadline is not None and deadline <= now
            why = "passed" if has_passed else "cannot be met at the shortest measured step time"
            error = DeadlineExceeded(f"the deadline {why}; {entry.finished} of {rows} rows are done")
            self._close(entry.request, error, "deadline")

    def _restart(self) -> bool:
        """Fail all open requests and reload the graphs; return False when the engine gives up."""
        gives_up = self._restarts.is_exhausted(self._clock())
        with self._work:
            self._is_down = True
        self._observer.on_restart()
        self._fail_all(Unavailable("the engine failed; retry"))
        try:
            if not gives_up:
                self._reload_graphs()
                for runner in self._runners.values():
                    runner.clear()
        except BaseException:
            log.critical("cannot reload the graphs; the engine gives up", exc_info=True)
            gives_up = True
        with self._work:
            self._is_down, self._is_stopping = gives_up, self._is_stopping or gives_up
        return not gives_up

    def _fail_all(self, error: Exception) -> None:
        """Fail every open request and empty the slots."""
        with self._work:
            requests = self._scheduler.open_requests()
        self._fail(requests, error)
        with self._work:
            for key, runner in self._runners.items():
                for request, steps in runner.empty().items():
                    entry = self._scheduler.entry(request)
                    reason = entry.close_reason if entry else "failed"
                    self._observer.on_steps_discarded(key, steps, reason)
            self._scheduler.forget_dropped()

    def _fail(self, requests: Iterable[Request], error: Exception) -> None:
        with self._work:
            for request in requests:
                try:
                    self._close(request, error, "failed")
                except Exception:  # one unreachable caller must not keep the others from their errors
                    log.exception("cannot deliver the failure of a request to its caller")

    def _close(self, request: Request, error: Exception, reason: str) -> None:
        entry = self._scheduler.entry(request)
        if entry is not None and self._scheduler.close(request, reason):
            entry.deliver([Failed(error)])


def _nonfinite_error(entry: QueueEntry) -> ModelFailed:
    rows = "row" if len(entry.nonfinite_rows) == 1 else "rows"
    indices = ", ".join(map(str, sorted(entry.nonfinite_rows)[:MAX_NONFINITE_ROWS]))
    others = "all other rows are done" if entry.is_complete else "unfinished rows were dropped"
    return ModelFailed(f"{entry.request.program}: {rows} {indices} came out non-finite; {others}")
