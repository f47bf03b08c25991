"""One program's requests: who waits for its slots, who has some, and who gets the next.

Pure policy, like scheduler.py: no tensors, no clock. Free slots go to waiting
requests by deficit round robin (Shreedhar & Varghese, 1995): at each visit a request
earns a quantum of row-steps, and a row costs its steps, so that requests share the
slots' time whatever the length of their rows.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from server.request import Request
from server.spec import ProgramKey

# Of this many visits one is paid to requests of low priority while others wait as well.
BATCH_VISIT = 8
# Rows of low priority leave this share of the slots to others.
RESERVED_SHARE = 8
# A program that only batch jobs use is due so much of the device time of one that somebody waits for.
BATCH_SHARE = 0.25
_SMOOTHING = 0.2


@dataclass(frozen=True)
class Admission:
    """Rows of a request that enter the batch: offsets first .. first + count."""

    request: Request
    first: int
    count: int


@dataclass
class Queue:
    """Requests that wait for slots, the one to be visited next in front."""

    ring: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    _costs: Counter[int] = field(default_factory=Counter)
    _visited: Request | None = None

    def __len__(self) -> int:
        return len(self.ring)

    def join(self, request: Request) -> None:
        self.ring[request] = None
        self._costs[request.row_cost] += 1

    def leave(self, request: Request) -> None:
        """Forget a request; one that is not here is none of this queue's."""
        if request in self.ring:
            del self.ring[request]
            request.deficit = 0
            if self._visited is request:
                self._visited = None
            self._costs[request.row_cost] -= 1
            if not self._costs[request.row_cost]:
                del self._costs[request.row_cost]

    def visit(self, quantum_rows: int, free: int) -> tuple[Request, int, bool]:
        """The request in front, how many of its rows enter, and whether the visit is over."""
        request = next(iter(self.ring))
        if request is not self._visited:
            self._visited = request
            # The dearest row must be affordable, or a visit could pass without any.
            request.deficit += quantum_rows * max(self._costs)
        count = min(free, request.deficit // request.row_cost, request.num_admissible)
        request.deficit -= count * request.row_cost
        is_over = count == request.num_admissible or request.deficit < request.row_cost
        if is_over:
            self._visited = None
            self.ring.move_to_end(request)
        return request, count, is_over


@dataclass
class Pace:
    """How long a program's turns take, by bucket, as moving averages in seconds."""

    seconds: dict[int, float] = field(default_factory=dict)
    latest: float = 0.0

    def learn(self, bucket: int, seconds: float) -> None:
        known = self.seconds.get(bucket, seconds)
        self.latest = self.seconds[bucket] = known + _SMOOTHING * (seconds - known)

    @property
    def fastest(self) -> float:
        """No turn is expected to take less; 0 before the first."""
        return min(self.seconds.values(), default=0.0)


@dataclass(eq=False)
class Lane:
    """One program's queues and slots."""

    program: ProgramKey
    capacity: int
    interactive: Queue = field(default_factory=Queue)
    batch: Queue = field(default_factory=Queue)
    stalled: dict[Request, None] = field(default_factory=dict)
    active: dict[Request, None] = field(default_factory=dict)
    dropped: list[Request] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)
    num_active: int = 0
    num_active_batch: int = 0
    num_served: int = 0
    width: int = 0
    num_waiting_steps: int = 0
    credit: float = 0.0
    is_ringed: bool = False
    _visits: int = 0

    @property
    def has_work(self) -> bool:
        return bool(self.num_active or self.dropped or self.interactive or self.batch)

    @property
    def share(self) -> float:
        """Device time due to this program beside others: that of its interactive requests, all alike.

        As many as have rows in the batch; one, while they only wait; together less than one, for batch jobs.
        """
        return max(self.num_served, 1 if self.interactive else BATCH_SHARE)

    @property
    def backlog_seconds(self) -> float:
        """How long what waits would take in full batches."""
        return self.num_waiting_steps * self.pace.latest / self.capacity

    @property
    def requests(self) -> list[Request]:
        """Every request that has not ended."""
        waiting = (*self.interactive.ring, *self.batch.ring, *self.stalled)
        return list(dict.fromkeys((*self.active, *waiting)))

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
            self._release(request, request.num_active)
            self.dropped.append(request)

    def finish(self, request: Request, rows: int) -> None:
        """So many rows of a request have left their slots."""
        self._release(request, rows)
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
            free = self.capacity - self.num_active
            if queue is self.batch:
                free = min(free, self._batch_capacity - self.num_active_batch)
            request, count, is_over = queue.visit(quantum_rows, free)
            if is_over:
                self._visits = 0 if queue is self.batch else self._visits + 1
            earlier = admissions.get(request)
            admissions[request] = Admission(
                request,
                earlier.first if earlier else request.admitted,
                count + (earlier.count if earlier else 0),
            )
            self._enter(request, count)
        return list(admissions.values())

    @property
    def _batch_capacity(self) -> int:
        return self.capacity - self.capacity // RESERVED_SHARE

    def _queue(self, request: Request) -> Queue:
        return self.batch if request.is_batch else self.interactive

    def _next_queue(self) -> Queue | None:
        """The queue whose request is visited next; None when nothing can enter."""
        if self.num_active >= self.capacity:
            return None
        batch_enters = bool(self.batch) and self.num_active_batch < self._batch_capacity
        if self.interactive and not (batch_enters and self._visits >= BATCH_VISIT - 1):
            return self.interactive
        return self.batch if batch_enters else None

    def _enter(self, request: Request, count: int) -> None:
        request.admitted += count
        self.num_active += count
        self.num_active_batch += count if request.is_batch else 0
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

    def _release(self, request: Request, rows: int) -> None:
        self.num_active -= rows
        self.num_active_batch -= rows if request.is_batch else 0


def _is_full(admissions: dict[Request, Admission], queue: Queue, most: int | None) -> bool:
    return most is not None and len(admissions) >= most and next(iter(queue.ring)) not in admissions
