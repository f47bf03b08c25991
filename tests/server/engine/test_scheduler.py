"""Scheduling policy, as tables and properties: pure Python, no tensors, no clock."""

import contextlib
import math
import weakref
from collections import deque
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.batching import NoBatching, RequestBatching
from server.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, Violation
from server.core.request import Event, Request
from server.core.spec import ProgramKey
from server.engine.program_queue import BATCH_SHARE, MIN_DEVICE_SHARE, RESERVED_SHARE, QueueEntry
from server.engine.scheduler import BatchingPolicy, ContinuousBatching, Limits, ScheduledStep, Scheduler

LEFT = ProgramKey("left", "1", "toy", "sample")
RIGHT = ProgramKey("right", "1", "toy", "sample")
CAPACITY = 8
BATCHING: Sequence[BatchingPolicy] = (ContinuousBatching(), RequestBatching(), NoBatching())


def new_scheduler(
    capacity: int = CAPACITY, batching: BatchingPolicy | None = None, **limits: object
) -> Scheduler:
    scheduler = Scheduler(Limits(**{"drr_quantum_rows": 2, **limits}), batching)  # type: ignore[arg-type]
    scheduler.add_program(LEFT, capacity)
    scheduler.add_program(RIGHT, capacity)
    return scheduler


def request(rows: int, program: ProgramKey = LEFT, steps: int = 1, **fields: object) -> Request:
    return Request(program, rows, steps, **fields)  # type: ignore[arg-type]


def ignore(events: Sequence[Event]) -> None:
    pass


def submit(scheduler: Scheduler, queued: Request, now: float = -math.inf) -> QueueEntry:
    return scheduler.submit(queued, ignore, now)


def submit_rows(scheduler: Scheduler, rows: int, program: ProgramKey = LEFT, **fields: object) -> QueueEntry:
    return submit(scheduler, request(rows, program, **fields))  # type: ignore[arg-type]


def take_step(scheduler: Scheduler, seconds: float = 1.0) -> ScheduledStep:
    """Take the next step, which lasts `seconds`."""
    step = scheduler.next_step()
    assert step is not None
    scheduler.record_step_time(step.program, CAPACITY, seconds)
    return step


def record_step_time(scheduler: Scheduler, seconds: float, program: ProgramKey = LEFT) -> None:
    """Record two steps of `seconds`: the first one at a batch size does not count."""
    for _ in range(2):
        scheduler.record_step_time(program, CAPACITY, seconds)


def admitted(step: ScheduledStep) -> dict[Request, int]:
    return {admission.request: admission.count for admission in step.admissions}


def test_next_step_without_requests_is_none() -> None:
    assert new_scheduler().next_step() is None


def test_slots_are_shared_by_requests_round_robin() -> None:
    scheduler = new_scheduler()
    big, small = submit_rows(scheduler, 1000), submit_rows(scheduler, 3)
    assert admitted(take_step(scheduler)) == {big.request: 5, small.request: 3}


def test_later_small_request_gets_next_free_slots() -> None:
    scheduler = new_scheduler()
    big = submit_rows(scheduler, 1000)
    take_step(scheduler)
    small = submit_rows(scheduler, 2)
    scheduler.finish(big.request, 4)
    assert admitted(take_step(scheduler)) == {big.request: 2, small.request: 2}


def test_programs_of_equal_cost_alternate() -> None:
    scheduler = new_scheduler()
    submit_rows(scheduler, 100, LEFT)
    submit_rows(scheduler, 1, RIGHT)
    assert [take_step(scheduler).program for _ in range(4)] == [LEFT, RIGHT, LEFT, RIGHT]


def test_admissions_of_a_request_are_consecutive() -> None:
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, 20)
    first = take_step(scheduler).admissions
    scheduler.finish(entry.request, CAPACITY)
    second = take_step(scheduler).admissions
    assert [(a.first, a.count) for a in (*first, *second)] == [(0, 8), (8, 8)]


