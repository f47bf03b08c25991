"""Which program runs next, and which waiting rows join it.

Pure policy: no tensors, no clock (time is an argument), no threads. A row that has
been admitted stays until it is finished or dropped; between steps, free slots go to
waiting requests in turn, a quantum of rows each, and programs take turns as well.
"""

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field

from server.errors import Overloaded, ServerUnavailable
from server.request import Request
from server.spec import ProgramKey

MIN_CROWD = 64


@dataclass(frozen=True)
class Limits:
    """How much may wait, and how it is dealt out."""

    max_waiting_rows: int = 200_000
    quantum_rows: int = 8
    retry_after_seconds: float = 1.0


@dataclass(frozen=True)
class Admission:
    """Rows of a request that enter the batch: offsets first .. first + count."""

    request: Request
    first: int
    count: int


@dataclass(frozen=True)
class Turn:
    """One turn of a program: drop these requests' rows, admit these rows, then step."""

    program: ProgramKey
    admissions: list[Admission]
    dropped: list[Request]


@dataclass
class Lane:
    """One program's queue and slots."""

    program: ProgramKey
    capacity: int
    waiting: deque[Request] = field(default_factory=deque)
    active: dict[Request, None] = field(default_factory=dict)
    dropped: list[Request] = field(default_factory=list)
    num_active: int = 0

    @property
    def has_work(self) -> bool:
        return bool(
            self.num_active or self.dropped or any(request.num_admissible for request in self.waiting)
        )


class Scheduler:
    """Admission, fairness, deadlines and cancellation over the lanes of all programs."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lanes: dict[ProgramKey, Lane] = {}
        self._rotation: deque[Lane] = deque()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._crowded = MIN_CROWD
        self._arrivals = itertools.count()
        self.num_waiting = 0

    @property
    def num_active(self) -> int:
        return sum(lane.num_active for lane in self._lanes.values())

    def open_lane(self, program: ProgramKey, capacity: int) -> None:
        """Make a program known; at most `capacity` of its rows are active at a time."""
        lane = self._lanes[program] = Lane(program, capacity)
        self._rotation.append(lane)

    def submit(self, request: Request) -> None:
        """Queue a request; Overloaded when too many rows wait already."""
        lane = self._lanes.get(request.program)
        if lane is None:
            raise ServerUnavailable(f"{request.program} is not loaded")
        limits = self.limits
        if self.num_waiting + request.rows > limits.max_waiting_rows:
            raise Overloaded(
                f"{self.num_waiting} rows wait and {request.rows} more would pass the limit of "
                f"{limits.max_waiting_rows}; try again in {limits.retry_after_seconds:g} s",
                limits.retry_after_seconds,
            )
        self.num_waiting += request.rows
        lane.waiting.append(request)
        if request.deadline is not None:
            self._forget_ended()
            heapq.heappush(self._deadlines, (request.deadline, next(self._arrivals), request))

    def close(self, request: Request, reason: str) -> bool:
        """Stop a request: its waiting rows go now, its active rows at the next turn.

        False when it had ended before.
        """
        if request.is_closed:
            return False
        request.closed_because = reason
        lane = self._lanes[request.program]
        if request.num_waiting:
            lane.waiting.remove(request)
            self.num_waiting -= request.num_waiting
        if request in lane.active:
            del lane.active[request]
            lane.num_active -= request.num_active
            lane.dropped.append(request)
        return True

    def acknowledge(self, request: Request, rows: int) -> None:
        """The reader has taken so many rows, and has room for as many more."""
        request.acknowledged += rows

    def expired(self, now: float) -> list[Request]:
        """Open requests whose deadline has passed; each is named once."""
        passed = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            passed.append(heapq.heappop(self._deadlines)[2])
        return passed

    def next_deadline(self) -> float | None:
        """The earliest deadline of an open request."""
        while self._deadlines and self._deadlines[0][2].is_closed:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def next_turn(self) -> Turn | None:
        """The program whose turn it is, with the rows that join it; None when nothing can run."""
        for _ in range(len(self._rotation)):
            lane = self._rotation[0]
            self._rotation.rotate(-1)
            if lane.has_work:
                dropped, lane.dropped = lane.dropped, []
                return Turn(lane.program, self._admit(lane), dropped)
        return None

    def finish(self, request: Request, rows: int) -> None:
        """So many rows of an open request have left the batch."""
        lane = self._lanes[request.program]
        request.finished += rows
        lane.num_active -= rows
        if not request.num_active:
            lane.active.pop(request, None)
        if request.is_complete:
            request.closed_because = "completed"

    def open_requests(self) -> list[Request]:
        """Every request that has not ended."""
        lanes = self._lanes.values()
        return list(dict.fromkeys(request for lane in lanes for request in (*lane.active, *lane.waiting)))

    def _forget_ended(self) -> None:
        """Ended requests leave the heap from its top, or here, once they are as many as the open ones."""
        if len(self._deadlines) >= self._crowded:
            self._deadlines = [entry for entry in self._deadlines if not entry[2].is_closed]
            heapq.heapify(self._deadlines)
            self._crowded = 2 * len(self._deadlines) + MIN_CROWD

    def _admit(self, lane: Lane) -> list[Admission]:
        admissions: dict[Request, Admission] = {}
        passed = 0
        while (free := lane.capacity - lane.num_active) and passed < len(lane.waiting):
            request = lane.waiting.popleft()
            count = min(self.limits.quantum_rows, free, request.num_admissible)
            passed = 0 if count else passed + 1
            if count:
                earlier = admissions.get(request)
                first = earlier.first if earlier else request.admitted
                request.admitted += count
                lane.num_active += count
                self.num_waiting -= count
                lane.active[request] = None
                admissions[request] = Admission(request, first, request.admitted - first)
            if request.num_waiting:
                lane.waiting.append(request)
        return list(admissions.values())
