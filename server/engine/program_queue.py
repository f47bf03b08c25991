"""One program's requests: who waits for its slots, who has some, and who gets the next.

Pure policy, like scheduler.py: no tensors, no clock. Free slots go to waiting
requests by deficit round robin (Shreedhar & Varghese, 1995): at each visit a request
earns a quantum of row-steps, and a row costs its steps, so that requests share the
slots' time whatever the length of their rows.

A row keeps its slot to its end, so a short one would have to wait for a long one. Rows
have levels therefore, one for each factor of eight in their length and one for low
priority, and each level leaves some slots to those below it.
"""

import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.core.request import Request
from server.core.spec import ProgramKey

# Of this many visits one is paid to requests of low priority while others wait as well.
BATCH_PRIORITY_INTERVAL = 8
# A level leaves one of so many slots to each level below it.
RESERVED_SHARE = 16
# A program that only batch jobs use is due so much of the device time of one that somebody waits for.
BATCH_SHARE = 0.25
# A program that somebody waits for is due at least so much of the device time of one that serves many more.
MIN_DEVICE_SHARE = 1 / 8
# A turn counts for at most so many of the fastest at its batch size: it may have been held up by others.
MAX_STEP_TIME_RATIO = 4


@dataclass(frozen=True)
class Admission:
    """Rows of a request that enter the batch: offsets first .. first + count."""

    request: Request
    first: int
    count: int