def test_submit_above_queued_row_limit_is_rejected() -> None:
    scheduler = new_scheduler(max_queued_rows=10)
    submit_rows(scheduler, 10)
    with pytest.raises(Overloaded) as rejection:
        submit_rows(scheduler, 1)
    assert rejection.value.retry_delay > 0
    take_step(scheduler)
    submit_rows(scheduler, 8)


def test_submit_to_unknown_program_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        submit_rows(new_scheduler(), 1, ProgramKey("other", "1", "toy", "sample"))


def test_close_frees_queued_rows_now_and_slots_at_next_step() -> None:
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, 20)
    take_step(scheduler)
    assert scheduler.close(entry.request, "cancelled")
    assert not scheduler.close(entry.request, "cancelled")
    assert (scheduler.num_queued, scheduler.num_running) == (0, 0)
    assert scheduler.entry(entry.request) is entry
    assert take_step(scheduler).dropped == [entry]
    assert scheduler.entry(entry.request) is None
    assert scheduler.next_step() is None


def test_request_of_slow_reader_is_stalled_until_acknowledged() -> None:
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, 20, max_unread_rows=4)
    assert admitted(take_step(scheduler)) == {entry.request: 4}
    scheduler.finish(entry.request, 4)
    assert scheduler.next_step() is None
    scheduler.acknowledge(entry.request, 3)
    assert admitted(take_step(scheduler)) == {entry.request: 3}


def test_acknowledge_of_ended_request_is_ignored() -> None:
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, 1)
    take_step(scheduler)
    scheduler.finish(entry.request, 1)
    scheduler.acknowledge(entry.request, 1)
    assert scheduler.next_step() is None


def test_deadlines_expire_in_order_and_once() -> None:
    scheduler = new_scheduler()
    late, early = submit_rows(scheduler, 1, deadline=9.0), submit_rows(scheduler, 1, deadline=5.0)
    submit_rows(scheduler, 1)
    assert scheduler.next_deadline() == 5.0
    assert scheduler.expired(4.9) == []
    assert scheduler.expired(5.0) == [early]
    assert scheduler.expired(100.0) == [late]
    assert scheduler.next_deadline() is None


def test_ended_request_does_not_expire() -> None:
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, 1, deadline=5.0)
    take_step(scheduler)
    scheduler.finish(entry.request, 1)
    assert scheduler.expired(6.0) == []


def test_ended_requests_are_freed_while_an_early_deadline_is_open() -> None:
    scheduler = new_scheduler()
    submit_rows(scheduler, 1, RIGHT, deadline=1.0)
    ended = []
    for number in range(1000):
        entry = submit_rows(scheduler, 1, deadline=2.0 + number)
        while entry.admitted == 0:
            take_step(scheduler)
        scheduler.finish(entry.request, 1)
        ended.append(weakref.ref(entry.request))
    del entry
    assert sum(reference() is not None for reference in ended) < 200


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_no_request_waits_while_another_exceeds_its_share(sizes: list[int]) -> None:
    scheduler = new_scheduler()
    entries = [submit_rows(scheduler, rows) for rows in sizes]
    counts = admitted(take_step(scheduler))
    quantum = scheduler.limits.drr_quantum_rows
    for entry in entries:
        if entry.num_queued:
            assert max(counts.values()) - counts.get(entry.request, 0) <= quantum


def served_row_steps(scheduler: Scheduler, entries: list[QueueEntry], steps: int) -> dict[QueueEntry, int]:
    """Run `steps` steps, in which rows finish when they are done; return each request's row-steps."""
    by_request = {entry.request: entry for entry in entries}
    ages: list[tuple[QueueEntry, int]] = []
    served = dict.fromkeys(entries, 0)
    for _ in range(steps):
        step = take_step(scheduler)
        ages += [(by_request[queued], 0) for queued, count in admitted(step).items() for _ in range(count)]
        for entry, _ in ages:
            served[entry] += 1
        ages = [(entry, age + 1) for entry, age in ages]
        for entry, age in ages:
            if age == entry.request.steps:
                scheduler.finish(entry.request, 1)
        ages = [(entry, age) for entry, age in ages if age < entry.request.steps]
    return served


