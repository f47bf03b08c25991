"""The loop: every row is delivered once, with the bytes that it would have alone."""

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.errors import DeadlineExceeded, ModelFailed, Overloaded, Unavailable
from server.core.request import Completed, Event, Request, RowInputs, Rows
from server.engine.engine import MAX_NONFINITE_ROWS, MAX_RESTARTS, Engine
from server.engine.scheduler import Limits, Scheduler
from server.runtime import Graph
from tests.support import programs
from tests.support.programs import KEY, Reader, RecordingObserver, request


class Gate:
    """A graph that waits for permission: each `step` lets one call of the wrapped graph through."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._allowed = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        self._entered.release()
        assert self._allowed.acquire(timeout=30), "nobody opened the gate"
        return self._graph(inputs)

    def await_call(self) -> None:
        assert self._entered.acquire(timeout=30), "the graph was not called"

    def open(self, calls: int = 1) -> None:
        self._allowed.release(calls)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An engine over one toy program."""

    def __init__(self, graphs: Mapping[str, Graph] = programs.GRAPHS, limits: Limits | None = None) -> None:
        self.ledger = RecordingObserver()
        self.clock = Clock()
        self.engine = Engine(Scheduler(limits), self.ledger, self.clock)
        self.engine.add(KEY, programs.program(graphs=graphs))
        self.engine.start()

    def submit(self, **settings: object) -> tuple[Request, Reader]:
        reader = Reader()
        asked = request(reader, **settings)  # type: ignore[arg-type]
        self.engine.submit(asked)
        return asked, reader


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.engine.stop()


@pytest.fixture
def gate() -> Gate:
    return Gate(programs.walk)


@pytest.fixture
def gated(gate: Gate) -> Iterator[Bench]:
    made = Bench({**programs.GRAPHS, "walk": gate})
    yield made
    gate.open(10_000)
    made.engine.stop()


def alone(seed: int, index: int, steps: int, scale: float) -> bytes:
    """A row's bytes when it is the only one in the world."""
    program = programs.program(buckets=(8,))
    program.slots.admit(request(steps=steps, seed=seed, first_row=index, parameters={"scale": scale}), 0, 1)
    while True:
        for readout in program.advance():
            value: bytes = readout.rows.outputs["value"].tobytes()
            return value


