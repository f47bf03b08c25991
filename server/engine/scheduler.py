"""Which program runs next, and which waiting rows join it.

Pure policy: no tensors, no clock (time is an argument), no threads. A row that has
been admitted stays until it is finished or dropped; between steps, free slots go to
waiting rows. Programs share the device by deficit round robin as well, in seconds: one
whose step takes long has fewer turns, one that serves many requests has more time, since
it is requests that wait. lane.py says who gets a program's slots.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from server.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, Violation
from server.core.request import Request
from server.core.spec import ProgramKey
from server.engine.program_queue import RESERVED_SHARE, Admission, ProgramQueue, SlotQuota

MIN_COMPACTION_SIZE = 64

Batching = Literal["step", "request", "none"]


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how it is dealt out.

    `batching` is for comparisons: `step` lets rows join at any step; with `request` a batch is
    formed when the device is idle, keeps its width to the end of its longest row and is answered then,
    as where whole requests are batched (what Orca, OSDI 2022, calls request-level scheduling); with
    `none` every request runs alone.
    """

    max_queued_rows: int = 200_000
    max_buffered_bytes: int = 1 << 30
    drr_quantum_rows: int = 8
    batching: Batching = "step"
    min_retry_seconds: float = 0.1
    max_retry_seconds: float = 30.0


@dataclass(frozen=True)
class ScheduledStep:
    """One turn of a program: drop these requests' rows, admit these rows, then step.

    `width` is how many rows the batch began with when it is one of whole requests; otherwise 0.
    """

    program: ProgramKey
    admissions: list[Admission]
    dropped: list[Request]
    width: int = 0