def test_requests_share_slot_time_regardless_of_row_length() -> None:
    scheduler = new_scheduler()
    long, short = submit_rows(scheduler, 10_000, steps=40), submit_rows(scheduler, 10_000, steps=5)
    served = served_row_steps(scheduler, [long, short], steps=4000)
    assert 0.8 < served[long] / served[short] < 1.25


@given(st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_no_request_is_ahead_by_more_than_two_visits(lengths: list[int]) -> None:
    scheduler = new_scheduler(capacity=16)
    entries = [submit_rows(scheduler, 10_000, steps=steps) for steps in lengths]
    served_row_steps(scheduler, entries, steps=300)
    earned = [entry.admitted * entry.request.steps for entry in entries]
    assert max(earned) - min(earned) <= 2 * scheduler.limits.drr_quantum_rows * max(lengths)


def device_time(
    scheduler: Scheduler, seconds: Mapping[ProgramKey, float], steps: int = 1000
) -> dict[ProgramKey, float]:
    """Run `steps` steps; return each program's device time."""
    spent = dict.fromkeys(seconds, 0.0)
    for _ in range(steps):
        step = scheduler.next_step()
        assert step is not None
        scheduler.record_step_time(step.program, CAPACITY, seconds[step.program])
        spent[step.program] += seconds[step.program]
    return spent


def test_programs_share_the_device_by_time() -> None:
    scheduler = new_scheduler()
    submit_rows(scheduler, 8, LEFT)
    submit_rows(scheduler, 8, RIGHT)
    spent = device_time(scheduler, {LEFT: 0.010, RIGHT: 0.001})
    assert 0.8 < spent[LEFT] / spent[RIGHT] < 1.25


def test_program_gets_device_time_for_each_served_request() -> None:
    scheduler = new_scheduler()
    seconds = {LEFT: 0.001, RIGHT: 0.010}
    submit_rows(scheduler, 5, LEFT)
    finished, cancelled, _ = (submit_rows(scheduler, 1, RIGHT) for _ in range(3))
    spent = device_time(scheduler, seconds)
    assert 2.4 < spent[RIGHT] / spent[LEFT] < 3.6
    scheduler.finish(finished.request, 1)
    scheduler.close(cancelled.request, "cancelled")
    spent = device_time(scheduler, seconds)
    assert 0.8 < spent[RIGHT] / spent[LEFT] < 1.25


def test_batch_requests_of_a_program_share_less_than_one_interactive_request() -> None:
    scheduler = new_scheduler()
    submit_rows(scheduler, 1, LEFT)
    for _ in range(3):
        submit_rows(scheduler, 1, RIGHT, is_batch=True)
    spent = device_time(scheduler, {LEFT: 0.002, RIGHT: 0.002})
    assert spent[RIGHT] / spent[LEFT] == pytest.approx(BATCH_SHARE, rel=0.1)


@settings(max_examples=25)
@given(
    num_requests=st.integers(1, 64),
    left_seconds=st.floats(0.005, 0.05),
    right_seconds=st.floats(0.005, 0.05),
    is_batch=st.booleans(),
)
def test_program_with_one_request_keeps_its_share(
    num_requests: int, left_seconds: float, right_seconds: float, is_batch: bool
) -> None:
    scheduler = new_scheduler(capacity=64)
    for _ in range(num_requests):
        submit_rows(scheduler, 1, LEFT)
    submit_rows(scheduler, 1, RIGHT, is_batch=is_batch)
    due = max(1 / num_requests, MIN_DEVICE_SHARE) * (BATCH_SHARE if is_batch else 1)
    spent = device_time(scheduler, {LEFT: left_seconds, RIGHT: right_seconds}, steps=1500)
    assert spent[RIGHT] + 2 * right_seconds >= due * (spent[LEFT] - 2 * left_seconds)


@given(
    st.lists(st.floats(0.001, 0.1), min_size=3, max_size=3),
    st.integers(20, 60),
    st.floats(0.001, 1e4),
)
def test_one_slow_step_delays_no_program_for_long(seconds: list[float], slow_step: int, delay: float) -> None:
    scheduler = new_scheduler()
    third = ProgramKey("third", "1", "toy", "sample")
    scheduler.add_program(third, CAPACITY)
    step_times = dict(zip((LEFT, RIGHT, third), seconds, strict=True))
    for program in step_times:
        submit_rows(scheduler, 1, program)
    now, last = 0.0, dict.fromkeys(step_times, 0.0)
    for number in range(300):
        step = scheduler.next_step()
        assert step is not None
        program = step.program
        outlier = delay if number == slow_step else 0.0
        scheduler.record_step_time(program, CAPACITY, step_times[program] + outlier)
        assert now - last[program] <= 12 * max(seconds)
        now += step_times[program]
        last[program] = now


def test_programs_share_a_pipelined_device_by_time() -> None:
    """The duration of a step is known only after the next one was launched."""
    scheduler = new_scheduler()
    seconds = {LEFT: 0.010, RIGHT: 0.002}
    for program in seconds:
        submit_rows(scheduler, 1, program, steps=100_000)
        record_step_time(scheduler, seconds[program], program)
    total, in_flight = dict.fromkeys(seconds, 0.0), deque[tuple[ProgramKey, float]]()
    for _ in range(2000):
        step = scheduler.next_step()
        assert step is not None
        in_flight.append((step.program, scheduler.charge_steps(step.program, CAPACITY)))
        if len(in_flight) > 1:
            program, charged = in_flight.popleft()
            scheduler.record_step_time(program, CAPACITY, seconds[program], charged=charged)
            total[program] += seconds[program]
    assert total[LEFT] == pytest.approx(total[RIGHT], rel=0.05)


@pytest.mark.parametrize(("seconds", "max_steps"), [(0.0, 1), (0.001, 1), (0.0001, 2), (0.00001, 16)])
def test_lone_program_takes_several_small_steps_in_a_turn(seconds: float, max_steps: int) -> None:
    scheduler = new_scheduler()
    submit_rows(scheduler, 1, steps=1000)
    record_step_time(scheduler, seconds)
    step = scheduler.next_step()
    assert step is not None
    assert step.max_steps == max_steps
    scheduler.record_step_time(LEFT, CAPACITY, seconds, steps=max_steps)
    submit_rows(scheduler, 1, RIGHT)
    step = scheduler.next_step()
    assert step is not None
    assert step.max_steps == 1


def test_new_program_waits_for_one_step_of_a_busy_program() -> None:
    scheduler = new_scheduler()
    for _ in range(CAPACITY):
        submit_rows(scheduler, 1, LEFT, steps=1000)
    for _ in range(10):
        assert take_step(scheduler, 0.01).program == LEFT
    running = scheduler.next_step()
    submit_rows(scheduler, 1, RIGHT)
    assert running is not None
    scheduler.record_step_time(running.program, CAPACITY, 0.01)
    assert take_step(scheduler, 0.001).program == RIGHT


def test_batch_rows_leave_a_slot_for_interactive_rows() -> None:
    scheduler = new_scheduler()
    batch = submit_rows(scheduler, 1000, is_batch=True)
    assert admitted(take_step(scheduler)) == {batch.request: CAPACITY - 1}
    interactive = submit_rows(scheduler, 1)
    assert admitted(take_step(scheduler)) == {interactive.request: 1}


def test_interactive_row_enters_at_once_beside_long_batch_rows() -> None:
    scheduler = new_scheduler(capacity=64)
    submit_rows(scheduler, 1000, steps=1000, is_batch=True)
    take_step(scheduler)
    interactive = submit_rows(scheduler, 1, steps=1000)
    assert admitted(take_step(scheduler)) == {interactive.request: 1}


@given(
    capacity=st.integers(2, 200),
    chains=st.lists(st.tuples(st.integers(1, 300), st.integers(8, 5000), st.booleans()), min_size=1),
)
def test_row_enters_at_once_among_rows_eight_times_as_long(
    capacity: int, chains: list[tuple[int, int, bool]]
) -> None:
    scheduler = new_scheduler(capacity=capacity)
    for rows, steps, is_batch in chains:
        submit_rows(scheduler, rows, steps=steps, is_batch=is_batch)
    take_step(scheduler)
    # With few slots not every level has a reserve: the shortest rows get what there is.
    has_reserves = capacity * RESERVED_SHARE >= 1
    short = submit_rows(scheduler, 1, steps=min(steps for _, steps, _ in chains) // 8 if has_reserves else 1)
    assert short.request in admitted(take_step(scheduler))


@given(capacity=st.integers(1, 200), steps=st.integers(1, 500), is_batch=st.booleans())
def test_rows_leave_few_slots_to_shorter_rows(capacity: int, steps: int, is_batch: bool) -> None:
    scheduler = new_scheduler(capacity=capacity)
    entry = submit_rows(scheduler, 1000, steps=steps, is_batch=is_batch)
    count = admitted(take_step(scheduler))[entry.request]
    assert count >= max(1, min(capacity - 1, 0.75 * capacity - 1))
    assert count == capacity or steps >= 8 or is_batch


@given(capacity=st.integers(1, 200), steps=st.integers(1, 500))
def test_shortest_rows_of_a_program_take_every_slot(capacity: int, steps: int) -> None:
    scheduler = Scheduler()
    scheduler.add_program(LEFT, capacity, least_steps=steps)
    entry = submit_rows(scheduler, 1000, steps=steps)
    assert admitted(take_step(scheduler)) == {entry.request: capacity}


@pytest.mark.parametrize("batching", [RequestBatching(), NoBatching()], ids=lambda b: type(b).__name__)
def test_baseline_batching_reserves_no_slots(batching: BatchingPolicy) -> None:
    scheduler = new_scheduler(batching=batching)
    entry = submit_rows(scheduler, 100, steps=500, is_batch=True)
    assert admitted(take_step(scheduler)) == {entry.request: CAPACITY}


def test_batch_requests_do_not_starve() -> None:
    scheduler = new_scheduler()
    interactive, batch = submit_rows(scheduler, 10_000), submit_rows(scheduler, 10_000, is_batch=True)
    for _ in range(200):
        take_step(scheduler)
        for entry in (interactive, batch):
            if entry.num_running:
                scheduler.finish(entry.request, entry.num_running)
    assert 0.05 < batch.finished / interactive.finished < 0.3


@settings(max_examples=20)
@given(interactive_steps=st.integers(1, 40), batch_steps=st.integers(1, 40))
def test_priorities_share_slot_time_regardless_of_row_length(
    interactive_steps: int, batch_steps: int
) -> None:
    scheduler = new_scheduler()
    interactive = submit_rows(scheduler, 10_000, steps=interactive_steps)
    batch = submit_rows(scheduler, 10_000, steps=batch_steps, is_batch=True)
    served = served_row_steps(scheduler, [interactive, batch], steps=1500)
    assert 0.05 < served[batch] / served[interactive] < 0.3


def test_submit_with_unmeetable_deadline_is_rejected() -> None:
    scheduler = new_scheduler()
    submit(scheduler, request(1, steps=5, deadline=0.001), now=0.0)
    record_step_time(scheduler, 0.5)
    with pytest.raises(
        DeadlineExceeded, match=r"take 5 s at the shortest measured step time of 0\.5 s, 4 s are left"
    ):
        submit(scheduler, request(1, steps=10, deadline=14.0), now=10.0)
    submit(scheduler, request(1, steps=10, deadline=15.5), now=10.0)
    submit(scheduler, request(1, steps=10, deadline=11.0, has_early_exit=True), now=10.0)


step_histories = st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.floats(0.001, 1e6)), max_size=20)


