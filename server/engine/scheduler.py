"""Scheduling policy: which program steps next, and which queued rows join its batch.

Pure policy: no tensors, no clock (time is an argument), no threads. A row that has entered a slot stays
until it is finished or dropped; between steps, free slots go to queued rows (continuous batching).
Programs share the device by deficit round robin in seconds: a program with long steps steps less often,
and one that serves many requests gets more time. program_queue.py assigns a program's slots.
"""

import heapq
import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from server.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, Violation
from server.core.request import Admission, Deliver, Request
from server.core.spec import ProgramKey
from server.engine.program_queue import RESERVED_SHARE, ProgramQueue, QueueEntry, SlotQuota

# Smallest number of deadlines that is worth compacting.
MIN_COMPACTION_SIZE = 64
# A program that is alone takes several steps in a turn of this duration: a turn takes the host longer than a
# small step takes a GPU. Arriving rows wait for the turn to end.
TURN_SECONDS = 0.00025
MAX_STEPS_PER_TURN = 16


@dataclass(frozen=True)
class Limits:
    """Limits of the queue.

    Attributes:
        max_queued_rows: queued rows of all requests.
        max_buffered_bytes: bytes of inputs and unread rows of all requests.
        drr_quantum_rows: rows of the longest kind that a request may place in one visit.
        min_retry_seconds, max_retry_seconds: bounds of the retry delay of a rejected request.
    """

    max_queued_rows: int = 200_000
    max_buffered_bytes: int = 1 << 30
    drr_quantum_rows: int = 8
    min_retry_seconds: float = 0.1
    max_retry_seconds: float = 30.0


class BatchingPolicy(Protocol):
    """Decides when queued rows may join a program's batch.

    Attributes:
        reserved_share: share of the slots that a level of rows leaves to each level below it.
        runs_to_completion: whether a program with running rows steps until they are finished.
    """

    reserved_share: float
    runs_to_completion: bool

    def max_new_requests(self, num_running: int) -> int | None:
        """Return how many requests may join a batch of `num_running` rows; None for no limit."""
        ...


class ContinuousBatching:
    """Rows join a batch at any step, as soon as slots are free."""

    reserved_share = RESERVED_SHARE
    runs_to_completion = False

    def max_new_requests(self, num_running: int) -> int | None:
        return None


@dataclass(frozen=True)
class ScheduledStep:
    """A turn of a program: drop the rows of closed requests, admit rows, then step.

    It takes at most `max_steps` steps, and ends when a row does.
    """

    program: ProgramKey
    admissions: list[Admission]
    dropped: list[QueueEntry]
    max_steps: int = 1


