"""The policy, as tables and properties: pure Python, no tensors, no clock."""

import contextlib
import weakref
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable, Violation
from server.core.request import Request, RowInputs
from server.core.spec import ProgramKey
from server.engine.program_queue import BATCH_SHARE, MIN_DEVICE_SHARE, RESERVED_SHARE
from server.engine.scheduler import Batching, Limits, ScheduledStep, Scheduler

LEFT = ProgramKey("left", "1", "toy", "sample")
RIGHT = ProgramKey("right", "1", "toy", "sample")
CAPACITY = 8

untimed = settings(max_examples=50, deadline=None)


def scheduler(capacity: int = CAPACITY, **limits: object) -> Scheduler:
    made = Scheduler(Limits(**{"drr_quantum_rows": 2, **limits}))  # type: ignore[arg-type]
    made.add_program(LEFT, capacity)
    made.add_program(RIGHT, capacity)
    return made


def request(rows: int, program: ProgramKey = LEFT, steps: int = 1, **settings: object) -> Request:
    return Request(program, rows, steps, lambda events: None, **settings)  # type: ignore[arg-type]


def next_turn(policy: Scheduler, seconds: float = 1.0) -> ScheduledStep:
    """The next turn, which is taken and takes so long."""
    turn = policy.next_step()
    assert turn is not None
    policy.record_step_time(turn.program, CAPACITY, seconds)
    return turn


def measure(policy: Scheduler, seconds: float, program: ProgramKey = LEFT) -> None:
    """Turns took so long: a first one, which counts for nothing, and another."""
    for _ in range(2):
        policy.record_step_time(program, CAPACITY, seconds)


def admitted(turn: ScheduledStep) -> dict[Request, int]:
    return {admission.request: admission.count for admission in turn.admissions}


def test_nothing_to_do_is_no_turn() -> None:
    assert scheduler().next_step() is None


def test_slots_are_shared_among_requests_in_turn() -> None:
    policy = scheduler()
    big, small = request(1000), request(3)
    policy.submit(big)
    policy.submit(small)
    assert admitted(next_turn(policy)) == {big: 5, small: 3}


def test_a_later_small_request_gets_the_next_free_slots() -> None:
    policy = scheduler()
    big, small = request(1000), request(2)
    policy.submit(big)
    next_turn(policy)
    policy.submit(small)
    policy.finish(big, 4)
    assert admitted(next_turn(policy)) == {big: 2, small: 2}


def test_programs_take_turns() -> None:
    policy = scheduler()
    policy.submit(request(100, LEFT))
    policy.submit(request(1, RIGHT))
    assert [next_turn(policy).program for _ in range(4)] == [LEFT, RIGHT, LEFT, RIGHT]


def test_rows_of_one_admission_follow_each_other() -> None:
    policy = scheduler()
    asked = request(20)
    policy.submit(asked)
    first = next_turn(policy).admissions
    policy.finish(asked, CAPACITY)
    second = next_turn(policy).admissions
    assert [(a.first, a.count) for a in (*first, *second)] == [(0, 8), (8, 8)]


def test_more_waiting_rows_than_the_limit_are_refused() -> None:
    policy = scheduler(max_queued_rows=10)
    policy.submit(request(10))
    with pytest.raises(Overloaded) as refusal:
        policy.submit(request(1))
    assert refusal.value.retry_delay > 0
    next_turn(policy)
    policy.submit(request(8))


def test_an_unknown_program_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        scheduler().submit(request(1, ProgramKey("other", "1", "toy", "sample")))


def test_a_closed_request_gives_back_what_it_held() -> None:
    policy = scheduler()
    asked = request(20)
    policy.submit(asked)
    next_turn(policy)
    assert policy.close(asked, "cancelled")
    assert not policy.close(asked, "cancelled")
    assert (policy.num_queued, policy.num_running) == (0, 0)
    assert next_turn(policy).dropped == [asked]
    assert policy.next_step() is None