@given(step_histories, st.integers(1, 1000))
def test_idle_program_rejects_at_most_one_request_after_any_history(
    history: list[tuple[int, float]], steps: int
) -> None:
    scheduler = new_scheduler()
    for bucket, seconds in history:
        scheduler.record_step_time(LEFT, bucket, seconds)
    with contextlib.suppress(DeadlineExceeded):
        submit(scheduler, request(1, steps=steps, deadline=60.0), now=0.0)
    second = submit(scheduler, request(1, steps=steps, deadline=60.0), now=0.0)
    assert scheduler.expired(0.0) == []
    assert second.request in admitted(take_step(scheduler))


def steps_needed(rows: int, steps: int) -> int:
    """Return the number of steps in which a request finishes when it is alone."""
    scheduler = new_scheduler()
    entry = submit_rows(scheduler, rows, steps=steps)
    count = 0
    while not entry.is_complete:
        served_row_steps(scheduler, [entry], steps=steps)
        count += steps
    return count


@given(step_histories, st.integers(1, 40), st.integers(1, 20), st.floats(0, 100))
def test_request_that_the_shortest_steps_can_finish_is_accepted(
    history: list[tuple[int, float]], rows: int, steps: int, seconds_left: float
) -> None:
    scheduler = new_scheduler()
    for bucket, seconds in history:
        scheduler.record_step_time(LEFT, bucket, seconds)
    try:
        submit(scheduler, request(rows, steps=steps, deadline=seconds_left), now=0.0)
    except DeadlineExceeded:
        shortest = min(seconds for _, seconds in history)
        assert steps_needed(rows, steps) * shortest > seconds_left


