"""Queue of one program: its queued requests, its slots, and which rows enter next.

Pure policy, like scheduler.py: no tensors, no clock. Free slots go to queued requests by deficit round
robin (Shreedhar & Varghese, 1995): at each visit a request earns a quantum of row-steps, and a row costs
its steps, so that requests share the slots' time regardless of the length of their rows.

A row keeps its slot until it ends, so a short row could wait for a long one. Rows therefore have levels:
one for each factor of eight in their length, and one more for batch priority. Each level leaves some slots
to the levels below it.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.core.request import Admission, Deliver, Request
from server.core.spec import ProgramKey

# One in this many visits goes to a request of batch priority while interactive ones are queued.
BATCH_PRIORITY_INTERVAL = 8
# Share of a program's slots that a level of rows leaves to each level below it.
RESERVED_SHARE = 1 / 16
# Device time of a program that serves only batch requests, relative to one interactive request.
BATCH_SHARE = 0.25
# Minimum device-time share of an interactive program, relative to the program with the largest share.
MIN_DEVICE_SHARE = 1 / 8
# Largest step time that is charged, relative to the shortest at the same batch size; more is an outlier.
MAX_STEP_TIME_RATIO = 4


@dataclass(eq=False)
class QueueEntry:
    """A request in the scheduler, from its submission until it is closed and its rows have left the slots.

    Accessed under the engine's lock only.

    Attributes:
        request: the request.
        deliver: takes the request's events.
        submitted_at, started_at: when it was queued, and when its first row entered a batch, in seconds.
        compute_seconds: duration of the steps that its rows took part in.
        admitted: rows that have entered a slot.
        finished: rows that have left their slots, read out.
        answered: finished rows that were delivered or found non-finite.
        acknowledged: finished rows that the caller has read.
        nonfinite_rows: indices of finished rows that are not finite.
        close_reason: why it was closed; empty while it is open.
        deficit: row-steps that it may still spend in its current visit (deficit round robin).
        level: level of its rows, see SlotQuota.
    """

    request: Request
    deliver: Deliver
    submitted_at: float = 0.0
    started_at: float = 0.0
    compute_seconds: float = 0.0
    admitted: int = 0
    finished: int = 0
    answered: int = 0
    acknowledged: int = 0
    nonfinite_rows: tuple[int, ...] = ()
    close_reason: str = ""
    deficit: int = 0
    level: int = 0

    @property
    def row_cost(self) -> int:
        """Slot time of a row, in steps."""
        return max(1, self.request.steps)

    @property
    def is_closed(self) -> bool:
        return bool(self.close_reason)

    @property
    def is_complete(self) -> bool:
        return self.finished == self.request.rows

    @property
    def is_answered(self) -> bool:
        return self.answered == self.request.rows

    @property
    def num_queued(self) -> int:
        return self.request.rows - self.admitted

    @property
    def num_running(self) -> int:
        return self.admitted - self.finished

    @property
    def num_admissible(self) -> int:
        """Queued rows that may enter now, within the limit on unread rows."""
        unread = self.admitted - self.acknowledged
        return min(self.num_queued, self.request.max_unread_rows - unread)


@dataclass
class PriorityQueue:
    """Requests of one priority and level that wait for slots, in the order of their visits.

    Visit numbers are drawn from one sequence for all queues of a program, so that the queues of a priority
    are visited like a single one. `costs` counts the row costs over all queues.
    """

    is_batch: bool
    level: int
    costs: Counter[int]
    visit_numbers: Iterator[int]
    ring: OrderedDict[QueueEntry, int] = field(default_factory=OrderedDict)
    _visited: QueueEntry | None = None

    def __len__(self) -> int:
        return len(self.ring)

    @property
    def next_visit(self) -> int:
        """Visit number of the first request."""
        return next(iter(self.ring.values()))

    def append(self, entry: QueueEntry) -> None:
        self.ring[entry] = next(self.visit_numbers)
        self.costs[entry.row_cost] += 1

    def discard(self, entry: QueueEntry) -> None:
        """Remove a request if it is present."""
        if entry not in self.ring:
            return
        del self.ring[entry]
        entry.deficit = 0
        if self._visited is entry:
            self._visited = None
        self.costs[entry.row_cost] -= 1
        if not self.costs[entry.row_cost]:
            del self.costs[entry.row_cost]

    def visit(self, quantum_rows: int, free_slots: int) -> tuple[QueueEntry, int, bool]:
        """Return the first request, how many of its rows enter, and whether its visit is over."""
        entry = next(iter(self.ring))
        if entry is not self._visited:
            self._visited = entry
            # The quantum must pay for the most expensive row, or a visit could pass without any.
            entry.deficit += quantum_rows * max(self.costs)
        count = min(free_slots, entry.deficit // entry.row_cost, entry.num_admissible)
        entry.deficit -= count * entry.row_cost
        is_over = count == entry.num_admissible or entry.deficit < entry.row_cost
        if is_over:
            self._visited = None
            self.ring.move_to_end(entry)
            self.ring[entry] = next(self.visit_numbers)
        return entry, count, is_over


class SlotQuota:
    """Free slots by level: a level may take no more than it, and each level below it, has left.

    Args:
        capacity: number of slots.
        reserved_share: share of the slots that a level leaves to each level below it.
    """

    def __init__(self, capacity: int, reserved_share: float) -> None:
        self.num_taken = 0
        self._capacity = capacity
        self._reserved_share = reserved_share
        # By level: slots that this level and those above it may still take together.
        self._free = [capacity]

    @property
    def is_exhausted(self) -> bool:
        """Whether no slot is free for any level."""
        return self.num_taken >= self._capacity

    def free(self, level: int) -> int:
        """Return the number of slots that rows of a level may take."""
        while len(self._free) <= level:
            reserved = math.ceil(len(self._free) * self._reserved_share * self._capacity)
            self._free.append(max(1, self._capacity - reserved))
        return min(self._free[: level + 1])

    def take(self, level: int, rows: int) -> None:
        """Assign slots to `rows` rows of a level."""
        self.num_taken += rows
        for index in range(level + 1):
            self._free[index] -= rows

    def give_back(self, level: int, rows: int) -> None:
        """Free the slots of `rows` rows of a level."""
        self.take(level, -rows)


@dataclass
class StepTimeEstimate:
    """Shortest step time of a program by batch size, in seconds, and the time charged for the latest step."""

    shortest: dict[int, float] = field(default_factory=dict)
    latest: float = 0.0
    is_reliable: bool = False

    def record(self, bucket: int, seconds: float) -> None:
        """Record a step. The first one at a batch size may include warm-up and is not charged."""
        is_first = bucket not in self.shortest
        shortest = self.shortest[bucket] = min(seconds, self.shortest.get(bucket, seconds))
        self.latest = 0.0 if is_first else min(seconds, MAX_STEP_TIME_RATIO * shortest)
        self.is_reliable |= not is_first

    def reset(self) -> None:
        """Discard all measurements."""
        self.shortest.clear()
        self.is_reliable = False

    @property
    def minimum(self) -> float:
        """Shortest step time at any batch size; 0 while only first steps have been recorded."""
        return min(self.shortest.values()) if self.is_reliable else 0.0

    @property
    def full_batch(self) -> float:
        """Shortest step time at the largest recorded batch size."""
        return self.shortest[max(self.shortest)] if self.shortest else 0.0


@dataclass(eq=False)
class ProgramQueue:
    """Queues, slots and device-time account of one program.

    Attributes:
        program: the program.
        capacity: its number of slots.
        least_steps: steps of the shortest rows that a request may ask for.
        quota: free slots by level.
        queues: requests that wait for slots, by (is_batch, level).
        stalled: requests whose caller must read before more of their rows may enter.
        running: requests with rows in slots.
        dropped: closed requests whose rows must leave their slots at the next step.
        step_time: measured step times.
        num_served: interactive requests with rows in slots.
        num_queued_steps: steps of all queued rows.
        credit: device time that it may spend, in seconds; negative for a debt.
        is_scheduled: whether it is in the scheduler's ring.
    """

    program: ProgramKey
    capacity: int
    least_steps: int
    quota: SlotQuota
    queues: dict[tuple[bool, int], PriorityQueue] = field(default_factory=dict)
    stalled: dict[QueueEntry, None] = field(default_factory=dict)
    running: dict[QueueEntry, None] = field(default_factory=dict)
    dropped: list[QueueEntry] = field(default_factory=list)
    step_time: StepTimeEstimate = field(default_factory=StepTimeEstimate)
    num_served: int = 0
    num_queued_steps: int = 0
    credit: float = 0.0
    is_scheduled: bool = False
    _interactive_visits: int = 0
    _visit_numbers: Iterator[int] = field(default_factory=itertools.count)
    _costs: Counter[int] = field(default_factory=Counter)

    @property
    def num_running(self) -> int:
        return self.quota.num_taken

    @property
    def has_work(self) -> bool:
        return bool(self.num_running or self.dropped or any(self.queues.values()))

    @property
    def share(self) -> float:
        """Device time due to this program, in interactive requests.

        The number of interactive requests with rows in the batch, or 1 while they are only queued. Batch
        requests count less than 1 together.
        """
        has_interactive = any(queue for queue in self.queues.values() if not queue.is_batch)
        return max(self.num_served, 1 if has_interactive else BATCH_SHARE)

    def relative_share(self, largest: float) -> float:
        """Return its device time relative to that of the program with the largest share."""
        return max(self.share / largest, MIN_DEVICE_SHARE * min(1, self.share))

    @property
    def backlog_seconds(self) -> float:
        """Time that the queued rows need in full batches, in seconds."""
        return self.num_queued_steps * self.step_time.full_batch / self.capacity

    @property
    def open_entries(self) -> list[QueueEntry]:
        """Every request that is not closed."""
        queued = itertools.chain.from_iterable(queue.ring for queue in self.queues.values())
        return list(dict.fromkeys((*self.running, *queued, *self.stalled)))

    def add(self, entry: QueueEntry) -> None:
        """Queue a new request."""
        entry.level = self._level(entry)
        self.num_queued_steps += entry.num_queued * entry.row_cost
        self._enqueue(entry)

    def resume(self, entry: QueueEntry) -> None:
        """Queue a stalled request again once its caller has read some rows."""
        if entry in self.stalled and entry.num_admissible:
            del self.stalled[entry]
            self._enqueue(entry)

    def remove(self, entry: QueueEntry) -> None:
        """Remove a closed request: its queued rows now, its running rows at the next step."""
        self._queue_of(entry).discard(entry)
        self.stalled.pop(entry, None)
        self.num_queued_steps -= entry.num_queued * entry.row_cost
        if entry in self.running:
            self._stop_running(entry)
            self.quota.give_back(entry.level, entry.num_running)
            self.dropped.append(entry)

    def finish(self, entry: QueueEntry, rows: int) -> None:
        """Free the slots of `rows` finished rows of a request."""
        self.quota.give_back(entry.level, rows)
        if not entry.num_running and entry in self.running:
            self._stop_running(entry)

    def pop_dropped(self) -> list[QueueEntry]:
        """Return the requests whose rows must leave their slots, once."""
        dropped, self.dropped = self.dropped, []
        return dropped

    def admit(self, quantum_rows: int, max_requests: int | None = None) -> list[Admission]:
        """Assign the free slots to queued rows, of at most `max_requests` requests."""
        admissions: dict[QueueEntry, Admission] = {}
        while (queue := self._next_queue()) is not None:
            is_full = max_requests is not None and len(admissions) >= max_requests
            if is_full and next(iter(queue.ring)) not in admissions:
                break
            entry, count, is_over = queue.visit(quantum_rows, self.quota.free(queue.level))
            if is_over:
                self._interactive_visits = 0 if queue.is_batch else self._interactive_visits + 1
            if earlier := admissions.get(entry):
                admissions[entry] = Admission(entry.request, earlier.first, earlier.count + count)
            else:
                admissions[entry] = Admission(entry.request, entry.admitted, count)
            self._start_running(entry, count)
        return list(admissions.values())

    def _level(self, entry: QueueEntry) -> int:
        """One for each factor of eight above the program's shortest rows, and one for batch priority."""
        length = entry.row_cost // max(1, self.least_steps)
        return max(0, length.bit_length() - 1) // 3 + entry.request.is_batch

    def _enqueue(self, entry: QueueEntry) -> None:
        if entry.num_admissible:
            self._queue_of(entry).append(entry)
        else:
            self.stalled[entry] = None

    def _queue_of(self, entry: QueueEntry) -> PriorityQueue:
        key = entry.request.is_batch, entry.level
        if key not in self.queues:
            self.queues[key] = PriorityQueue(*key, self._costs, self._visit_numbers)
        return self.queues[key]

    def _next_queue(self) -> PriorityQueue | None:
        """Return the queue whose first request is visited next; None when no row can enter."""
        if self.quota.is_exhausted:
            return None
        is_batch_due = self._interactive_visits >= BATCH_PRIORITY_INTERVAL - 1
        eligible = [
            queue for queue in self.queues.values() if queue.ring and self.quota.free(queue.level) > 0
        ]
        return min(
            eligible, key=lambda queue: (queue.is_batch != is_batch_due, queue.next_visit), default=None
        )

    def _start_running(self, entry: QueueEntry, count: int) -> None:
        entry.admitted += count
        self.quota.take(entry.level, count)
        self.num_queued_steps -= count * entry.row_cost
        if entry not in self.running:
            self.running[entry] = None
            self.num_served += not entry.request.is_batch
        if not entry.num_admissible:
            self._queue_of(entry).discard(entry)
            if entry.num_queued:
                self.stalled[entry] = None

    def _stop_running(self, entry: QueueEntry) -> None:
        del self.running[entry]
        self.num_served -= not entry.request.is_batch