def test_a_request_that_nobody_reads_waits_for_its_reader() -> None:
    policy = scheduler()
    asked = request(20, max_unread_rows=4)
    policy.submit(asked)
    assert admitted(next_turn(policy)) == {asked: 4}
    policy.finish(asked, 4)
    assert policy.next_step() is None
    policy.acknowledge(asked, 3)
    assert admitted(next_turn(policy)) == {asked: 3}


def test_deadlines_expire_in_order_and_once() -> None:
    policy = scheduler()
    late, early, never = request(1, deadline=9.0), request(1, deadline=5.0), request(1)
    for asked in (late, early, never):
        policy.submit(asked)
    assert policy.next_deadline() == 5.0
    assert policy.expired(4.9) == []
    assert policy.expired(5.0) == [early]
    assert policy.expired(100.0) == [late]
    assert policy.next_deadline() is None


def test_ended_requests_do_not_expire() -> None:
    policy = scheduler()
    asked = request(1, deadline=5.0)
    policy.submit(asked)
    next_turn(policy)
    policy.finish(asked, 1)
    assert policy.expired(6.0) == []


def test_ended_requests_are_forgotten_while_an_early_deadline_is_open() -> None:
    policy = scheduler()
    policy.submit(request(1, RIGHT, deadline=1.0))
    ended = []
    for number in range(1000):
        asked = request(1, deadline=2.0 + number)
        policy.submit(asked)
        while asked.admitted == 0:
            next_turn(policy)
        policy.finish(asked, 1)
        ended.append(weakref.ref(asked))
    del asked
    assert sum(reference() is not None for reference in ended) < 200


@untimed
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_no_request_waits_while_another_gets_more_than_its_share(sizes: list[int]) -> None:
    policy = scheduler()
    asked = [request(rows) for rows in sizes]
    for one in asked:
        policy.submit(one)
    shares = admitted(next_turn(policy))
    quantum = policy.limits.drr_quantum_rows
    for one in asked:
        if one.num_waiting:
            assert max(shares.values()) - shares.get(one, 0) <= quantum


def served(policy: Scheduler, requests: list[Request], turns: int) -> dict[Request, int]:
    """Row-steps that every request gets when each turn finishes rows whose steps are over."""
    ages: list[tuple[Request, int]] = []
    got = dict.fromkeys(requests, 0)
    for _ in range(turns):
        turn = next_turn(policy)
        ages += [(one, 0) for one, count in admitted(turn).items() for _ in range(count)]
        for one, _ in ages:
            got[one] += 1
        ages = [(one, age + 1) for one, age in ages]
        for one, age in ages:
            if age == one.steps:
                policy.finish(one, 1)
        ages = [(one, age) for one, age in ages if age < one.steps]
    return got


def test_requests_share_the_slots_time_whatever_the_length_of_their_rows() -> None:
    policy = scheduler()
    long, short = request(10_000, steps=40), request(10_000, steps=5)
    policy.submit(long)
    policy.submit(short)
    got = served(policy, [long, short], turns=4000)
    assert 0.8 < got[long] / got[short] < 1.25


@untimed
@given(st.lists(st.integers(1, 60), min_size=2, max_size=4))
def test_no_request_gets_ahead_of_another_by_more_than_two_visits(lengths: list[int]) -> None:
    policy = scheduler(capacity=16)
    asked = [request(10_000, steps=steps) for steps in lengths]
    for one in asked:
        policy.submit(one)
    served(policy, asked, turns=300)
    earned = [one.admitted * one.steps for one in asked]
    assert max(earned) - min(earned) <= 2 * policy.limits.drr_quantum_rows * max(lengths)