@dataclass
class PriorityQueue:
    """Requests of one priority and level that wait for slots, the one to be visited next in front.

    Each has its number in the order of visits, so that the queues of a priority are visited as one; `costs`
    counts what a row takes, over all queues.
    """

    is_batch: bool
    level: int
    costs: Counter[int]
    numbers: Iterator[int]
    ring: OrderedDict[Request, int] = field(default_factory=OrderedDict)
    _visited: Request | None = None

    def __len__(self) -> int:
        return len(self.ring)

    @property
    def number(self) -> int:
        """That of the request in front."""
        return next(iter(self.ring.values()))

    def join(self, request: Request) -> None:
        self.ring[request] = next(self.numbers)
        self.costs[request.row_cost] += 1

    def leave(self, request: Request) -> None:
        """Forget a request; one that is not here is none of this queue's."""
        if request in self.ring:
            del self.ring[request]
            request.deficit = 0
            if self._visited is request:
                self._visited = None
            self.costs[request.row_cost] -= 1
            if not self.costs[request.row_cost]:
                del self.costs[request.row_cost]

    def visit(self, quantum_rows: int, free: int) -> tuple[Request, int, bool]:
        """The request in front, how many of its rows enter, and whether the visit is over."""
        request = next(iter(self.ring))
        if request is not self._visited:
            self._visited = request
            # The dearest row must be affordable, or a visit could pass without any.
            request.deficit += quantum_rows * max(self.costs)
        count = min(free, request.deficit // request.row_cost, request.num_admissible)
        request.deficit -= count * request.row_cost
        is_over = count == request.num_admissible or request.deficit < request.row_cost
        if is_over:
            self._visited = None
            self.ring.move_to_end(request)
            self.ring[request] = next(self.numbers)
        return request, count, is_over


class SlotQuota:
    """How many slots are free for rows of each level: no more than it and each below it may take."""

    def __init__(self, capacity: int, reserved: float) -> None:
        self.num_taken = 0
        self._capacity = capacity
        self._reserved = reserved
        # By level: what it and those above it may still take together.
        self._left = [capacity]

    @property
    def is_full(self) -> bool:
        """Whether no slot is free, for whatever level."""
        return self.num_taken >= self._capacity

    def of(self, level: int) -> int:
        """Slots for rows of a level."""
        while len(self._left) <= level:
            kept = math.ceil(len(self._left) * self._reserved * self._capacity)
            self._left.append(max(1, self._capacity - kept))
        return min(self._left[: level + 1])

    def take(self, level: int, rows: int) -> None:
        """So many rows of a level are in slots now."""
        self.num_taken += rows
        for each in range(level + 1):
            self._left[each] -= rows

    def give_back(self, level: int, rows: int) -> None:
        """So many rows of a level have left their slots."""
        self.take(level, -rows)


@dataclass
class StepTimeEstimate:
    """The least that a program's turns have taken, by bucket, in seconds, and what the latest counts for."""

    least: dict[int, float] = field(default_factory=dict)
    latest: float = 0.0
    is_proven: bool = False

    def learn(self, bucket: int, seconds: float) -> None:
        """A turn took so long. A bucket's first, which may have warmed something up, is not charged."""
        is_first = bucket not in self.least
        least = self.least[bucket] = min(seconds, self.least.get(bucket, seconds))
        self.latest = 0.0 if is_first else min(seconds, MAX_STEP_TIME_RATIO * least)
        self.is_proven |= not is_first

    def forget(self) -> None:
        """Trust no time that was measured before."""
        self.least.clear()
        self.is_proven = False

    @property
    def fastest(self) -> float:
        """No turn has taken less; 0 while there were only first ones, which prove nothing."""
        return min(self.least.values()) if self.is_proven else 0.0

    @property
    def full(self) -> float:
        """What a turn of the largest batch takes at least, as far as is known."""
        return self.least[max(self.least)] if self.least else 0.0


@dataclass(eq=False)
class ProgramQueue:
    """One program's queues and slots."""

    program: ProgramKey
    capacity: int
    least_steps: int
    quota: SlotQuota
    queues: dict[tuple[bool, int], PriorityQueue] = field(default_factory=dict)
    stalled: dict[Request, None] = field(default_factory=dict)
    active: dict[Request, None] = field(default_factory=dict)
    dropped: list[Request] = field(default_factory=list)
    step_time: StepTimeEstimate = field(default_factory=StepTimeEstimate)
    num_served: int = 0
    width: int = 0
    num_waiting_steps: int = 0
    credit: float = 0.0
    is_scheduled: bool = False
    _visits: int = 0
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _costs: Counter[int] = field(default_factory=Counter)

    @property
    def num_active(self) -> int:
        return self.quota.num_taken

    @property
    def has_work(self) -> bool:
        return bool(self.num_active or self.dropped or any(self.queues.values()))

    @property
    def share(self) -> float:
        """Device time due to this program beside others: that of its interactive requests, all alike.

        As many as have rows in the batch; one, while they only wait; together less than one, for batch jobs.
        """
        is_awaited = any(queue for queue in self.queues.values() if not queue.is_batch)
        return max(self.num_served, 1 if is_awaited else BATCH_SHARE)

    def relative_share(self, largest: float) -> float:
        """Its device time over that of the program with the largest share."""
        return max(self.share / largest, MIN_DEVICE_SHARE * min(1, self.share))

    @property
    def backlog_seconds(self) -> float:
        """How long what waits would take in full batches."""
        return self.num_waiting_steps * self.step_time.full / self.capacity

    @property
    def requests(self) -> list[Request]:
        """Every request that has not ended."""
        waiting = itertools.chain.from_iterable(queue.ring for queue in self.queues.values())
        return list(dict.fromkeys((*self.active, *waiting, *self.stalled)))

    def open(self, request: Request) -> None:
        """Let a new request wait."""
        request.level = self._level(request)
        self.num_waiting_steps += request.num_waiting * request.row_cost
        self.join(request)

    def join(self, request: Request) -> None:
        """Let a request wait for slots, or for its reader."""
        if request.num_admissible:
            self._queue(request).join(request)
        else:
            self.stalled[request] = None

    def resume(self, request: Request) -> None:
        """The reader of a request has room again."""
        if request in self.stalled and request.num_admissible:
            del self.stalled[request]
            self.join(request)

    def remove(self, request: Request) -> None:
        """A request has ended: its waiting rows go now, its active ones with the next turn."""
        self._queue(request).leave(request)
        self.stalled.pop(request, None)
        self.num_waiting_steps -= request.num_waiting * request.row_cost
        if request in self.active:
            self._leave(request)
            self.quota.give_back(request.level, request.num_active)
            self.dropped.append(request)

    def finish(self, request: Request, rows: int) -> None:
        """So many rows of a request have left their slots."""
        self.quota.give_back(request.level, rows)
        if not request.num_active and request in self.active:
            self._leave(request)

    def take_dropped(self) -> list[Request]:
        """Requests whose rows must leave their slots."""
        dropped, self.dropped = self.dropped, []
        return dropped

    def admit(self, quantum_rows: int, max_requests: int | None = None) -> list[Admission]:
        """Hand out the free slots; at most `max_requests` requests take part."""
        admissions: dict[Request, Admission] = {}
        while (queue := self._next_queue()) and not _is_full(admissions, queue, max_requests):
            request, count, is_over = queue.visit(quantum_rows, self.quota.of(queue.level))
            if is_over:
                self._visits = 0 if queue.is_batch else self._visits + 1
            earlier = admissions.get(request)
            admissions[request] = Admission(
                request,
                earlier.first if earlier else request.admitted,
                count + (earlier.count if earlier else 0),
            )
            self._enter(request, count)
        return list(admissions.values())

    def _level(self, request: Request) -> int:
        """One for each factor of eight over the shortest rows that there may be, and one for low priority."""
        length = request.row_cost // max(1, self.least_steps)
        return max(0, length.bit_length() - 1) // 3 + request.is_batch

    def _queue(self, request: Request) -> PriorityQueue:
        key = request.is_batch, request.level
        if key not in self.queues:
            self.queues[key] = PriorityQueue(*key, self._costs, self._numbers)
        return self.queues[key]

    def _next_queue(self) -> PriorityQueue | None:
        """The queue whose request is visited next; None when nothing can enter."""
        if self.quota.is_full:
            return None
        is_batch_due = self._visits >= BATCH_PRIORITY_INTERVAL - 1
        able = [queue for queue in self.queues.values() if queue.ring and self.quota.of(queue.level) > 0]
        return min(able, key=lambda queue: (queue.is_batch != is_batch_due, queue.number), default=None)

    def _enter(self, request: Request, count: int) -> None:
        request.admitted += count
        self.quota.take(request.level, count)
        self.num_waiting_steps -= count * request.row_cost
        if request not in self.active:
            self.active[request] = None
            self.num_served += not request.is_batch
        if not request.num_admissible:
            self._queue(request).leave(request)
            if request.num_waiting:
                self.stalled[request] = None

    def _leave(self, request: Request) -> None:
        """None of a request's rows is in the batch any more."""
        del self.active[request]
        self.num_served -= not request.is_batch


def _is_full(admissions: dict[Request, Admission], queue: PriorityQueue, most: int | None) -> bool:
    return most is not None and len(admissions) >= most and next(iter(queue.ring)) not in admissions