requests = st.lists(
    st.tuples(
        st.integers(1, 20),
        st.integers(1, 9),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 50),
        st.sampled_from([0.5, 1.0, 2.0]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30, deadline=None)
@given(requests)
def test_rows_have_the_bytes_that_they_have_alone(asked: list[tuple[int, int, int, int, float]]) -> None:
    bench = Bench()
    readers = [
        bench.submit(rows=rows, steps=steps, seed=seed, first_row=first, parameters={"scale": scale})[1]
        for rows, steps, seed, first, scale in asked
    ]
    for reader, (rows, steps, seed, first, scale) in zip(readers, asked, strict=True):
        delivered = reader.rows()
        assert sorted(delivered) == list(range(first, first + rows))
        for index in (first, first + rows - 1):
            assert delivered[index] == alone(seed, index, steps, scale)
    bench.engine.stop()


def test_one_request_of_many_rows_equals_many_of_one(bench: Bench) -> None:
    _, together = bench.submit(rows=64, seed=5)
    apart = [bench.submit(rows=1, seed=5, first_row=row)[1] for row in range(64)]
    assert together.rows() == {row: reader.rows()[row] for row, reader in enumerate(apart)}


def test_rows_that_come_later_share_the_steps(gated: Bench, gate: Gate) -> None:
    _, long = gated.submit(steps=3)
    gate.await_call()
    _, short = gated.submit(steps=1)
    gate.open(3)
    short.wait()
    long.wait()
    assert gated.ledger.turns == [1, 2, 1]


def test_a_batch_of_whole_requests_keeps_its_width_and_is_answered_together() -> None:
    sizes: list[int] = []

    def walk(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes.append(len(inputs[0]))
        return programs.walk(inputs)

    gate = Gate(walk)
    bench = Bench({**programs.GRAPHS, "walk": gate}, Limits(batching="request"))
    bench.submit(rows=1, steps=1)
    gate.await_call()
    _, short = bench.submit(rows=5, steps=1, seed=1)
    _, long = bench.submit(rows=1, steps=3, seed=2)
    gate.open(2)
    gate.await_call()
    gate.await_call()
    assert not short.events
    gate.open(2)
    assert len(short.rows()) == 5
    assert long.rows() == {0: alone(2, 0, 3, 1.0)}
    assert sizes == [1, 8, 8, 8]
    bench.engine.stop()


def test_rows_that_are_done_fail_with_the_whole_batch_that_they_wait_for() -> None:
    calls = iter([False, False, True])

    def breaks_later(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if next(calls):
            raise RuntimeError("no more")
        return programs.walk(inputs)

    gate = Gate(breaks_later)
    bench = Bench({**programs.GRAPHS, "walk": gate}, Limits(batching="request"))
    bench.submit(rows=1, steps=1)
    gate.await_call()
    readers = [bench.submit(steps=steps)[1] for steps in (1, 3)]
    gate.open(3)
    assert all(isinstance(reader.error(), ModelFailed) for reader in readers)
    bench.engine.stop()
    assert bench.ledger.wasted_steps == {"failed": 2}


def test_previews_come_every_k_steps_and_not_of_finished_rows(bench: Bench) -> None:
    _, reader = bench.submit(rows=2, steps=5, preview_every=2)
    reader.wait()
    assert [list(preview.steps_done) for preview in reader.previews()] == [[2, 2], [4, 4]]


def test_cancelled_rows_leave_at_the_next_step(gated: Bench, gate: Gate) -> None:
    cancelled, reader = gated.submit(rows=3, steps=100)
    gate.await_call()
    _, other = gated.submit(rows=1, steps=3)
    gated.engine.release(cancelled)
    gate.open(1000)
    other.wait()
    assert gated.ledger.turns == [3, 1, 1, 1]
    assert gated.ledger.wasted_steps["cancelled"] == 3
    assert reader.events == []
    assert gated.engine.num_running == 0


def test_a_passed_deadline_drops_what_is_unfinished(gated: Bench, gate: Gate) -> None:
    _, late = gated.submit(rows=2, steps=100, deadline=5.0)
    gate.await_call()
    gated.clock.now = 6.0
    gate.open(1)
    assert isinstance(late.error(), DeadlineExceeded)
    _, next_one = gated.submit(rows=1, steps=1)
    gate.open(1)
    next_one.wait()
    assert gated.ledger.wasted_steps == {"deadline": 2}


def test_after_a_cancelled_neighbour_rows_have_the_bytes_that_they_have_alone(
    gated: Bench, gate: Gate
) -> None:
    cancelled, _ = gated.submit(rows=3, steps=100, seed=1)
    gate.await_call()
    _, other = gated.submit(rows=4, steps=40, seed=2)
    gate.open(19)
    for _ in range(19):
        gate.await_call()
    gated.engine.release(cancelled)
    gate.open(1000)
    assert other.rows() == {index: alone(2, index, 40, 1.0) for index in range(4)}


def test_rows_that_leave_in_the_step_in_which_they_are_cancelled_are_wasted(gated: Bench, gate: Gate) -> None:
    cancelled, _ = gated.submit(rows=3, steps=2)
    gate.open(1)
    gate.await_call()
    gate.await_call()
    gated.engine.release(cancelled)
    _, other = gated.submit(rows=1, steps=1)
    gate.open(2)
    other.wait()
    assert gated.ledger.wasted_steps == {"cancelled": 6}


def test_what_a_caller_gives_up_after_its_deadline_is_wasted_by_that(gated: Bench, gate: Gate) -> None:
    late, _ = gated.submit(rows=2, steps=100, deadline=5.0)
    gate.await_call()
    _, other = gated.submit(rows=1, steps=1)
    gated.clock.now = 5.0
    gated.engine.release(late)
    gate.open(2)
    other.wait()
    assert gated.ledger.wasted_steps == {"deadline": 2}


def test_a_graph_that_raises_fails_its_rows_and_no_others(bench: Bench) -> None:
    calls = iter([True])

    def breaks_once(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if next(calls, False):
            raise RuntimeError("secret detail")
        return programs.walk(inputs)

    broken = Bench({**programs.GRAPHS, "walk": breaks_once})
    _, failed = broken.submit(rows=3)
    error = failed.error()
    assert isinstance(error, ModelFailed)
    assert "secret" not in str(error)
    _, fine = broken.submit(rows=3)
    assert len(fine.rows()) == 3
    assert broken.ledger.faults == ["graph"]
    broken.engine.stop()


def poisoned_walk(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The walk, but for rows whose scale is 9, which lose all that they were."""
    (total,) = programs.walk(inputs)
    return [torch.where(inputs[2][:, None] == 9.0, torch.nan, total)]


def test_rows_that_are_no_numbers_leave_other_requests_alone() -> None:
    bench = Bench({**programs.GRAPHS, "walk": poisoned_walk})
    _, poisoned = bench.submit(rows=2, steps=5, parameters={"scale": 9.0})
    _, neighbour = bench.submit(rows=2, steps=7, seed=1)
    error = poisoned.error()
    assert isinstance(error, ModelFailed)
    assert "rows 0, 1 came out non-finite" in str(error)
    assert neighbour.rows() == {index: alone(1, index, 7, 1.0) for index in range(2)}
    assert bench.ledger.faults == ["non_finite"] * 2
    assert bench.ledger.wasted_steps == {"failed": 10}
    bench.engine.stop()


def test_a_non_finite_row_fails_alone_and_is_named() -> None:
    start = np.zeros((20, 2), np.float32)
    start[13] = np.nan
    bench = Bench()
    work = RowInputs({"steps": 2, "scale": 1.0}, {"start": start})
    _, reader = bench.submit(rows=20, steps=2, seed=1, first_row=100, inputs=work)
    assert "row 113 came out non-finite; all others are done" in str(reader.error())
    assert reader.rows() == {100 + i: alone(1, 100 + i, 2, 1.0) for i in range(20) if i != 13}
    assert bench.ledger.rows == 19
    assert bench.engine.num_running == 0
    bench.engine.stop()


def test_lost_rows_take_no_room_in_the_window_of_a_reader() -> None:
    start = np.zeros((20, 2), np.float32)
    start[:9] = np.nan
    bench, reader = Bench(), Reader()
    work = RowInputs({"steps": 1, "scale": 1.0}, {"start": start})
    asked = request(reader, rows=20, steps=1, inputs=work, max_unread_rows=2)

    def read(events: Sequence[Event]) -> None:
        reader.deliver(events)
        if not asked.is_closed:
            bench.engine.acknowledge(asked, sum(len(e.indices) for e in events if isinstance(e, Rows)))

    asked.deliver = read
    bench.engine.submit(asked)
    assert sorted(reader.rows()) == list(range(9, 20))
    bench.engine.stop()


def test_a_request_that_loses_many_rows_is_dropped() -> None:
    bench = Bench({**programs.GRAPHS, "walk": poisoned_walk})
    request, reader = bench.submit(rows=10_000, steps=2, parameters={"scale": 9.0})
    assert "what was left has been dropped" in str(reader.error())
    assert MAX_NONFINITE_ROWS <= len(request.nonfinite_rows) <= MAX_NONFINITE_ROWS + 8
    assert request.finished < 100
    _, fine = bench.submit(rows=3)
    assert len(fine.rows()) == 3
    bench.engine.stop()


def test_too_many_waiting_rows_are_refused_at_once(gate: Gate) -> None:
    bench = Bench({**programs.GRAPHS, "walk": gate}, Limits(max_queued_rows=10))
    bench.submit(rows=1)
    gate.await_call()
    bench.submit(rows=10)
    with pytest.raises(Overloaded, match="limit of 10"):
        bench.submit(rows=1)
    gate.open(10_000)
    bench.engine.stop()


def test_a_slow_reader_holds_back_its_own_request_only(bench: Bench) -> None:
    slow, reader = bench.submit(rows=100, steps=1, max_unread_rows=8)
    _, quick = bench.submit(rows=100, steps=1)
    assert len(quick.rows()) == 100
    assert slow.admitted == 8
    while not slow.is_complete:
        bench.engine.acknowledge(slow, slow.finished - slow.acknowledged)
    assert len(reader.rows()) == 100


def test_stopping_fails_what_is_unfinished(gate: Gate) -> None:
    bench = Bench({**programs.GRAPHS, "walk": gate})
    _, reader = bench.submit(rows=100, steps=1000)
    gate.await_call()
    gate.open(1)
    stopper = threading.Thread(target=bench.engine.stop)
    stopper.start()
    gate.open(10)
    assert isinstance(reader.error(), Unavailable)
    stopper.join()
    assert bench.ledger.wasted_steps["failed"] >= 6
    with pytest.raises(Unavailable):
        bench.submit()


def test_a_row_that_cannot_be_admitted_fails_with_those_that_came_with_it(bench: Bench) -> None:
    wide = RowInputs({"steps": 1, "scale": 1.0}, {"start": np.zeros((1, 5), np.float32)})
    _, misfit = bench.submit(steps=1, inputs=wide)
    assert isinstance(misfit.error(), ModelFailed)
    _, fine = bench.submit(rows=3)
    assert len(fine.rows()) == 3
    assert bench.engine.num_running == 0


def test_a_deadline_in_the_far_future_is_waited_for(bench: Bench) -> None:
    slow, _ = bench.submit(rows=20, steps=1, max_unread_rows=4, deadline=1e12)
    _, quick = bench.submit(rows=20, steps=1)
    assert len(quick.rows()) == 20
    bench.engine.release(slow)


def submit_when_up(engine: Engine, asked: Request) -> None:
    """Submit, as a client that retries what was UNAVAILABLE."""
    for _ in range(10_000):
        try:
            return engine.submit(asked)
        except Unavailable:
            time.sleep(0.001)
    raise AssertionError("the engine did not come up again")


class Strike(BaseException):
    """What no graph should raise."""


class Struck:
    """A graph that strikes the device thread down, once, in its third call."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._calls = itertools.count(1)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if next(self._calls) == 3:
            raise self._error
        return programs.walk(inputs)


@pytest.mark.parametrize(
    "error",
    [
        Strike(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA failure 710: device-side assert triggered ; GPU=0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_device_thread_that_is_struck_down_fails_what_is_open_and_goes_on(error: BaseException) -> None:
    renewed = threading.Event()
    ledger = RecordingObserver()
    engine = Engine(Scheduler(), ledger, renew=renewed.set)
    engine.add(KEY, programs.program(graphs={**programs.GRAPHS, "walk": Struck(error)}))
    readers = [Reader(), Reader()]
    for reader in readers:
        engine.submit(request(reader, rows=3, steps=50))
    engine.start()
    for reader in readers:
        assert isinstance(reader.error(), Unavailable)
    assert renewed.wait(30)
    later = Reader()
    submit_when_up(engine, request(later, rows=3, steps=2, seed=1))
    assert later.rows() == {index: alone(1, index, 2, 1.0) for index in range(3)}
    assert ledger.restarts == 1
    assert ledger.faults == []
    assert ledger.wasted_steps == {"failed": 2 * 6}
    engine.stop()


def test_one_that_is_struck_down_again_and_again_gives_up_and_says_so() -> None:
    died = threading.Event()
    ledger = RecordingObserver()
    engine = Engine(Scheduler(), ledger, on_death=died.set)
    engine.add(KEY, programs.program())

    def unreachable(events: Sequence[Event]) -> None:
        raise RuntimeError("the event loop is closed")

    engine.start()
    while not died.wait(0.001):
        with contextlib.suppress(Unavailable):
            engine.submit(request(steps=1, deliver=unreachable))
    assert ledger.restarts == MAX_RESTARTS + 1
    with pytest.raises(Unavailable):
        engine.submit(request())
    engine.stop()


class Cramped:
    """A graph for which only so many rows fit into memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if len(inputs[0]) > self.rows:
            raise RuntimeError("CUDA error: out of memory")
        return programs.walk(inputs)


def test_a_batch_that_does_not_fit_into_memory_is_halved_until_it_does() -> None:
    bench = Bench({**programs.GRAPHS, "walk": Cramped(2)})
    _, reader = bench.submit(rows=20, steps=3, seed=1)
    assert reader.rows() == {index: alone(1, index, 3, 1.0) for index in range(20)}
    assert bench.ledger.faults == ["out_of_memory"] * 2
    bench.engine.stop()


def test_one_row_that_does_not_fit_fails_its_model_only() -> None:
    bench = Bench({**programs.GRAPHS, "walk": Cramped(0)})
    _, reader = bench.submit(rows=1)
    assert isinstance(reader.error(), ModelFailed)
    assert bench.ledger.faults[-1] == "graph"
    bench.engine.stop()


def test_timings_add_up(gated: Bench, gate: Gate) -> None:
    _, first = gated.submit(rows=8, steps=2)
    gate.await_call()
    _, second = gated.submit(rows=1, steps=1)
    for _ in range(3):
        gated.clock.now += 1.0
        gate.open()
        if gated.clock.now < 3:
            gate.await_call()
    ends = [reader.wait()[-1] for reader in (first, second)]
    timings = [end.timings for end in ends if isinstance(end, Completed)]
    assert [(time.queue, time.run, time.compute) for time in timings] == [(0.0, 2.0, 2.0), (2.0, 1.0, 1.0)]