def spent(
    policy: Scheduler, seconds: Mapping[ProgramKey, float], turns: int = 1000
) -> dict[ProgramKey, float]:
    """The device time that each program had."""
    had = dict.fromkeys(seconds, 0.0)
    for _ in range(turns):
        turn = policy.next_step()
        assert turn is not None
        policy.record_step_time(turn.program, CAPACITY, seconds[turn.program])
        had[turn.program] += seconds[turn.program]
    return had


def test_programs_share_the_device_by_time_not_by_turns() -> None:
    policy = scheduler()
    policy.submit(request(8, LEFT))
    policy.submit(request(8, RIGHT))
    had = spent(policy, {LEFT: 0.010, RIGHT: 0.001})
    assert 0.8 < had[LEFT] / had[RIGHT] < 1.25


def test_a_program_has_device_time_for_each_request_that_it_serves() -> None:
    policy = scheduler()
    seconds = {LEFT: 0.001, RIGHT: 0.010}
    policy.submit(request(5, LEFT))
    finished, cancelled, last = (request(1, RIGHT) for _ in range(3))
    for one in (finished, cancelled, last):
        policy.submit(one)
    had = spent(policy, seconds)
    assert 2.4 < had[RIGHT] / had[LEFT] < 3.6
    policy.finish(finished, 1)
    policy.close(cancelled, "cancelled")
    had = spent(policy, seconds)
    assert 0.8 < had[RIGHT] / had[LEFT] < 1.25


def test_batch_jobs_of_a_program_together_have_less_device_time_than_a_person() -> None:
    policy = scheduler()
    policy.submit(request(1, LEFT))
    for _ in range(3):
        policy.submit(request(1, RIGHT, is_batch=True))
    had = spent(policy, {LEFT: 0.002, RIGHT: 0.002})
    assert had[RIGHT] / had[LEFT] == pytest.approx(BATCH_SHARE, rel=0.1)


@settings(untimed, max_examples=25)
@given(
    people=st.integers(1, 64),
    quick=st.floats(0.005, 0.05),
    slow=st.floats(0.005, 0.05),
    is_batch=st.booleans(),
)
def test_a_quiet_program_keeps_its_part_however_many_another_serves(
    people: int, quick: float, slow: float, is_batch: bool
) -> None:
    policy = scheduler(capacity=64)
    for _ in range(people):
        policy.submit(request(1, LEFT))
    policy.submit(request(1, RIGHT, is_batch=is_batch))
    due = max(1 / people, MIN_DEVICE_SHARE) * (BATCH_SHARE if is_batch else 1)
    had = spent(policy, {LEFT: quick, RIGHT: slow}, turns=1500)
    assert had[RIGHT] + 2 * slow >= due * (had[LEFT] - 2 * quick)


@untimed
@given(
    st.lists(st.floats(0.001, 0.1), min_size=3, max_size=3),
    st.integers(20, 60),
    st.floats(0.001, 1e4),
)
def test_one_slow_turn_makes_nobody_wait_for_more_than_a_few_others(
    seconds: list[float], when: int, slow: float
) -> None:
    policy = scheduler()
    third = ProgramKey("third", "1", "toy", "sample")
    policy.add_program(third, CAPACITY)
    paces = dict(zip((LEFT, RIGHT, third), seconds, strict=True))
    for program in paces:
        policy.submit(request(1, program))
    now, last = 0.0, dict.fromkeys(paces, 0.0)
    for number in range(300):
        program = next_turn_of(policy, paces, slow if number == when else 0.0)
        assert now - last[program] <= 12 * max(seconds)
        now += paces[program]
        last[program] = now


def next_turn_of(policy: Scheduler, seconds: Mapping[ProgramKey, float], more: float) -> ProgramKey:
    """Whose turn it is, which takes its time and some more."""
    turn = policy.next_step()
    assert turn is not None
    policy.record_step_time(turn.program, CAPACITY, seconds[turn.program] + more)
    return turn.program