class Scheduler:
    """Admission control, fairness, deadlines and cancellation over the queues of all programs."""

    def __init__(self, limits: Limits | None = None, batching: BatchingPolicy | None = None) -> None:
        self.limits = limits or Limits()
        self._batching = batching or ContinuousBatching()
        self._queues: dict[ProgramKey, ProgramQueue] = {}
        # Open requests, and closed ones whose rows are still in slots.
        self._entries: dict[Request, QueueEntry] = {}
        # Bytes of requests that their callers have not released.
        self._buffered: dict[Request, int] = {}
        # Programs with work, the next one first; `_granted` has received its quantum of this round.
        self._ring: deque[ProgramQueue] = deque()
        self._granted: ProgramQueue | None = None
        self._deadlines: list[tuple[float, int, QueueEntry]] = []
        self._compaction_threshold = MIN_COMPACTION_SIZE
        self._sequence = itertools.count()
        self.num_queued = 0
        self.buffered_bytes = 0

    @property
    def num_running(self) -> int:
        """Rows in slots, of all programs."""
        return sum(queue.num_running for queue in self._queues.values())

    def add_program(self, program: ProgramKey, capacity: int, least_steps: int = 1) -> None:
        """Add a program with `capacity` slots, whose rows take at least `least_steps` steps."""
        quota = SlotQuota(capacity, self._batching.reserved_share)
        self._queues[program] = ProgramQueue(program, capacity, least_steps, quota)

    def submit(self, request: Request, deliver: Deliver, now: float) -> QueueEntry:
        """Queue a request.

        Raises:
            Unavailable: the program is not loaded.
            InvalidRequest: the request exceeds a limit even when nothing else is queued.
            Overloaded: the queue is full; says when to retry.
            DeadlineExceeded: an idle device could not finish before the deadline, at the shortest step time.
        """
        queue = self._queues.get(request.program)
        if queue is None:
            raise Unavailable(f"{request.program} is not loaded")
        entry = QueueEntry(request, deliver, submitted_at=now)
        self._reject_if_too_large(request)
        self._reject_if_overloaded(request)
        _reject_if_unmeetable(entry, queue, now)
        self._entries[request] = entry
        self.num_queued += request.rows
        if request.buffered_bytes:
            self._buffered[request] = request.buffered_bytes
            self.buffered_bytes += request.buffered_bytes
        queue.add(entry)
        self._schedule(queue)
        if request.deadline is not None:
            self._compact_deadlines()
            self._schedule_deadline_check(entry)
        return entry

    def entry(self, request: Request) -> QueueEntry | None:
        """Return the entry of a request that is open or still has rows in slots."""
        return self._entries.get(request)

    def close(self, request: Request, reason: str) -> bool:
        """Close a request: its queued rows leave now, its running rows at the next step.

        Returns whether it was open.
        """
        entry = self._entries.get(request)
        if entry is None or entry.is_closed:
            return False
        entry.close_reason = reason
        queue = self._queues[request.program]
        self.num_queued -= entry.num_queued
        queue.remove(entry)
        if not entry.num_running:
            del self._entries[request]
        self._schedule(queue)
        return True

    def acknowledge(self, request: Request, rows: int) -> None:
        """Record that the caller has read `rows` rows, so that as many more may enter."""
        entry = self._entries.get(request)
        if entry is None:
            return
        entry.acknowledged += rows
        queue = self._queues[request.program]
        queue.resume(entry)
        self._schedule(queue)

    def release(self, request: Request) -> None:
        """Free the buffered bytes of a request that its caller no longer reads; later calls do nothing."""
        self.buffered_bytes -= self._buffered.pop(request, 0)

    def finish(self, request: Request, rows: int) -> None:
        """Record that `rows` rows of an open request have left the batch."""
        entry = self._entries[request]
        entry.finished += rows
        self._queues[request.program].finish(entry, rows)
        if entry.is_complete:
            entry.close_reason = "completed"
            del self._entries[request]

    def expired(self, now: float) -> list[QueueEntry]:
        """Return open requests that cannot finish before their deadlines, each once.

        A request with queued rows expires once these cannot finish in time at the shortest step time.
        """
        expired = []
        while (check_at := self.next_deadline()) is not None and check_at <= now:
            entry = heapq.heappop(self._deadlines)[2]
            if self._latest_start(entry) <= now:
                expired.append(entry)
            else:
                self._schedule_deadline_check(entry)
        return expired

    def next_deadline(self) -> float | None:
        """Return the earliest time at which an open request may expire; None if none has a deadline."""
        while self._deadlines and self._deadlines[0][2].is_closed:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def next_step(self) -> ScheduledStep | None:
        """Return the next step of the program that is due; None when no program has work."""
        while self._ring:
            queue = self._ring[0]
            if not queue.has_work:
                self._retire(queue)
            elif self._has_credit(queue) or self._is_committed(queue):
                admissions, dropped = self._admit(queue), self._pop_dropped(queue)
                return ScheduledStep(queue.program, admissions, dropped, self._max_steps(queue))
            else:
                self._rotate()
        return None

    def charge_steps(self, program: ProgramKey, bucket: int, steps: int = 1) -> float:
        """Charge steps that begin with their expected duration, and return it, in seconds."""
        queue = self._queues[program]
        expected = steps * queue.step_time.shortest.get(bucket, 0.0)
        self._charge(queue, expected)
        return expected

    def record_step_time(
        self, program: ProgramKey, bucket: int, seconds: float, steps: int = 1, charged: float = 0.0
    ) -> None:
        """Record the duration of each of some steps at a batch size, and charge it instead of `charged`."""
        queue = self._queues[program]
        queue.step_time.record(bucket, seconds)
        self._charge(queue, steps * queue.step_time.latest - charged)

    def forget_dropped(self) -> None:
        """Forget the closed requests with rows in slots, after all slots have been emptied."""
        for queue in self._queues.values():
            self._pop_dropped(queue)

    def open_requests(self) -> list[Request]:
        """Return every request that is not closed."""
        return [entry.request for queue in self._queues.values() for entry in queue.open_entries]

    def _schedule(self, queue: ProgramQueue) -> None:
        if queue.has_work and not queue.is_scheduled:
            queue.is_scheduled = True
            self._ring.append(queue)

    def _retire(self, queue: ProgramQueue) -> None:
        """Remove a program without work from the ring; it forfeits its unspent time."""
        self._ring.popleft()
        self._granted = None
        queue.is_scheduled = False
        queue.credit = min(0.0, queue.credit)

    def _rotate(self) -> None:
        self._ring.rotate(-1)
        self._granted = None

    def _charge(self, queue: ProgramQueue, seconds: float) -> None:
        """Charge device time; the turn of a program ends when it has spent its time."""
        queue.credit -= seconds
        # A step of an earlier turn may be charged while the program waits for its next one.
        if queue.credit <= 0 and self._granted is queue:
            self._rotate()

    def _is_committed(self, queue: ProgramQueue) -> bool:
        return self._batching.runs_to_completion and queue.num_running > 0

    def _has_credit(self, queue: ProgramQueue) -> bool:
        """Return whether a program may step, after it has received its quantum of this round."""
        if self._granted is not queue:
            self._granted = queue
            queue.credit += self._quantum(queue)
        return queue.credit >= 0

    def _max_steps(self, queue: ProgramQueue) -> int:
        """Return how many steps a program may take in its turn: one if others wait for theirs."""
        step_time = queue.step_time.latest
        if len(self._ring) > 1 or not step_time:
            return 1
        return max(1, min(MAX_STEPS_PER_TURN, int(TURN_SECONDS / step_time)))

    def _quantum(self, queue: ProgramQueue) -> float:
        """Return the seconds that a program earns in a round.

        The program with the largest share earns the longest step time or debt of any program, the others
        their share of it: quanta are small enough that a newly active program waits briefly, and large
        enough that a few rounds pay any debt.
        """
        max_cost = max(max(queue.step_time.latest, -queue.credit) for queue in self._ring)
        if len(self._ring) == 1:
            return max_cost
        return max_cost * queue.relative_share(max(queue.share for queue in self._ring))

    def _admit(self, queue: ProgramQueue) -> list[Admission]:
        max_requests = self._batching.max_new_requests(queue.num_running)
        admissions = queue.admit(self.limits.drr_quantum_rows, max_requests)
        self.num_queued -= sum(admission.count for admission in admissions)
        return admissions

    def _pop_dropped(self, queue: ProgramQueue) -> list[QueueEntry]:
        dropped = queue.pop_dropped()
        for entry in dropped:
            del self._entries[entry.request]
        return dropped

    def _reject_if_too_large(self, request: Request) -> None:
        limit = self.limits.max_buffered_bytes
        if request.buffered_bytes > limit:
            field = "inputs" if request.inputs else "rows"
            expected = (
                f"expected at most {limit} bytes of inputs and unread rows, got {request.buffered_bytes}"
            )
            raise InvalidRequest([Violation(field, expected)])

    def _reject_if_overloaded(self, request: Request) -> None:
        limits = self.limits
        if self.num_queued + request.rows > limits.max_queued_rows:
            raise self._overloaded(
                f"the queue is full: {self.num_queued} rows are queued, {request.rows} more exceed the limit "
                f"of {limits.max_queued_rows}"
            )
        if self.buffered_bytes + request.buffered_bytes > limits.max_buffered_bytes:
            raise self._overloaded(
                f"the buffer is full: open requests hold {self.buffered_bytes} bytes of inputs and unread "
                f"rows, {request.buffered_bytes} more exceed the limit of {limits.max_buffered_bytes}"
            )

    def _overloaded(self, reason: str) -> Overloaded:
        """Return an error whose retry delay is the time in which half of the queued rows finish."""
        backlog = sum(queue.backlog_seconds for queue in self._queues.values())
        limits = self.limits
        delay = min(limits.max_retry_seconds, max(limits.min_retry_seconds, backlog / 2))
        return Overloaded(f"{reason}; retry in {delay:.1f} s", delay)

    def _schedule_deadline_check(self, entry: QueueEntry) -> None:
        heapq.heappush(self._deadlines, (self._latest_start(entry), next(self._sequence), entry))

    def _latest_start(self, entry: QueueEntry) -> float:
        """Return the latest time at which queued rows may enter; the deadline if none are queued."""
        deadline = entry.request.deadline
        assert deadline is not None, "a request without a deadline has a deadline check. This is a bug."
        if not entry.num_queued:
            return deadline
        return deadline - _min_steps(entry) * self._queues[entry.request.program].step_time.minimum

    def _compact_deadlines(self) -> None:
        """Remove closed requests from the heap once they may outnumber the open ones."""
        if len(self._deadlines) >= self._compaction_threshold:
            self._deadlines = [check for check in self._deadlines if not check[2].is_closed]
            heapq.heapify(self._deadlines)
            self._compaction_threshold = 2 * len(self._deadlines) + MIN_COMPACTION_SIZE


def _reject_if_unmeetable(entry: QueueEntry, queue: ProgramQueue, now: float) -> None:
    """Raise DeadlineExceeded when the request's own steps take longer than the time until its deadline."""
    request = entry.request
    if request.deadline is None:
        return
    batches = math.ceil(request.rows / queue.capacity)
    step_time = queue.step_time.minimum
    needed = batches * _min_steps(entry) * step_time
    if now + needed <= request.deadline:
        return
    if not queue.has_work:  # no step will correct a wrong estimate, so that the next request may try
        queue.step_time.reset()
    raise DeadlineExceeded(
        f"the deadline cannot be met: {request.rows} rows of {request.steps} steps take {needed:.3g} s at "
        f"the shortest measured step time of {step_time:.3g} s, "
        f"{max(0.0, request.deadline - now):.3g} s are left"
    )


def _min_steps(entry: QueueEntry) -> int:
    """Return the smallest number of steps that a row of a request may take."""
    return 1 if entry.request.has_early_exit else entry.row_cost
