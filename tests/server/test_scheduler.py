"""The policy, as tables and properties: pure Python, no tensors, no clock."""

import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.errors import Overloaded, ServerUnavailable
from server.request import Request
from server.scheduler import Limits, Scheduler, Turn
from server.spec import ProgramKey

LEFT = ProgramKey("left", "1", "toy", "sample")
RIGHT = ProgramKey("right", "1", "toy", "sample")
CAPACITY = 8


def scheduler(**limits: int) -> Scheduler:
    made = Scheduler(Limits(**{"quantum_rows": 2, **limits}))
    made.open_lane(LEFT, CAPACITY)
    made.open_lane(RIGHT, CAPACITY)
    return made


def request(rows: int, program: ProgramKey = LEFT, **settings: object) -> Request:
    return Request(program, rows, 1, lambda events: None, **settings)  # type: ignore[arg-type]


def next_turn(policy: Scheduler) -> Turn:
    turn = policy.next_turn()
    assert turn is not None
    return turn


def admitted(turn: Turn) -> dict[Request, int]:
    return {admission.request: admission.count for admission in turn.admissions}


def test_nothing_to_do_is_no_turn() -> None:
    assert scheduler().next_turn() is None


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
    policy = scheduler(max_waiting_rows=10)
    policy.submit(request(10))
    with pytest.raises(Overloaded) as refusal:
        policy.submit(request(1))
    assert refusal.value.retry_after > 0
    next_turn(policy)
    policy.submit(request(8))


def test_an_unknown_program_is_unavailable() -> None:
    with pytest.raises(ServerUnavailable):
        scheduler().submit(request(1, ProgramKey("other", "1", "toy", "sample")))


def test_a_closed_request_gives_back_what_it_held() -> None:
    policy = scheduler()
    asked = request(20)
    policy.submit(asked)
    next_turn(policy)
    assert policy.close(asked, "cancelled")
    assert not policy.close(asked, "cancelled")
    assert (policy.num_waiting, policy.num_active) == (0, 0)
    assert next_turn(policy).dropped == [asked]
    assert policy.next_turn() is None


def test_a_request_that_nobody_reads_waits_for_its_reader() -> None:
    policy = scheduler()
    asked = request(20, window=4)
    policy.submit(asked)
    assert admitted(next_turn(policy)) == {asked: 4}
    policy.finish(asked, 4)
    assert policy.next_turn() is None
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


@settings(max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12))
def test_no_request_waits_while_another_gets_more_than_its_share(sizes: list[int]) -> None:
    policy = scheduler()
    asked = [request(rows) for rows in sizes]
    for one in asked:
        policy.submit(one)
    shares = admitted(next_turn(policy))
    quantum = policy.limits.quantum_rows
    for one in asked:
        if one.num_waiting:
            assert max(shares.values()) - shares.get(one, 0) <= quantum


class Traffic(RuleBasedStateMachine):
    """Any order of submitting, stepping, finishing and cancelling keeps the books."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = scheduler(max_waiting_rows=60)
        self.requests: list[Request] = []

    @rule(rows=st.integers(1, 40), program=st.sampled_from([LEFT, RIGHT]), window=st.integers(1, 50))
    def submit(self, rows: int, program: ProgramKey, window: int) -> None:
        asked = request(rows, program, window=window)
        try:
            self.policy.submit(asked)
        except Overloaded:
            assert self.policy.num_waiting + rows > 60
        else:
            self.requests.append(asked)

    @rule()
    def step(self) -> None:
        turn = self.policy.next_turn()
        for admission in turn.admissions if turn else ():
            assert admission.count > 0
            assert admission.first + admission.count == admission.request.admitted <= admission.request.rows
            assert not admission.request.is_closed

    @precondition(lambda self: any(one.num_active and not one.is_closed for one in self.requests))
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        active = [one for one in self.requests if one.num_active and not one.is_closed]
        one = data.draw(st.sampled_from(active))
        rows = data.draw(st.integers(1, one.num_active))
        self.policy.finish(one, rows)
        self.policy.acknowledge(one, rows)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.policy.close(data.draw(st.sampled_from(self.requests)), "cancelled")

    @invariant()
    def counts_agree(self) -> None:
        open_requests = [one for one in self.requests if not one.is_closed]
        assert self.policy.num_waiting == sum(one.num_waiting for one in open_requests)
        assert self.policy.num_active == sum(one.num_active for one in open_requests)
        for program in (LEFT, RIGHT):
            mine = [one for one in open_requests if one.program == program]
            assert sum(one.num_active for one in mine) <= CAPACITY
            assert all(one.admitted - one.acknowledged <= one.window for one in mine)
        assert set(self.policy.open_requests()) == set(open_requests)

    def teardown(self) -> None:
        """Whatever happened, everything that is open can be finished."""
        while turn := self.policy.next_turn():
            for one in [one for one in self.requests if one.program == turn.program and not one.is_closed]:
                if one.num_active:
                    rows = one.num_active
                    self.policy.finish(one, rows)
                    self.policy.acknowledge(one, rows)
        assert all(one.is_closed for one in self.requests)


TestTraffic = Traffic.TestCase
