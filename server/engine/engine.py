"""Engine: one loop on one thread that schedules, runs and delivers the steps of all requests.

Runs the programs of every model, regardless of its family. `submit`, `acknowledge` and `release` may be
called on any thread and never wait for a graph. Knows no transport.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from server.core.errors import DeadlineExceeded, ModelFailed, SamovarError, ServerError, Unavailable
from server.core.request import Completed, Deliver, Event, Failed, Preview, Request, Timings
from server.core.restart_policy import RestartPolicy
from server.core.spec import ProgramKey
from server.engine.program_queue import QueueEntry
from server.engine.scheduler import ScheduledStep, Scheduler
from server.execution.program_runner import ProgramRunner
from server.execution.readout import Readout, StepResult
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


@dataclass(frozen=True)
class StepInFlight:
    """A step that was given to the device.

    Attributes:
        program: the program that steps.
        entries: the requests with rows in the step.
        result: what is known of it, and how to wait for the rest.
        host_seconds: time that the host took for it.
        charged: seconds that were charged for it.
    """

    program: ProgramKey
    entries: Mapping[Request, QueueEntry]
    result: StepResult
    host_seconds: float
    charged: float


class Engine:
    """Owns the device thread, the scheduler and the program runners.

    With a pipeline depth of 1 the host prepares the next step while the device works on the current one. Rows
    whose last step was given to the device free their slots at once, and are delivered when it is done.

    If the device thread crashes, it fails all open requests, calls `reload_graphs` and resumes. After
    MAX_RESTARTS crashes within RESTART_PERIOD_SECONDS it stops and calls `on_death`.

    Args:
        scheduler: the scheduling policy, accessed under the engine's lock.
        observer: receives engine events.
        clock: monotonic time in seconds.
        reload_graphs: opens the graphs of every program again.
        on_death: called on the device thread when the engine gives up.
        pipeline_depth: steps that the device may still be working on while the next one is prepared.
        device_context: entered by the device thread.
    """

    def __init__(  # noqa: PLR0913
        self,
        scheduler: Scheduler,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
        reload_graphs: Callable[[], None] = lambda: None,
        on_death: Callable[[], None] = lambda: None,
        pipeline_depth: int = 0,
        device_context: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._observer = observer
        self._clock = clock
        self._reload_graphs = reload_graphs
        self._on_death = on_death
        self._pipeline_depth = pipeline_depth
        self._device_context = device_context or nullcontext()
        # Accessed on the device thread only.
        self._in_flight: deque[StepInFlight] = deque()
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
        with self._device_context:
            while True:
                try:
                    self._run_steps()
                    return
                except BaseException:  # any crash of this thread would leave callers waiting
                    log.critical("device thread crashed; restarting the engine", exc_info=True)
                if not self._restart():
                    self._on_death()
                    return

    def _run_steps(self) -> None:
        """Run steps until the engine stops."""
        while True:
            step = self._schedule(waits=not self._in_flight)
            if step is not None:
                self._launch(step)
            elif not self._in_flight:
                return
            # Without a next step there is nothing to prepare meanwhile.
            while len(self._in_flight) > (self._pipeline_depth if step is not None else 0):
                self._finish(self._in_flight[0])
                self._in_flight.popleft()

    def _schedule(self, waits: bool) -> ScheduledStep | None:
        """Return the next step; None when the engine stops, or if there is none and `waits` is False."""
        with self._work:
            while not self._is_stopping:
                self._close_expired()
                if step := self._scheduler.next_step():
                    self._record_admissions(step)
                    return step
                if not waits:
                    break
                self._work.wait(self._wait_timeout())
        return None

    def _record_admissions(self, step: ScheduledStep) -> None:
        now = self._clock()
        for admission in step.admissions:
            if admission.first == 0 and (entry := self._scheduler.entry(admission.request)):
                entry.started_at = now
                self._observer.on_dequeued(step.program, now - entry.submitted_at)

    def _launch(self, step: ScheduledStep) -> None:
        """Give a step to the device; if a graph raises, the requests of its program fail."""
        runner = self._runners[step.program]
        start = self._clock()
        try:
            for entry in step.dropped:
                steps = runner.drop(entry.request)
                self._observer.on_steps_discarded(step.program, steps, entry.close_reason)
            runner.admit(step.admissions)
            if not runner.num_active:
                return
            running = runner.requests
            result = runner.advance(step.max_steps)
        except Exception as error:
            requests = {*runner.requests, *(admission.request for admission in step.admissions)}
            self._fail_program(step.program, requests, error)
            return
        self._record_launch(step.program, running, result, self._clock() - start)

    def _record_launch(
        self, program: ProgramKey, running: Sequence[Request], result: StepResult, host_seconds: float
    ) -> None:
        """Free the slots of rows that took their last step, and charge the program for the step."""
        with self._work:
            entries = {
                request: entry for request in running if (entry := self._scheduler.entry(request)) is not None
            }
            for request, finished in result.finished.items():
                if request in entries and not entries[request].is_closed:
                    self._scheduler.finish(request, finished.rows)
            charged = self._scheduler.charge_steps(program, result.bucket, result.steps)
        self._in_flight.append(StepInFlight(program, entries, result, host_seconds, charged))

    def _finish(self, step: StepInFlight) -> None:
        """Wait for a step, record it, and deliver its rows."""
        start = self._clock()
        try:
            readouts = step.result.wait()
        except Exception as error:
            self._fail_program(step.program, step.entries, error)
            self._fail_finished(step, _model_failed(step.program, error))
            return
        program, result = step.program, step.result
        seconds = result.device_seconds()
        if seconds is None:
            seconds = step.host_seconds + self._clock() - start
        step_seconds = seconds / result.steps
        for _ in range(result.num_oom):
            self._observer.on_error(program, "out_of_memory")
        for _ in range(result.steps):
            self._observer.on_step(program, result.rows, result.bucket, step_seconds)
        with self._work:
            self._scheduler.record_step_time(program, result.bucket, step_seconds, result.steps, step.charged)
            for entry in step.entries.values():
                entry.compute_seconds += seconds
            deliveries = [self._record(step, readout) for readout in readouts]
        # Delivered after all are recorded: callers that wake up contend for the GIL.
        for request_events in deliveries:
            if request_events is not None:
                deliver, events = request_events
                deliver(events)

    def _record(self, step: StepInFlight, readout: Readout) -> tuple[Deliver, Sequence[Event]] | None:
        """Account for a readout, and return the events to deliver, if any."""
        entry = step.entries.get(readout.request)
        if entry is None or entry.close_reason not in ("", "completed"):
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
        entry.answered += count
        if len(entry.nonfinite_rows) >= MAX_NONFINITE_ROWS:
            self._scheduler.close(request, "failed")
        if entry.is_answered or entry.close_reason == "failed":
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

    def _fail_program(self, program: ProgramKey, requests: Iterable[Request], error: Exception) -> None:
        """Fail the requests of a step whose graph raised; raise the error again if the device is lost."""
        if is_device_lost(error):
            raise error
        log.error("%s failed; its requests fail", program, exc_info=error)
        self._observer.on_error(program, "graph")
        self._fail(requests, _model_failed(program, error))

    def _fail_finished(self, step: StepInFlight, error: Exception) -> None:
        """Fail the requests of a failed step whose rows have all left their slots, with it or after it."""
        for request, finished in step.result.finished.items():
            entry = step.entries.get(request)
            is_closed = entry is not None and entry.close_reason not in ("", "completed")
            reason = entry.close_reason if entry and is_closed else "failed"
            self._observer.on_steps_discarded(step.program, finished.steps, reason)
        with self._work:
            for entry in step.entries.values():
                if entry.close_reason == "completed" and not entry.is_answered:
                    entry.close_reason = "failed"
                    _deliver_failure(entry, error)

    def _fail_all(self, error: Exception) -> None:
        """Fail every open request and empty the slots."""
        with self._work:
            requests = self._scheduler.open_requests()
        self._fail(requests, error)
        while self._in_flight:
            self._fail_finished(self._in_flight.popleft(), error)
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
                self._close(request, error, "failed")

    def _close(self, request: Request, error: Exception, reason: str) -> None:
        entry = self._scheduler.entry(request)
        if entry is not None and self._scheduler.close(request, reason):
            _deliver_failure(entry, error)


def _deliver_failure(entry: QueueEntry, error: Exception) -> None:
    try:
        entry.deliver([Failed(error)])
    except Exception:  # one unreachable caller must not keep the others from their errors
        log.exception("cannot deliver the failure of a request to its caller")


def _model_failed(program: ProgramKey, error: Exception) -> ModelFailed:
    return ModelFailed(f"{program} failed: {type(error).__name__}")


def _nonfinite_error(entry: QueueEntry) -> ModelFailed:
    rows = "row" if len(entry.nonfinite_rows) == 1 else "rows"
    indices = ", ".join(map(str, sorted(entry.nonfinite_rows)[:MAX_NONFINITE_ROWS]))
    others = "all other rows are done" if entry.is_complete else "unfinished rows were dropped"
    return ModelFailed(f"{entry.request.program}: {rows} {indices} came out non-finite; {others}")
