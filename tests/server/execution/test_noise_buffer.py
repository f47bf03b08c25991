"""The tape of random numbers: drawn ahead or not, they are those of the seed contract."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.request import Request
from server.execution.noise_buffer import NoiseBuffer, Rows, draw
from server.execution.program_runner import ProgramRunner
from tests.support import programs
from tests.support.programs import request

SLOTS = 8


class Failing(Executor):
    """A thread that never gets anything done."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = Future[Any]()
        future.set_exception(MemoryError())
        return future


@pytest.fixture(scope="module")
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def rows(count: int, num_steps: int = 100) -> Rows:
    return Rows(
        np.arange(count, dtype=np.uint64), np.arange(count), np.zeros(count, int), np.full(count, num_steps)
    )


class Batch:
    """Rows that come, take steps and leave, over a tape."""

    def __init__(self, tape: NoiseBuffer) -> None:
        self.tape = tape
        self.rows = rows(0)

    def join(self, row: int, num_steps: int) -> None:
        new = Rows(np.array([row % 3], np.uint64), np.array([row]), np.array([0]), np.array([num_steps]))
        fields = dataclasses.fields(Rows)
        pairs = [(getattr(self.rows, field.name), getattr(new, field.name)) for field in fields]
        self.rows = Rows(*map(np.concatenate, pairs))

    def step(self) -> None:
        """Compare one step's numbers with the contract's; rows that are done leave, swapped to the tail."""
        self.tape.ensure(self.rows)
        drawn = self.tape.numbers("noise", len(self.rows))
        assert drawn.tobytes() == draw(programs.NOISE, self.rows).tobytes()
        self.tape.advance()
        self.rows = self.rows.later(1)
        self._leave(self.rows.step >= self.rows.num_steps)

    def _leave(self, done: np.ndarray) -> None:
        boundary = len(done) - int(done.sum())
        holes, movers = np.flatnonzero(done[:boundary]), boundary + np.flatnonzero(~done[boundary:])
        order = np.arange(len(done))
        order[holes], order[movers] = movers, holes
        self.tape.move(np.concatenate([holes, movers]), np.concatenate([movers, holes]))
        self.rows = self.rows[order[:boundary]]
        self.tape.truncate(boundary)


# How many rows join at each step, and for how many steps: some stay for several stretches of the tape.
arrivals = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), min_size=40, max_size=100)


@pytest.mark.parametrize("is_ahead", [False, True])
@settings(max_examples=10, deadline=None)
@given(arrivals)
def test_rows_that_come_and_leave_have_the_numbers_of_the_contract(
    thread: Executor, is_ahead: bool, arrivals: list[tuple[int, int]]
) -> None:
    batch = Batch(NoiseBuffer((programs.NOISE,), SLOTS, thread if is_ahead else None))
    for number, (count, num_steps) in enumerate(arrivals):
        for place in range(min(count, SLOTS - len(batch.rows))):
            batch.join(10 * number + place, num_steps)
        if len(batch.rows):
            batch.step()


def test_numbers_that_could_not_be_drawn_ahead_fail_one_step_and_no_other() -> None:
    tape, present = NoiseBuffer((programs.NOISE,), SLOTS, Failing()), rows(3)
    tape.ensure(present)
    for _ in range(tape.length):
        tape.advance()
    present = present.later(tape.length)
    with pytest.raises(MemoryError):
        tape.ensure(present)
    tape.ensure(present)
    assert tape.numbers("noise", 3).tobytes() == draw(programs.NOISE, present).tobytes()


# Few seeds and indices, so that twins meet: rows that differ in nothing but their number of steps.
TWINS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 60), st.integers(0, 20))


def _advance(program: ProgramRunner, found: dict[Request, bytes]) -> None:
    for readout in program.advance():
        found[readout.request] = readout.rows.outputs["value"].tobytes()


def _values(program: ProgramRunner, asked: list[tuple[int, Request]]) -> dict[Request, bytes]:
    """Every row's bytes when each joins at its turn, or as soon as there is a slot."""
    found: dict[Request, bytes] = {}
    waiting, turn = sorted(asked, key=lambda each: each[0]), 0
    while waiting or program.slots.num_active:
        while waiting and waiting[0][0] <= turn and program.slots.num_active < SLOTS:
            program.slots.admit(waiting.pop(0)[1], 0, 1)
        _advance(program, found)
        turn += 1
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(TWINS, min_size=1, max_size=24))
def test_rows_have_the_bytes_that_they_have_alone(thread: Executor, twins: list[tuple[int, ...]]) -> None:
    asked = [(joins, request(seed=seed, first_row=index, steps=steps)) for seed, index, steps, joins in twins]
    together = _values(programs.program(buckets=(SLOTS,), ahead=thread), asked)
    for _, one in asked:
        alone = _values(programs.program(buckets=(SLOTS,)), [(0, one)])
        assert together[one] == alone[one]


def test_a_twin_of_fewer_steps_leaves_none_of_its_numbers_behind(thread: Executor) -> None:
    twins = [(0, request(seed=7, steps=steps)) for steps in (20, 50)]
    together = _values(programs.program(buckets=(SLOTS,), ahead=thread), twins)
    alone = _values(programs.program(buckets=(SLOTS,)), twins[1:])
    assert together[twins[1][1]] == alone[twins[1][1]]