def test_a_newcomer_waits_for_one_step_of_another_program_however_many_that_serves() -> None:
    policy = scheduler()
    for _ in range(CAPACITY):
        policy.submit(request(1, LEFT, steps=1000))
    for _ in range(10):
        assert next_turn(policy, 0.01).program == LEFT
    under_way = policy.next_step()
    policy.submit(request(1, RIGHT))
    assert under_way is not None
    policy.record_step_time(under_way.program, CAPACITY, 0.01)
    assert next_turn(policy, 0.001).program == RIGHT


def test_batch_rows_leave_slots_to_others() -> None:
    policy = scheduler()
    job, person = request(1000, is_batch=True), request(1)
    policy.submit(job)
    assert admitted(next_turn(policy)) == {job: CAPACITY - 1}
    policy.submit(person)
    assert admitted(next_turn(policy)) == {person: 1}


def test_a_person_gets_a_slot_at_once_however_long_the_rows_of_batch_jobs() -> None:
    policy = scheduler(capacity=64)
    job, person = request(1000, steps=1000, is_batch=True), request(1, steps=1000)
    policy.submit(job)
    next_turn(policy)
    policy.submit(person)
    assert admitted(next_turn(policy)) == {person: 1}


@untimed
@given(
    capacity=st.integers(2, 200),
    chains=st.lists(st.tuples(st.integers(1, 300), st.integers(8, 5000), st.booleans()), min_size=1),
)
def test_a_row_enters_at_once_among_rows_eight_times_as_long(
    capacity: int, chains: list[tuple[int, int, bool]]
) -> None:
    policy = scheduler(capacity=capacity)
    for rows, steps, is_batch in chains:
        policy.submit(request(rows, steps=steps, is_batch=is_batch))
    next_turn(policy)
    # Few slots cannot be kept for every level: then the shortest rows have what there is.
    short = request(1, steps=min(steps for _, steps, _ in chains) // 8 if capacity >= RESERVED_SHARE else 1)
    policy.submit(short)
    assert short in admitted(next_turn(policy))


@untimed
@given(capacity=st.integers(1, 200), steps=st.integers(1, 500), is_batch=st.booleans())
def test_what_rows_leave_to_shorter_ones_is_little(capacity: int, steps: int, is_batch: bool) -> None:
    policy = scheduler(capacity=capacity)
    asked = request(1000, steps=steps, is_batch=is_batch)
    policy.submit(asked)
    taken = admitted(next_turn(policy))[asked]
    assert taken >= max(1, min(capacity - 1, 0.75 * capacity - 1))
    assert taken == capacity or steps >= 8 or is_batch


@untimed
@given(capacity=st.integers(1, 200), steps=st.integers(1, 500))
def test_rows_of_a_program_that_has_no_shorter_ones_take_every_slot(capacity: int, steps: int) -> None:
    policy = Scheduler()
    policy.add_program(LEFT, capacity, least_steps=steps)
    asked = request(1000, steps=steps)
    policy.submit(asked)
    assert admitted(next_turn(policy)) == {asked: capacity}


@pytest.mark.parametrize("batching", ["request", "none"])
def test_where_no_row_joins_a_batch_on_its_way_none_leaves_slots(batching: Batching) -> None:
    policy = scheduler(batching=batching)
    asked = request(100, steps=500, is_batch=True)
    policy.submit(asked)
    assert admitted(next_turn(policy)) == {asked: CAPACITY}


def test_batch_jobs_are_not_starved() -> None:
    policy = scheduler()
    people, job = request(10_000), request(10_000, is_batch=True)
    policy.submit(people)
    policy.submit(job)
    for _ in range(200):
        next_turn(policy)
        for one in (people, job):
            if one.num_active:
                policy.finish(one, one.num_active)
    assert 0.05 < job.finished / people.finished < 0.3


@settings(untimed, max_examples=20)
@given(people_steps=st.integers(1, 40), job_steps=st.integers(1, 40))
def test_priorities_share_the_slots_time_whatever_the_length_of_their_rows(
    people_steps: int, job_steps: int
) -> None:
    policy = scheduler()
    people, job = request(10_000, steps=people_steps), request(10_000, steps=job_steps, is_batch=True)
    policy.submit(people)
    policy.submit(job)
    got = served(policy, [people, job], turns=1500)
    assert 0.05 < got[job] / got[people] < 0.3


def test_what_cannot_be_done_in_time_is_refused_at_once() -> None:
    policy = scheduler()
    policy.submit(request(1, steps=5, deadline=0.001), now=0.0)
    measure(policy, 0.5)
    with pytest.raises(
        DeadlineExceeded, match=r"take 5 s at the fastest pace measured, 0\.5 s a step, and 4 s are"
    ):
        policy.submit(request(1, steps=10, deadline=14.0), now=10.0)
    policy.submit(request(1, steps=10, deadline=15.5), now=10.0)
    policy.submit(request(1, steps=10, deadline=11.0, has_early_exit=True), now=10.0)


turns_taken = st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.floats(0.001, 1e6)), max_size=20)