def test_queued_rows_expire_once_they_cannot_finish_in_time() -> None:
    scheduler = new_scheduler()
    submit(scheduler, request(CAPACITY, steps=100), now=0.0)
    record_step_time(scheduler, 0.5)
    queued = submit(scheduler, request(1, steps=10, deadline=20.0), now=1.0)
    assert scheduler.next_deadline() == 15.0
    assert scheduler.expired(14.9) == []
    assert scheduler.expired(15.0) == [queued]


def test_slow_first_step_expires_no_request() -> None:
    scheduler = new_scheduler()
    submit(scheduler, request(CAPACITY, steps=100), now=0.0)
    submit(scheduler, request(1, steps=20, deadline=60.0), now=0.0)
    take_step(scheduler, seconds=10.0)
    assert scheduler.expired(59.9) == []


def test_running_rows_expire_at_their_deadline() -> None:
    scheduler = new_scheduler()
    record_step_time(scheduler, 0.5)
    running = submit(scheduler, request(1, steps=10, deadline=20.0), now=1.0)
    take_step(scheduler, seconds=0.5)
    assert scheduler.expired(19.9) == []
    assert scheduler.next_deadline() == 20.0
    assert scheduler.expired(20.0) == [running]


def test_shorter_step_time_postpones_expiry() -> None:
    scheduler = new_scheduler()
    submit(scheduler, request(CAPACITY, steps=100), now=0.0)
    record_step_time(scheduler, 1.0)
    queued = submit(scheduler, request(1, steps=10, deadline=20.0), now=1.0)
    record_step_time(scheduler, 0.1)
    assert scheduler.expired(10.0) == []
    assert scheduler.next_deadline() == 19.0
    assert scheduler.expired(19.0) == [queued]


