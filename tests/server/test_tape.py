"""Numbers that are drawn ahead: the same as those drawn when they are due, whoever had the slot before."""

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.program import Program
from server.request import Request
from tests import toys
from tests.toys import request

CAPACITY = 8

# Few seeds and indices, so that twins meet: rows that differ in nothing but their number of steps.
ROWS = st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(1, 60), st.integers(0, 20))


@pytest.fixture(scope="module")
def ahead() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as executor:
        yield executor


def _advance(program: Program, found: dict[Request, bytes]) -> None:
    for readout in program.advance():
        found[readout.request] = readout.rows.outputs["value"].tobytes()


def _values(program: Program, asked: list[tuple[int, Request]]) -> dict[Request, bytes]:
    """Every row's bytes when each joins at its turn, or as soon as there is a slot."""
    found: dict[Request, bytes] = {}
    waiting, turn = sorted(asked, key=lambda each: each[0]), 0
    while waiting or program.slots.num_active:
        while waiting and waiting[0][0] <= turn and program.slots.num_active < CAPACITY:
            program.slots.admit(waiting.pop(0)[1], 0, 1)
        _advance(program, found)
        turn += 1
    return found


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=1, max_size=24))
def test_rows_have_the_bytes_that_they_have_alone(ahead: Executor, rows: list[tuple[int, ...]]) -> None:
    asked = [(joins, request(seed=seed, first_row=index, steps=steps)) for seed, index, steps, joins in rows]
    together = _values(toys.program(buckets=(CAPACITY,), ahead=ahead), asked)
    for _, one in asked:
        alone = _values(toys.program(buckets=(CAPACITY,)), [(0, one)])
        assert together[one] == alone[one]


def test_a_twin_of_fewer_steps_leaves_none_of_its_numbers_behind(ahead: Executor) -> None:
    twins = [(0, request(seed=7, steps=steps)) for steps in (20, 50)]
    together = _values(toys.program(buckets=(CAPACITY,), ahead=ahead), twins)
    alone = _values(toys.program(buckets=(CAPACITY,)), twins[1:])
    assert together[twins[1][1]] == alone[twins[1][1]]