@untimed
@given(turns_taken, st.integers(1, 1000))
def test_whatever_its_turns_took_an_idle_program_refuses_at_most_one_request(
    history: list[tuple[int, float]], steps: int
) -> None:
    policy = scheduler()
    for bucket, seconds in history:
        policy.record_step_time(LEFT, bucket, seconds)
    with contextlib.suppress(DeadlineExceeded):
        policy.submit(request(1, steps=steps, deadline=60.0), now=0.0)
    second = request(1, steps=steps, deadline=60.0)
    policy.submit(second, now=0.0)
    assert policy.expired(0.0) == []
    assert second in admitted(next_turn(policy))


def turns_needed(rows: int, steps: int) -> int:
    """How many turns a request takes when it is alone."""
    policy, asked = scheduler(), request(rows, steps=steps)
    policy.submit(asked)
    count = 0
    while not asked.is_complete:
        served(policy, [asked], turns=steps)
        count += steps
    return count


@untimed
@given(turns_taken, st.integers(1, 40), st.integers(1, 20), st.floats(0, 100))
def test_no_request_is_refused_that_the_fastest_turns_could_finish_in_time(
    history: list[tuple[int, float]], rows: int, steps: int, seconds_left: float
) -> None:
    policy = scheduler()
    for bucket, seconds in history:
        policy.record_step_time(LEFT, bucket, seconds)
    try:
        policy.submit(request(rows, steps=steps, deadline=seconds_left), now=0.0)
    except DeadlineExceeded:
        fastest = min(seconds for _, seconds in history)
        assert turns_needed(rows, steps) * fastest > seconds_left


def test_waiting_rows_that_cannot_be_done_in_time_any_more_are_late_before_their_deadline() -> None:
    policy = scheduler()
    policy.submit(request(CAPACITY, steps=100), now=0.0)
    measure(policy, 0.5)
    waiting = request(1, steps=10, deadline=20.0)
    policy.submit(waiting, now=1.0)
    assert policy.next_deadline() == 15.0
    assert policy.expired(14.9) == []
    assert policy.expired(15.0) == [waiting]


def test_a_slow_first_turn_makes_nobody_late() -> None:
    policy = scheduler()
    policy.submit(request(CAPACITY, steps=100), now=0.0)
    waiting = request(1, steps=20, deadline=60.0)
    policy.submit(waiting, now=0.0)
    next_turn(policy, seconds=10.0)
    assert policy.expired(59.9) == []


def test_rows_that_have_entered_are_late_only_at_their_deadline() -> None:
    policy = scheduler()
    measure(policy, 0.5)
    running = request(1, steps=10, deadline=20.0)
    policy.submit(running, now=1.0)
    next_turn(policy, seconds=0.5)
    assert policy.expired(19.9) == []
    assert policy.next_deadline() == 20.0
    assert policy.expired(20.0) == [running]