def test_submit_above_buffer_limit_is_rejected_until_release() -> None:
    scheduler = new_scheduler(max_buffered_bytes=100)
    first = submit_rows(scheduler, 1, buffered_bytes=80)
    with pytest.raises(Overloaded, match="80 bytes"):
        submit_rows(scheduler, 1, buffered_bytes=21)
    scheduler.close(first.request, "cancelled")
    with pytest.raises(Overloaded, match="80 bytes"):
        submit_rows(scheduler, 1, buffered_bytes=21)
    scheduler.release(first.request)
    scheduler.release(first.request)
    submit_rows(scheduler, 1, buffered_bytes=100)


@pytest.mark.parametrize(("inputs", "field"), [({}, "rows"), ({"value": object()}, "inputs")])
def test_submit_larger_than_the_whole_buffer_is_invalid(inputs: Mapping[str, object], field: str) -> None:
    scheduler = new_scheduler(max_buffered_bytes=100)
    with pytest.raises(InvalidRequest) as rejection:
        submit_rows(scheduler, 1, buffered_bytes=101, inputs=inputs)
    expected = "expected at most 100 bytes of inputs and unread rows, got 101"
    assert rejection.value.violations == (Violation(field, expected),)


def retry_delay(rows: int, steps: int) -> float:
    """Return the retry delay of a rejected request while `rows` rows are queued."""
    scheduler = new_scheduler(max_queued_rows=rows)
    record_step_time(scheduler, 0.01)
    submit_rows(scheduler, rows, steps=steps)
    with pytest.raises(Overloaded) as rejection:
        submit_rows(scheduler, 1)
    return rejection.value.retry_delay