class Scheduler:
    """Admission, fairness, deadlines and cancellation over the lanes of all programs."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._queues: dict[ProgramKey, ProgramQueue] = {}
        # Lanes with work, the one whose turn it is in front; `_granted` has had this round's quantum.
        self._ring: deque[ProgramQueue] = deque()
        self._granted: ProgramQueue | None = None
        self._deadlines: list[tuple[float, int, Request]] = []
        self._compaction_threshold = MIN_COMPACTION_SIZE
        self._arrivals = itertools.count()
        self.num_queued = 0
        self.num_running = 0
        self.buffered_bytes = 0

    def add_program(self, program: ProgramKey, capacity: int, least_steps: int = 1) -> None:
        """Make a program known: at most `capacity` of its rows are active, and none takes fewer steps."""
        reserved = 1 / RESERVED_SHARE if self.limits.batching == "step" else 0.0
        self._queues[program] = ProgramQueue(program, capacity, least_steps, SlotQuota(capacity, reserved))

    def submit(self, request: Request, now: float = -math.inf) -> None:
        """Queue a request.

        InvalidRequest when it could never be taken; Overloaded when too much waits already;
        DeadlineExceeded when even an idle device could not finish in time, at the fastest pace measured.
        """
        lane = self._queues.get(request.program)
        if lane is None:
            raise Unavailable(f"{request.program} is not loaded")
        self._reject_if_too_large(request)
        self._reject_if_overloaded(request)
        _reject_if_unmeetable(request, lane, now)
        self.num_queued += request.rows
        self.buffered_bytes += request.buffered_bytes
        request.is_buffered = True
        lane.open(request)
        self._schedule(lane)
        if request.deadline is not None:
            self._compact_deadlines()
            self._schedule_deadline_check(request)

    def close(self, request: Request, reason: str) -> bool:
        """Stop a request: its waiting rows go now, its active rows at the next turn.

        False when it had ended before.
        """
        if request.is_closed:
            return False
        request.close_reason = reason
        lane = self._queues[request.program]
        self.num_queued -= request.num_waiting
        self.num_running -= request.num_active
        lane.remove(request)
        self._schedule(lane)
        return True

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader has taken so many rows, and has room for as many more."""
        request.acknowledged += rows
        lane = self._queues[request.program]
        lane.resume(request)
        self._schedule(lane)

    def expired(self, now: float) -> list[Request]:
        """Open requests whose deadline has passed, or will before rows that still wait can be done.

        Each is named once. What rows need is taken from the pace that was measured.
        """
        late = []
        while (moment := self.next_deadline()) is not None and moment <= now:
            request = heapq.heappop(self._deadlines)[2]
            if self._latest_start(request) <= now:
                late.append(request)
            else:
                self._schedule_deadline_check(request)
        return late

    def next_deadline(self) -> float | None:
        """When an open request may next turn out to be late."""
        while self._deadlines and self._deadlines[0][2].is_closed:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def next_step(self) -> ScheduledStep | None:
        """The program whose turn it is, with the rows that join it; None when nothing can run."""
        while self._ring:
            lane = self._ring[0]
            if not lane.has_work:
                self._retire(lane)
            elif self._runs_on(lane) or self._has_credit(lane):
                return ScheduledStep(lane.program, self._admit(lane), lane.take_dropped(), lane.width)
            else:
                self._rotate()
        return None

    def record_step_time(self, program: ProgramKey, bucket: int, seconds: float) -> None:
        """The turn that was taken last, of this program, took so long in a batch of this size."""
        lane = self._queues[program]
        lane.step_time.learn(bucket, seconds)
        lane.credit -= lane.step_time.latest
        if lane.credit <= 0:
            self._rotate()

    def finish(self, request: Request, rows: int) -> None:
        """So many rows of an open request have left the batch."""
        request.finished += rows
        self.num_running -= rows
        self._queues[request.program].finish(request, rows)
        if request.is_complete:
            request.close_reason = "completed"

    def release(self, request: Request) -> None:
        """What a request holds is held no longer: its reader has all that it wants. Once is enough."""
        if request.is_buffered:
            request.is_buffered = False
            self.buffered_bytes -= request.buffered_bytes

    def forget_dropped(self) -> None:
        """The slots have been emptied: nothing is left in them to be dropped."""
        for lane in self._queues.values():
            lane.take_dropped()

    def open_requests(self) -> list[Request]:
        """Every request that has not ended."""
        return [request for lane in self._queues.values() for request in lane.requests]

    def _schedule(self, lane: ProgramQueue) -> None:
        if lane.has_work and not lane.is_scheduled:
            lane.is_scheduled = True
            self._ring.append(lane)

    def _retire(self, lane: ProgramQueue) -> None:
        """A lane without work leaves the ring and forfeits the time that it has not used."""
        self._ring.popleft()
        self._granted = None
        lane.is_scheduled = False
        lane.credit = min(0.0, lane.credit)

    def _rotate(self) -> None:
        """The next lane is in front, and has not had its quantum yet."""
        self._ring.rotate(-1)
        self._granted = None

    def _runs_on(self, lane: ProgramQueue) -> bool:
        """Without step batching, what has begun runs to its end."""
        return self.limits.batching != "step" and lane.num_active > 0

    def _has_credit(self, lane: ProgramQueue) -> bool:
        """Whether a lane may run, once it has had its quantum of this round."""
        if self._granted is not lane:
            self._granted = lane
            lane.credit += self._quantum(lane)
        return lane.credit >= 0

    def _quantum(self, lane: ProgramQueue) -> float:
        """Seconds that a lane earns in a round.

        The lane of the largest share gets the dearest turn or debt of any, the others their part of that:
        small quanta, so that one which has just woken waits for little, and yet a few rounds pay any debt.
        """
        dearest = max(max(each.step_time.latest, -each.credit) for each in self._ring)
        if len(self._ring) == 1:
            return dearest
        return dearest * lane.relative_share(max(each.share for each in self._ring))

    def _admit(self, lane: ProgramQueue) -> list[Admission]:
        if self._runs_on(lane):
            return []
        most = 1 if self.limits.batching == "none" else None
        admissions = lane.admit(self.limits.drr_quantum_rows, most)
        count = sum(admission.count for admission in admissions)
        self.num_queued -= count
        self.num_running += count
        lane.width = 0 if self.limits.batching == "step" else lane.num_active
        return admissions

    def _reject_if_too_large(self, request: Request) -> None:
        """InvalidRequest when it would not fit even if nothing else were open."""
        most, given = self.limits.max_buffered_bytes, request.buffered_bytes
        if given > most:
            where = "inputs" if request.inputs.inputs else "rows"
            expected = f"expected at most {most} bytes of inputs and unread answers, got {given}"
            raise InvalidRequest([Violation(where, expected)])

    def _reject_if_overloaded(self, request: Request) -> None:
        limits = self.limits
        if self.num_queued + request.rows > limits.max_queued_rows:
            self._refuse(
                f"{self.num_queued} rows wait and {request.rows} more would pass the limit of "
                f"{limits.max_queued_rows}"
            )
        if self.buffered_bytes + request.buffered_bytes > limits.max_buffered_bytes:
            self._refuse(
                f"open requests hold {self.buffered_bytes} bytes of inputs and unread answers, and "
                f"{request.buffered_bytes} more would pass the limit of {limits.max_buffered_bytes}"
            )

    def _refuse(self, reason: str) -> None:
        """Overloaded, with the time in which half of what waits should be done."""
        backlog = sum(lane.backlog_seconds for lane in self._queues.values())
        limits = self.limits
        delay = min(limits.max_retry_seconds, max(limits.min_retry_seconds, backlog / 2))
        raise Overloaded(f"{reason}; try again in {delay:.1f} s", delay)

    def _schedule_deadline_check(self, request: Request) -> None:
        heapq.heappush(self._deadlines, (self._latest_start(request), next(self._arrivals), request))

    def _latest_start(self, request: Request) -> float:
        """When a request is too late, unless its waiting rows have entered; without any, its deadline."""
        assert request.deadline is not None, "a request without a deadline was looked at. This is a bug."
        if not request.num_waiting:
            return request.deadline
        return request.deadline - _steps_ahead(request) * self._queues[request.program].step_time.fastest

    def _compact_deadlines(self) -> None:
        """Ended requests leave the heap from its top, or here, once they are as many as the open ones."""
        if len(self._deadlines) >= self._compaction_threshold:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_closed]
            heapq.heapify(self._deadlines)
            self._compaction_threshold = 2 * len(self._deadlines) + MIN_COMPACTION_SIZE


def _reject_if_unmeetable(request: Request, lane: ProgramQueue, now: float) -> None:
    """DeadlineExceeded when the request's own steps alone take longer than it has."""
    if request.deadline is None:
        return
    waves = math.ceil(request.rows / lane.capacity)
    pace = lane.step_time.fastest
    needed = waves * _steps_ahead(request) * pace
    if now + needed <= request.deadline:
        return
    if not lane.has_work:  # nothing runs that could prove the pace wrong, so the next one may try
        lane.step_time.forget()
    raise DeadlineExceeded(
        f"{request.rows} rows of {request.steps} steps take {needed:.3g} s at the fastest pace measured, "
        f"{pace:.3g} s a step, and {max(0.0, request.deadline - now):.3g} s are left"
    )


def _steps_ahead(request: Request) -> int:
    """Steps that a row takes at least, from its first on."""
    return 1 if request.has_early_exit else request.row_cost