def test_a_pace_that_was_learnt_later_moves_the_last_moment() -> None:
    policy = scheduler()
    policy.submit(request(CAPACITY, steps=100), now=0.0)
    measure(policy, 1.0)
    waiting = request(1, steps=10, deadline=20.0)
    policy.submit(waiting, now=1.0)
    measure(policy, 0.1)
    assert policy.expired(10.0) == []
    assert policy.next_deadline() == 19.0
    assert policy.expired(19.0) == [waiting]


def test_requests_that_hold_too_many_bytes_are_refused() -> None:
    policy = scheduler(max_buffered_bytes=100)
    first = request(1, buffered_bytes=80)
    policy.submit(first)
    with pytest.raises(Overloaded, match="80 bytes"):
        policy.submit(request(1, buffered_bytes=21))
    policy.close(first, "cancelled")
    with pytest.raises(Overloaded, match="80 bytes"):
        policy.submit(request(1, buffered_bytes=21))
    policy.release(first)
    policy.release(first)
    policy.submit(request(1, buffered_bytes=100))


@pytest.mark.parametrize(("inputs", "field"), [({}, "rows"), ({"value": object()}, "inputs")])
def test_a_request_that_would_never_fit_is_invalid(inputs: Mapping[str, object], field: str) -> None:
    policy = scheduler(max_buffered_bytes=100)
    with pytest.raises(InvalidRequest) as refusal:
        policy.submit(request(1, buffered_bytes=101, inputs=RowInputs(inputs=inputs)))
    expected = "expected at most 100 bytes of inputs and unread answers, got 101"
    assert refusal.value.violations == (Violation(field, expected),)


def delay(rows: int, steps: int) -> float:
    """When to come back after so many rows wait."""
    policy = scheduler(max_queued_rows=rows)
    measure(policy, 0.01)
    policy.submit(request(rows, steps=steps))
    with pytest.raises(Overloaded) as refusal:
        policy.submit(request(1))
    return refusal.value.retry_delay


def test_the_time_to_come_back_is_that_in_which_half_of_what_waits_is_done() -> None:
    assert delay(1, 1) == Limits().min_retry_seconds
    assert delay(1600, 10) == pytest.approx(10.0)
    assert delay(1_000_000, 10) == Limits().max_retry_seconds


@untimed
@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 100))
def test_the_time_to_come_back_never_shrinks_when_more_waits(rows: int, more: int, steps: int) -> None:
    assert delay(rows, steps) <= delay(rows + more, steps)
    assert delay(rows, steps) <= delay(rows, steps + 1)


@pytest.mark.parametrize(("batching", "joins"), [("step", True), ("request", False), ("none", False)])
def test_only_step_batching_lets_rows_join_a_batch_on_its_way(batching: Batching, joins: bool) -> None:
    policy = Scheduler(Limits(batching=batching))
    policy.add_program(LEFT, CAPACITY)
    first, second, late = request(2, steps=5), request(2, steps=5), request(2, steps=5)
    policy.submit(first)
    policy.submit(second)
    assert set(admitted(next_turn(policy))) == ({first} if batching == "none" else {first, second})
    policy.submit(late)
    assert (late in admitted(next_turn(policy))) is joins