def test_retry_delay_is_time_of_half_the_queue() -> None:
    assert retry_delay(1, 1) == Limits().min_retry_seconds
    assert retry_delay(1600, 10) == pytest.approx(10.0)
    assert retry_delay(1_000_000, 10) == Limits().max_retry_seconds


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 100))
def test_retry_delay_grows_with_the_queue(rows: int, more: int, steps: int) -> None:
    assert retry_delay(rows, steps) <= retry_delay(rows + more, steps)
    assert retry_delay(rows, steps) <= retry_delay(rows, steps + 1)


@pytest.mark.parametrize("batching", BATCHING, ids=lambda batching: type(batching).__name__)
def test_only_continuous_batching_admits_rows_to_a_running_batch(batching: BatchingPolicy) -> None:
    scheduler = Scheduler(batching=batching)
    scheduler.add_program(LEFT, CAPACITY)
    first, second = submit_rows(scheduler, 2, steps=5), submit_rows(scheduler, 2, steps=5)
    expected = {first.request} if isinstance(batching, NoBatching) else {first.request, second.request}
    assert set(admitted(take_step(scheduler))) == expected
    late = submit_rows(scheduler, 2, steps=5)
    assert (late.request in admitted(take_step(scheduler))) is isinstance(batching, ContinuousBatching)


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of submitting, stepping, finishing, cancelling and waiting keeps all counts consistent."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[QueueEntry] = []
        self.released: set[QueueEntry] = set()
        self.expired: list[QueueEntry] = []
        self.now = 0.0

    @initialize(batching=st.sampled_from(BATCHING))
    def start(self, batching: BatchingPolicy) -> None:
        self.batching = batching
        self.scheduler = new_scheduler(batching=batching, max_queued_rows=60, max_buffered_bytes=100)

    @property
    def open_entries(self) -> list[QueueEntry]:
        return [entry for entry in self.entries if not entry.is_closed]

    def running(self, program: ProgramKey) -> list[QueueEntry]:
        return [
            entry for entry in self.open_entries if entry.request.program == program and entry.num_running
        ]

    @rule(
        rows=st.integers(1, 40),
        steps=st.integers(0, 600),
        program=st.sampled_from([LEFT, RIGHT]),
        max_unread_rows=st.integers(1, 50),
        is_batch=st.booleans(),
        timeout=st.none() | st.floats(0, 100),
        buffered_bytes=st.integers(0, 100),
    )
    def submit(
        self,
        rows: int,
        steps: int,
        program: ProgramKey,
        max_unread_rows: int,
        is_batch: bool,
        timeout: float | None,
        buffered_bytes: int,
    ) -> None:
        deadline = None if timeout is None else self.now + timeout
        queued = request(
            rows,
            program,
            steps,
            max_unread_rows=max_unread_rows,
            is_batch=is_batch,
            deadline=deadline,
            buffered_bytes=buffered_bytes,
        )
        scheduler = self.scheduler
        try:
            self.entries.append(submit(scheduler, queued, self.now))
        except Overloaded:
            assert scheduler.num_queued + rows > 60 or scheduler.buffered_bytes + buffered_bytes > 100
        except DeadlineExceeded:
            assert deadline is not None

    @rule(seconds=st.floats(0.001, 10))
    def step(self, seconds: float) -> None:
        was_running = {program: bool(self.running(program)) for program in (LEFT, RIGHT)}
        step = self.scheduler.next_step()
        if step is None:
            return
        self.now += seconds
        self.scheduler.record_step_time(step.program, CAPACITY, seconds)
        for admission in step.admissions:
            entry = self.scheduler.entry(admission.request)
            assert entry is not None
            assert not entry.is_closed
            assert admission.count > 0
            assert admission.first + admission.count == entry.admitted <= entry.request.rows
        if not isinstance(self.batching, ContinuousBatching):
            assert not (step.admissions and was_running[step.program])
        if isinstance(self.batching, NoBatching):
            assert len(self.running(step.program)) <= 1

    @precondition(lambda self: any(entry.num_running for entry in self.open_entries))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from([entry for entry in self.open_entries if entry.num_running]))
        rows = data.draw(st.integers(1, entry.num_running))
        self.scheduler.finish(entry.request, rows)
        self.scheduler.acknowledge(entry.request, rows)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.scheduler.close(data.draw(st.sampled_from(self.entries)).request, "cancelled")

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.entries))
        self.released.add(entry)
        self.scheduler.release(entry.request)
        self.scheduler.close(entry.request, "cancelled")

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        expired = self.scheduler.expired(self.now)
        for entry in expired:
            deadline = entry.request.deadline
            assert deadline is not None
            assert not entry.is_closed
            assert deadline <= self.now or entry.num_queued
            assert entry not in self.expired
            self.scheduler.close(entry.request, "deadline")
        self.expired += expired
        deadlines = [entry.request.deadline for entry in self.open_entries]
        assert all(deadline is None or deadline > self.now for deadline in deadlines)

    @invariant()
    def counts_agree(self) -> None:
        scheduler, entries = self.scheduler, self.open_entries
        assert scheduler.num_queued == sum(entry.num_queued for entry in entries) <= 60
        assert scheduler.num_running == sum(entry.num_running for entry in entries)
        for program in (LEFT, RIGHT):
            assert sum(entry.num_running for entry in self.running(program)) <= CAPACITY
        assert all(entry.admitted - entry.acknowledged <= entry.request.max_unread_rows for entry in entries)
        buffered = [entry.request.buffered_bytes for entry in self.entries if entry not in self.released]
        assert scheduler.buffered_bytes == sum(buffered) <= 100
        assert set(scheduler.open_requests()) == {entry.request for entry in entries}

    def teardown(self) -> None:
        """Finish everything that is open."""
        while self.entries and (step := self.scheduler.next_step()):
            self.scheduler.record_step_time(step.program, CAPACITY, 1.0)
            for entry in self.running(step.program):
                rows = entry.num_running
                self.scheduler.finish(entry.request, rows)
                self.scheduler.acknowledge(entry.request, rows)
        assert not self.open_entries


TestSchedulerMachine = SchedulerMachine.TestCase
