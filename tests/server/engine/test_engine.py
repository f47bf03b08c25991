"""Engine loop: every row is delivered once, with the bytes that it has alone."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.errors import DeadlineExceeded, ModelFailed, Overloaded, Unavailable
from server.core.request import Completed, Event, Failed, Request, Rows
from server.engine.engine import MAX_NONFINITE_ROWS, MAX_RESTARTS, Engine
from server.engine.scheduler import Limits, Scheduler
from server.execution.device_operations import CpuOperations
from tests.support import programs
from tests.support.device_operations import OPERATIONS
from tests.support.engine import Bench, Gate, bytes_alone
from tests.support.programs import KEY, Reader, RecordingObserver, new_runner, request

Tensors = Sequence[torch.Tensor]


@pytest.fixture(params=list(OPERATIONS.values()), ids=list(OPERATIONS))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    started = Bench(operations=request.param())
    yield started
    started.engine.stop()


@pytest.fixture
def gate() -> Gate:
    return Gate(programs.walk)


@pytest.fixture
def gated(gate: Gate) -> Iterator[Bench]:
    started = Bench({**programs.GRAPHS, "walk": gate})
    yield started
    gate.open(10_000)
    started.engine.stop()


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


@pytest.mark.parametrize("operations", OPERATIONS.values(), ids=OPERATIONS)
@settings(max_examples=30)
@given(requests)
def test_rows_of_concurrent_requests_have_the_bytes_that_they_have_alone(
    operations: Callable[[], CpuOperations], submitted: list[tuple[int, int, int, int, float]]
) -> None:
    bench = Bench(operations=operations())
    readers = [
        bench.submit(rows=rows, steps=steps, seed=seed, first_row=first, parameters={"scale": scale})[1]
        for rows, steps, seed, first, scale in submitted
    ]
    for reader, (rows, steps, seed, first, scale) in zip(readers, submitted, strict=True):
        delivered = reader.rows()
        assert sorted(delivered) == list(range(first, first + rows))
        for index in (first, first + rows - 1):
            assert delivered[index] == bytes_alone(seed, index, steps, scale)
    bench.engine.stop()


def test_one_request_of_many_rows_equals_many_requests_of_one_row(bench: Bench) -> None:
    _, together = bench.submit(rows=64, seed=5)
    separate = [bench.submit(rows=1, seed=5, first_row=row)[1] for row in range(64)]
    assert together.rows() == {row: reader.rows()[row] for row, reader in enumerate(separate)}


def test_rows_that_arrive_later_join_the_running_batch(gated: Bench, gate: Gate) -> None:
    _, long = gated.submit(steps=3)
    gate.await_call()
    _, short = gated.submit(steps=1)
    gate.open(3)
    short.wait()
    long.wait()
    assert gated.observer.step_rows == [1, 2, 1]
    assert gated.observer.dequeued == 2


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
    assert gated.observer.step_rows == [3, 1, 1, 1]
    assert gated.observer.discarded_steps["cancelled"] == 3
    assert reader.events == []
    assert gated.engine.num_running == 0


def test_passed_deadline_drops_unfinished_rows(gated: Bench, gate: Gate) -> None:
    _, late = gated.submit(rows=2, steps=100, deadline=5.0)
    gate.await_call()
    gated.clock.now = 6.0
    gate.open(1)
    assert isinstance(late.error(), DeadlineExceeded)
    _, following = gated.submit(rows=1, steps=1)
    gate.open(1)
    following.wait()
    assert gated.observer.discarded_steps == {"deadline": 2}


def test_rows_have_the_bytes_that_they_have_alone_after_a_neighbor_is_cancelled(
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
    assert other.rows() == {index: bytes_alone(2, index, 40) for index in range(4)}


def test_rows_that_finish_in_the_step_of_their_cancellation_are_discarded(gated: Bench, gate: Gate) -> None:
    cancelled, _ = gated.submit(rows=3, steps=2)
    gate.open(1)
    gate.await_call()
    gate.await_call()
    gated.engine.release(cancelled)
    _, other = gated.submit(rows=1, steps=1)
    gate.open(2)
    other.wait()
    assert gated.observer.discarded_steps == {"cancelled": 6}


def test_release_after_the_deadline_counts_as_deadline(gated: Bench, gate: Gate) -> None:
    late, _ = gated.submit(rows=2, steps=100, deadline=5.0)
    gate.await_call()
    _, other = gated.submit(rows=1, steps=1)
    gated.clock.now = 5.0
    gated.engine.release(late)
    gate.open(2)
    other.wait()
    assert gated.observer.discarded_steps == {"deadline": 2}


def test_graph_that_raises_fails_its_requests_only(bench: Bench) -> None:
    calls = iter([True])

    def raises_once(inputs: Tensors) -> Tensors:
        if next(calls, False):
            raise RuntimeError("secret detail")
        return programs.walk(inputs)

    broken = Bench({**programs.GRAPHS, "walk": raises_once})
    _, failed = broken.submit(rows=3)
    error = failed.error()
    assert isinstance(error, ModelFailed)
    assert "secret" not in str(error)
    _, following = broken.submit(rows=3)
    assert len(following.rows()) == 3
    assert broken.observer.errors == ["graph"]
    broken.engine.stop()


def nan_at_scale_9(inputs: Tensors) -> Tensors:
    """The walk, but rows whose scale is 9 become NaN."""
    (total,) = programs.walk(inputs)
    return [torch.where(inputs[2][:, None] == 9.0, torch.nan, total)]


def test_nonfinite_rows_leave_other_requests_unchanged() -> None:
    bench = Bench({**programs.GRAPHS, "walk": nan_at_scale_9})
    _, nonfinite = bench.submit(rows=2, steps=5, parameters={"scale": 9.0})
    _, neighbor = bench.submit(rows=2, steps=7, seed=1)
    error = nonfinite.error()
    assert isinstance(error, ModelFailed)
    assert "rows 0, 1 came out non-finite" in str(error)
    assert neighbor.rows() == {index: bytes_alone(1, index, 7) for index in range(2)}
    assert bench.observer.errors == ["non_finite"] * 2
    assert bench.observer.discarded_steps == {"failed": 10}
    bench.engine.stop()


def test_nonfinite_row_fails_its_request_after_all_other_rows_are_delivered() -> None:
    start = np.zeros((20, 2), np.float32)
    start[13] = np.nan
    bench = Bench()
    _, reader = bench.submit(rows=20, steps=2, seed=1, first_row=100, inputs={"start": start})
    assert "row 113 came out non-finite; all other rows are done" in str(reader.error())
    assert reader.rows() == {100 + i: bytes_alone(1, 100 + i, 2) for i in range(20) if i != 13}
    assert bench.observer.rows == 19
    assert bench.engine.num_running == 0
    bench.engine.stop()


def test_nonfinite_rows_do_not_count_as_unread() -> None:
    start = np.zeros((20, 2), np.float32)
    start[:9] = np.nan
    bench, reader = Bench(), Reader()
    submitted = request(rows=20, steps=1, inputs={"start": start}, max_unread_rows=2)

    def read(events: Sequence[Event]) -> None:
        reader.deliver(events)
        rows = sum(len(event.indices) for event in events if isinstance(event, Rows))
        bench.engine.acknowledge(submitted, rows)

    bench.engine.submit(submitted, read)
    assert sorted(reader.rows()) == list(range(9, 20))
    bench.engine.stop()


def test_request_with_many_nonfinite_rows_is_dropped() -> None:
    bench = Bench({**programs.GRAPHS, "walk": nan_at_scale_9})
    _, reader = bench.submit(rows=10_000, steps=2, parameters={"scale": 9.0})
    assert "unfinished rows were dropped" in str(reader.error())
    assert MAX_NONFINITE_ROWS <= bench.observer.errors.count("non_finite") <= MAX_NONFINITE_ROWS + 8
    _, following = bench.submit(rows=3)
    assert len(following.rows()) == 3
    bench.engine.stop()


def test_submit_above_the_queue_limit_is_delivered_its_rejection_at_once(gate: Gate) -> None:
    bench = Bench({**programs.GRAPHS, "walk": gate}, Limits(max_queued_rows=10))
    bench.submit(rows=1)
    gate.await_call()
    bench.submit(rows=10)
    _, rejected = bench.submit(rows=1)
    assert isinstance(rejected.error(), Overloaded)
    assert "limit of 10" in str(rejected.error())
    gate.open(10_000)
    bench.engine.stop()


def test_slow_reader_delays_its_own_request_only(bench: Bench) -> None:
    slow, reader = bench.submit(rows=100, steps=1, max_unread_rows=8)
    _, fast = bench.submit(rows=100, steps=1)
    assert len(fast.rows()) == 100
    assert reader.num_rows == 8
    for rows in range(8, 100, 4):
        reader.await_rows(rows)
        bench.engine.acknowledge(slow, 4)
    assert len(reader.rows()) == 100


def test_stop_fails_unfinished_requests(gate: Gate) -> None:
    bench = Bench({**programs.GRAPHS, "walk": gate})
    _, reader = bench.submit(rows=100, steps=1000)
    gate.await_call()
    gate.open(1)
    stopper = threading.Thread(target=bench.engine.stop)
    stopper.start()
    gate.open(10)
    assert isinstance(reader.error(), Unavailable)
    stopper.join()
    assert bench.observer.discarded_steps["failed"] >= 6
    _, rejected = bench.submit()
    assert isinstance(rejected.error(), Unavailable)


def test_row_that_does_not_fit_fails_the_requests_admitted_with_it(bench: Bench) -> None:
    _, misfit = bench.submit(steps=1, inputs={"start": np.zeros((1, 5), np.float32)})
    assert isinstance(misfit.error(), ModelFailed)
    _, following = bench.submit(rows=3)
    assert len(following.rows()) == 3
    assert bench.engine.num_running == 0


def test_deadline_in_the_far_future_does_not_overflow(bench: Bench) -> None:
    slow, _ = bench.submit(rows=20, steps=1, max_unread_rows=4, deadline=1e12)
    _, fast = bench.submit(rows=20, steps=1)
    assert len(fast.rows()) == 20
    bench.engine.release(slow)


def submit_until_available(engine: Engine, submitted: Request) -> Reader:
    """Submit a request, and again whenever it is rejected as Unavailable, like a client that retries."""
    for _ in range(10_000):
        reader = Reader()
        engine.submit(submitted, reader.deliver)
        last = reader.wait()[-1]
        if isinstance(last, Completed):
            return reader
        assert isinstance(last, Failed)
        assert isinstance(last.error, Unavailable)
        time.sleep(0.001)
    raise AssertionError("the engine did not recover")


class Crash(BaseException):
    """An exception that no graph should raise."""


class CrashingGraph:
    """A graph that raises an error once, in its third call."""

    def __init__(self, error: BaseException) -> None:
        self._error = error
        self._calls = itertools.count(1)

    def __call__(self, inputs: Tensors) -> Tensors:
        if next(self._calls) == 3:
            raise self._error
        return programs.walk(inputs)


@pytest.mark.parametrize(
    "error",
    [
        Crash(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA failure 710: device-side assert triggered ; GPU=0"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_crashed_device_thread_fails_open_requests_and_restarts(error: BaseException) -> None:
    reloaded = threading.Event()
    observer = RecordingObserver()
    engine = Engine(Scheduler(), observer, reload_graphs=reloaded.set)
    engine.add(KEY, new_runner(graphs={**programs.GRAPHS, "walk": CrashingGraph(error)}))
    readers = [Reader(), Reader()]
    for reader in readers:
        engine.submit(request(rows=3, steps=50), reader.deliver)
    engine.start()
    for reader in readers:
        assert isinstance(reader.error(), Unavailable)
    assert reloaded.wait(500)
    later = submit_until_available(engine, request(rows=3, steps=2, seed=1))
    assert later.rows() == {index: bytes_alone(1, index, 2) for index in range(3)}
    assert observer.restarts == 1
    assert observer.errors == []
    assert observer.discarded_steps == {"failed": 2 * 6}
    engine.stop()


def test_engine_that_crashes_repeatedly_gives_up_and_reports_it() -> None:
    died = threading.Event()
    observer = RecordingObserver()
    engine = Engine(Scheduler(), observer, on_death=died.set)
    engine.add(KEY, new_runner())

    def unreachable(events: Sequence[Event]) -> None:
        raise RuntimeError("the event loop is closed")

    engine.start()
    while not died.wait(0.001):
        with contextlib.suppress(RuntimeError):
            engine.submit(request(steps=1), unreachable)
    assert observer.restarts == MAX_RESTARTS + 1
    reader = Reader()
    engine.submit(request(), reader.deliver)
    assert isinstance(reader.error(), Unavailable)
    engine.stop()


class LimitedMemory:
    """A graph for which at most `rows` rows fit into memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, inputs: Tensors) -> Tensors:
        if len(inputs[0]) > self.rows:
            raise RuntimeError("CUDA error: out of memory")
        return programs.walk(inputs)


def test_batch_that_does_not_fit_into_memory_is_halved_until_it_does() -> None:
    bench = Bench({**programs.GRAPHS, "walk": LimitedMemory(2)})
    _, reader = bench.submit(rows=20, steps=3, seed=1)
    assert reader.rows() == {index: bytes_alone(1, index, 3) for index in range(20)}
    assert bench.observer.errors == ["out_of_memory"] * 2
    bench.engine.stop()


def test_single_row_that_does_not_fit_into_memory_fails_its_request() -> None:
    bench = Bench({**programs.GRAPHS, "walk": LimitedMemory(0)})
    _, reader = bench.submit(rows=1)
    assert isinstance(reader.error(), ModelFailed)
    assert bench.observer.errors[-1] == "graph"
    bench.engine.stop()


def test_timings_are_those_of_queue_and_batch(gated: Bench, gate: Gate) -> None:
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
