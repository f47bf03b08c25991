"""Noise buffer: numbers are those of the seed contract, prefetched or not."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.request import Request
from server.execution.noise import NoiseKeys
from server.execution.noise.buffer import NoiseBuffer, draw
from server.execution.program_runner import ProgramRunner
from tests.support import programs
from tests.support.programs import admit, new_runner, request

SLOTS = 8


class FailingExecutor(Executor):
    """An executor whose tasks all fail."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        future = Future[Any]()
        future.set_exception(MemoryError())
        return future


@pytest.fixture(scope="module")
def thread() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def rows(count: int, num_steps: int = 100) -> NoiseKeys:
    return NoiseKeys(
        np.arange(count, dtype=np.uint64), np.arange(count), np.zeros(count, int), np.full(count, num_steps)
    )


class Batch:
    """Rows that join, take steps and leave, over a noise buffer."""

    def __init__(self, buffer: NoiseBuffer) -> None:
        self.buffer = buffer
        self.rows = rows(0)

    def join(self, row: int, num_steps: int) -> None:
        new = NoiseKeys(np.array([row % 3], np.uint64), np.array([row]), np.array([0]), np.array([num_steps]))
        fields = dataclasses.fields(NoiseKeys)
        pairs = [(getattr(self.rows, field.name), getattr(new, field.name)) for field in fields]
        self.rows = NoiseKeys(*map(np.concatenate, pairs))

    def step(self) -> None:
        """Check the numbers of one step against the contract; finished rows leave."""
        self.buffer.ensure(self.rows)
        drawn = self.buffer.numbers("noise", len(self.rows))
        assert drawn.tobytes() == draw(programs.NOISE, self.rows).tobytes()
        self.buffer.advance()
        self.rows = self.rows.advanced_by(1)
        self._leave(self.rows.step >= self.rows.num_steps)

    def _leave(self, done: np.ndarray) -> None:
        boundary = len(done) - int(done.sum())
        holes, movers = np.flatnonzero(done[:boundary]), boundary + np.flatnonzero(~done[boundary:])
        order = np.arange(len(done))
        order[holes], order[movers] = movers, holes
        self.buffer.move(np.concatenate([holes, movers]), np.concatenate([movers, holes]))
        self.rows = self.rows[order[:boundary]]
        self.buffer.truncate(boundary)


# Number of rows that join at each step, and of steps that they take: some outlast several buffers.
arrivals = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60)), min_size=40, max_size=100)


@pytest.mark.parametrize("is_ahead", [False, True])
@settings(max_examples=10, deadline=None)
@given(arrivals)
def test_rows_that_join_and_leave_get_the_numbers_of_the_contract(
    thread: Executor, is_ahead: bool, arrivals: list[tuple[int, int]]
) -> None:
    batch = Batch(NoiseBuffer((programs.NOISE,), SLOTS, thread if is_ahead else None))
    for number, (count, num_steps) in enumerate(arrivals):
        for place in range(min(count, SLOTS - len(batch.rows))):
            batch.join(10 * number + place, num_steps)
        if len(batch.rows):
            batch.step()


def test_failed_prefetch_fails_one_step_only() -> None:
    buffer, present = NoiseBuffer((programs.NOISE,), SLOTS, FailingExecutor()), rows(3)
    buffer.ensure(present)
    for _ in range(buffer.length):
        buffer.advance()
    present = present.advanced_by(buffer.length)
    with pytest.raises(MemoryError):
        buffer.ensure(present)
    buffer.ensure(present)
    assert buffer.numbers("noise", 3).tobytes() == draw(programs.NOISE, present).tobytes()


# Few seeds and indices, so that rows meet that differ only in their number of steps.
TWINS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 60), st.integers(0, 20))


def _advance(runner: ProgramRunner, found: dict[Request, bytes]) -> None:
    for readout in runner.advance().wait():
        found[readout.request] = readout.rows.outputs["value"].tobytes()


def _values(runner: ProgramRunner, queued: list[tuple[int, Request]]) -> dict[Request, bytes]:
    """Return each row's bytes when it joins at its step, or as soon as a slot is free."""
    found: dict[Request, bytes] = {}
    waiting, step = sorted(queued, key=lambda item: item[0]), 0
    while waiting or runner.num_active:
        while waiting and waiting[0][0] <= step and runner.num_active < SLOTS:
            admit(runner, waiting.pop(0)[1])
        _advance(runner, found)
        step += 1
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(TWINS, min_size=1, max_size=24))
def test_rows_with_equal_keys_have_the_bytes_that_they_have_alone(
    thread: Executor, twins: list[tuple[int, ...]]
) -> None:
    queued = [
        (joins, request(seed=seed, first_row=index, steps=steps)) for seed, index, steps, joins in twins
    ]
    together = _values(new_runner(buckets=(SLOTS,), prefetch_executor=thread), queued)
    for _, one in queued:
        alone = _values(new_runner(buckets=(SLOTS,)), [(0, one)])
        assert together[one] == alone[one]


def test_shorter_row_leaves_no_numbers_for_a_longer_one(thread: Executor) -> None:
    twins = [(0, request(seed=7, steps=steps)) for steps in (20, 50)]
    together = _values(new_runner(buckets=(SLOTS,), prefetch_executor=thread), twins)
    alone = _values(new_runner(buckets=(SLOTS,)), twins[1:])
    assert together[twins[1][1]] == alone[twins[1][1]]
