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

from server.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, ServerUnavailable, Violation
from server.core.request import Request
from server.core.spec import ProgramKey
from server.engine.program_queue import RESERVED_SHARE, Admission, Lane, Room

MIN_CROWD = 64

Batching = Literal["step", "request", "none"]


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how it is dealt out.

    `batching` is for comparisons: `step` lets rows join at any step; with `request` a batch is
    formed when the device is idle, keeps its width to the end of its longest row and is answered then,
    as where whole requests are batched (what Orca, OSDI 2022, calls request-level scheduling); with
    `none` every request runs alone.
    """

    max_waiting_rows: int = 200_000
    max_held_bytes: int = 1 << 30
    quantum_rows: int = 8
    batching: Batching = "step"
    min_retry_seconds: float = 0.1
    max_retry_seconds: float = 30.0


@dataclass(frozen=True)
class Turn:
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
        self._lanes: dict[ProgramKey, Lane] = {}
        # Lanes with work, the one whose turn it is in front; `_granted` has had this round's quantum.
        self._ring: deque[Lane] = deque()
        self._granted: Lane | None = None
        self._deadlines: list[tuple[float, int, Request]] = []
        self._crowded = MIN_CROWD
        self._arrivals = itertools.count()
        self.num_waiting = 0
        self.num_active = 0
        self.held_bytes = 0

    def open_lane(self, program: ProgramKey, capacity: int, least_steps: int = 1) -> None:
        """Make a program known: at most `capacity` of its rows are active, and none takes fewer steps."""
        reserved = 1 / RESERVED_SHARE if self.limits.batching == "step" else 0.0
        self._lanes[program] = Lane(program, capacity, least_steps, Room(capacity, reserved))

    def submit(self, request: Request, now: float = -math.inf) -> None:
        """Queue a request.

        InvalidRequest when it could never be taken; Overloaded when too much waits already;
        DeadlineExceeded when even an idle device could not finish in time, at the fastest pace measured.
        """
        lane = self._lanes.get(request.program)
        if lane is None:
            raise ServerUnavailable(f"{request.program} is not loaded")
        self._refuse_too_large(request)
        self._refuse_overload(request)
        _refuse_hopeless(request, lane, now)
        self.num_waiting += request.rows
        self.held_bytes += request.held_bytes
        request.is_held = True
        lane.open(request)
        self._wake(lane)
        if request.deadline is not None:
            self._forget_ended()
            self._look_again(request)

    def close(self, request: Request, reason: str) -> bool:
        """Stop a request: its waiting rows go now, its active rows at the next turn.

        False when it had ended before.
        """
        if request.is_closed:
            return False
        request.closed_because = reason
        lane = self._lanes[request.program]
        self.num_waiting -= request.num_waiting
        self.num_active -= request.num_active
        lane.remove(request)
        self._wake(lane)
        return True

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader has taken so many rows, and has room for as many more."""
        request.acknowledged += rows
        lane = self._lanes[request.program]
        lane.resume(request)
        self._wake(lane)

    def expired(self, now: float) -> list[Request]:
        """Open requests whose deadline has passed, or will before rows that still wait can be done.

        Each is named once. What rows need is taken from the pace that was measured.
        """
        late = []
        while (moment := self.next_deadline()) is not None and moment <= now:
            request = heapq.heappop(self._deadlines)[2]
            if self._last_moment(request) <= now:
                late.append(request)
            else:
                self._look_again(request)
        return late

    def next_deadline(self) -> float | None:
        """When an open request may next turn out to be late."""
        while self._deadlines and self._deadlines[0][2].is_closed:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def next_turn(self) -> Turn | None:
        """The program whose turn it is, with the rows that join it; None when nothing can run."""
        while self._ring:
            lane = self._ring[0]
            if not lane.has_work:
                self._retire(lane)
            elif self._runs_on(lane) or self._can_pay(lane):
                return Turn(lane.program, self._admit(lane), lane.take_dropped(), lane.width)
            else:
                self._pass_on()
        return None

    def charge(self, program: ProgramKey, bucket: int, seconds: float) -> None:
        """The turn that was taken last, of this program, took so long in a batch of this size."""
        lane = self._lanes[program]
        lane.pace.learn(bucket, seconds)
        lane.credit -= lane.pace.latest
        if lane.credit <= 0:
            self._pass_on()

    def finish(self, request: Request, rows: int) -> None:
        """So many rows of an open request have left the batch."""
        request.finished += rows
        self.num_active -= rows
        self._lanes[request.program].finish(request, rows)
        if request.is_complete:
            request.closed_because = "completed"

    def release(self, request: Request) -> None:
        """What a request holds is held no longer: its reader has all that it wants. Once is enough."""
        if request.is_held:
            request.is_held = False
            self.held_bytes -= request.held_bytes

    def forget_dropped(self) -> None:
        """The slots have been emptied: nothing is left in them to be dropped."""
        for lane in self._lanes.values():
            lane.take_dropped()

    def open_requests(self) -> list[Request]:
        """Every request that has not ended."""
        return [request for lane in self._lanes.values() for request in lane.requests]

    def _wake(self, lane: Lane) -> None:
        if lane.has_work and not lane.is_ringed:
            lane.is_ringed = True
            self._ring.append(lane)

    def _retire(self, lane: Lane) -> None:
        """A lane without work leaves the ring and forfeits the time that it has not used."""
        self._ring.popleft()
        self._granted = None
        lane.is_ringed = False
        lane.credit = min(0.0, lane.credit)

    def _pass_on(self) -> None:
        """The next lane is in front, and has not had its quantum yet."""
        self._ring.rotate(-1)
        self._granted = None

    def _runs_on(self, lane: Lane) -> bool:
        """Without step batching, what has begun runs to its end."""
        return self.limits.batching != "step" and lane.num_active > 0

    def _can_pay(self, lane: Lane) -> bool:
        """Whether a lane may run, once it has had its quantum of this round."""
        if self._granted is not lane:
            self._granted = lane
            lane.credit += self._quantum(lane)
        return lane.credit >= 0

    def _quantum(self, lane: Lane) -> float:
        """Seconds that a lane earns in a round.

        The lane of the largest share gets the dearest turn or debt of any, the others their part of that:
        small quanta, so that one which has just woken waits for little, and yet a few rounds pay any debt.
        """
        dearest = max(max(each.pace.latest, -each.credit) for each in self._ring)
        if len(self._ring) == 1:
            return dearest
        return dearest * lane.part(max(each.share for each in self._ring))

    def _admit(self, lane: Lane) -> list[Admission]:
        if self._runs_on(lane):
            return []
        most = 1 if self.limits.batching == "none" else None
        admissions = lane.admit(self.limits.quantum_rows, most)
        count = sum(admission.count for admission in admissions)
        self.num_waiting -= count
        self.num_active += count
        lane.width = 0 if self.limits.batching == "step" else lane.num_active
        return admissions

    def _refuse_too_large(self, request: Request) -> None:
        """InvalidRequest when it would not fit even if nothing else were open."""
        most, given = self.limits.max_held_bytes, request.held_bytes
        if given > most:
            where = "inputs" if request.work.inputs else "rows"
            expected = f"expected at most {most} bytes of inputs and unread answers, got {given}"
            raise InvalidRequest([Violation(where, expected)])

    def _refuse_overload(self, request: Request) -> None:
        limits = self.limits
        if self.num_waiting + request.rows > limits.max_waiting_rows:
            self._refuse(
                f"{self.num_waiting} rows wait and {request.rows} more would pass the limit of "
                f"{limits.max_waiting_rows}"
            )
        if self.held_bytes + request.held_bytes > limits.max_held_bytes:
            self._refuse(
                f"open requests hold {self.held_bytes} bytes of inputs and unread answers, and "
                f"{request.held_bytes} more would pass the limit of {limits.max_held_bytes}"
            )

    def _refuse(self, reason: str) -> None:
        """Overloaded, with the time in which half of what waits should be done."""
        backlog = sum(lane.backlog_seconds for lane in self._lanes.values())
        limits = self.limits
        delay = min(limits.max_retry_seconds, max(limits.min_retry_seconds, backlog / 2))
        raise Overloaded(f"{reason}; try again in {delay:.1f} s", delay)

    def _look_again(self, request: Request) -> None:
        heapq.heappush(self._deadlines, (self._last_moment(request), next(self._arrivals), request))

    def _last_moment(self, request: Request) -> float:
        """When a request is too late, unless its waiting rows have entered; without any, its deadline."""
        assert request.deadline is not None, "a request without a deadline was looked at. This is a bug."
        if not request.num_waiting:
            return request.deadline
        return request.deadline - _steps_ahead(request) * self._lanes[request.program].pace.fastest

    def _forget_ended(self) -> None:
        """Ended requests leave the heap from its top, or here, once they are as many as the open ones."""
        if len(self._deadlines) >= self._crowded:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_closed]
            heapq.heapify(self._deadlines)
            self._crowded = 2 * len(self._deadlines) + MIN_CROWD


def _refuse_hopeless(request: Request, lane: Lane, now: float) -> None:
    """DeadlineExceeded when the request's own steps alone take longer than it has."""
    if request.deadline is None:
        return
    waves = math.ceil(request.rows / lane.capacity)
    pace = lane.pace.fastest
    needed = waves * _steps_ahead(request) * pace
    if now + needed <= request.deadline:
        return
    if not lane.has_work:  # nothing runs that could prove the pace wrong, so the next one may try
        lane.pace.forget()
    raise DeadlineExceeded(
        f"{request.rows} rows of {request.steps} steps take {needed:.3g} s at the fastest pace measured, "
        f"{pace:.3g} s a step, and {max(0.0, request.deadline - now):.3g} s are left"
    )


def _steps_ahead(request: Request) -> int:
    """Steps that a row takes at least, from its first on."""
    return 1 if request.may_end_early else request.row_cost