class Traffic(RuleBasedStateMachine):
    """Any order of submitting, stepping, finishing, cancelling and waiting keeps the books."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Request] = []
        self.late: list[Request] = []
        self.now = 0.0

    @initialize(batching=st.sampled_from(["step", "request", "none"]))
    def start(self, batching: Batching) -> None:
        self.policy = scheduler(max_queued_rows=60, max_buffered_bytes=100, batching=batching)

    @property
    def open_requests(self) -> list[Request]:
        return [one for one in self.requests if not one.is_closed]

    def active(self, program: ProgramKey) -> list[Request]:
        return [one for one in self.open_requests if one.program == program and one.num_active]

    @rule(
        rows=st.integers(1, 40),
        steps=st.integers(0, 600),
        program=st.sampled_from([LEFT, RIGHT]),
        max_unread_rows=st.integers(1, 50),
        is_batch=st.booleans(),
        patience=st.none() | st.floats(0, 100),
        buffered_bytes=st.integers(0, 100),
    )
    def submit(
        self,
        rows: int,
        steps: int,
        program: ProgramKey,
        max_unread_rows: int,
        is_batch: bool,
        patience: float | None,
        buffered_bytes: int,
    ) -> None:
        deadline = None if patience is None else self.now + patience
        asked = request(
            rows,
            program,
            steps,
            max_unread_rows=max_unread_rows,
            is_batch=is_batch,
            deadline=deadline,
            buffered_bytes=buffered_bytes,
        )
        try:
            self.policy.submit(asked, self.now)
        except Overloaded:
            assert self.policy.num_queued + rows > 60 or self.policy.buffered_bytes + buffered_bytes > 100
        except DeadlineExceeded:
            assert deadline is not None
        else:
            self.requests.append(asked)

    @rule(seconds=st.floats(0.001, 10))
    def step(self, seconds: float) -> None:
        turn = self.policy.next_step()
        if turn is None:
            return
        self.now += seconds
        self.policy.record_step_time(turn.program, CAPACITY, seconds)
        for admission in turn.admissions:
            assert admission.count > 0
            assert admission.first + admission.count == admission.request.admitted <= admission.request.rows
            assert not admission.request.is_closed
        self.check_batch(turn)

    def check_batch(self, turn: ScheduledStep) -> None:
        """Without step batching, rows enter together, and `width` says how many."""
        batching, active = self.policy.limits.batching, self.active(turn.program)
        if batching != "step" and turn.admissions:
            assert turn.width == sum(one.num_active for one in active)
            assert active == [one for one in active if one in admitted(turn)]
        if batching == "none":
            assert len(active) <= 1

    @precondition(lambda self: any(one.num_active for one in self.open_requests))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from([one for one in self.open_requests if one.num_active]))
        rows = data.draw(st.integers(1, one.num_active))
        self.policy.finish(one, rows)
        self.policy.acknowledge(one, rows)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.policy.close(data.draw(st.sampled_from(self.requests)), "cancelled")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.requests))
        self.policy.release(one)
        self.policy.close(one, "cancelled")

    @rule(seconds=st.floats(0, 50))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        late = self.policy.expired(self.now)
        for one in late:
            assert one.deadline is not None
            assert not one.is_closed
            assert one.deadline <= self.now or one.num_waiting
            assert one not in self.late
            self.policy.close(one, "deadline")
        self.late += late
        assert all(one.deadline is None or one.deadline > self.now for one in self.open_requests)

    @invariant()
    def counts_agree(self) -> None:
        mine = self.open_requests
        assert self.policy.num_queued == sum(one.num_waiting for one in mine) <= 60
        assert self.policy.num_running == sum(one.num_active for one in mine)
        for program in (LEFT, RIGHT):
            assert sum(one.num_active for one in self.active(program)) <= CAPACITY
        assert all(one.admitted - one.acknowledged <= one.max_unread_rows for one in mine)
        assert (
            self.policy.buffered_bytes
            == sum(one.buffered_bytes for one in self.requests if one.is_buffered)
            <= 100
        )
        assert set(self.policy.open_requests()) == set(mine)

    def teardown(self) -> None:
        """Whatever happened, everything that is open can be finished."""
        while self.requests and (turn := self.policy.next_step()):
            self.policy.record_step_time(turn.program, CAPACITY, 1.0)
            for one in self.active(turn.program):
                rows = one.num_active
                self.policy.finish(one, rows)
                self.policy.acknowledge(one, rows)
        assert not self.open_requests


TestTraffic = Traffic.TestCase
