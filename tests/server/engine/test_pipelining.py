"""Pipelined steps: the next step is launched before the host waits for the current one."""

import threading
from collections.abc import Callable

import pytest

from server.core.errors import ModelFailed, Unavailable
from server.core.request import Failed, Rows
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from tests.support.device_operations import DeferredOperations
from tests.support.engine import Bench, bytes_alone
from tests.support.programs import KEY, Reader, RecordingObserver, new_runner, request

CAPACITY = 8
LOST = "CUDA error: an illegal memory access was encountered"


def test_next_rows_enter_before_the_host_waits_for_the_last_ones() -> None:
    operations = DeferredOperations()
    bench = Bench(operations=operations)
    _, reader = bench.submit(rows=3 * CAPACITY, steps=1, seed=2)
    assert reader.rows() == {index: bytes_alone(2, index, 1) for index in range(3 * CAPACITY)}
    bench.engine.stop()
    assert operations.events == ["step", "step", "wait", "step", "wait", "wait"]


def test_step_time_is_that_of_the_device() -> None:
    seconds = []

    class Observer(RecordingObserver):
        def on_step(self, program: object, rows: int, bucket: int, duration: float) -> None:
            seconds.append(duration)

    engine = Engine(Scheduler(), Observer(), pipeline_depth=1)
    engine.add(KEY, new_runner(operations=DeferredOperations()))
    engine.start()
    reader = Reader()
    engine.submit(request(steps=4), reader.deliver)
    reader.wait()
    engine.stop()
    assert seconds == [0.001] * 4


class Failure:
    """Raises an error in the given wait for a step."""

    def __init__(self, error: Exception, wait: int) -> None:
        self.error = error
        self.remaining = wait
        self.has_failed = threading.Event()

    def __call__(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            self.has_failed.set()
            raise self.error


def fail_in_wait(error: Exception, wait: int) -> Callable[..., tuple[Bench, list[Reader]]]:
    """Return a function that submits three requests of a full batch each, of which one is lost."""

    def submit(steps: int) -> tuple[Bench, list[Reader]]:
        bench = Bench(operations=DeferredOperations(on_wait=Failure(error, wait)))
        readers = [bench.submit(rows=CAPACITY, steps=steps, seed=seed)[1] for seed in range(3)]
        for reader in readers:
            reader.wait()
        return bench, readers

    return submit


@pytest.mark.parametrize(("steps", "wait"), [(1, 1), (1, 2), (3, 2), (3, 3)])
def test_error_after_rows_left_their_slots_fails_their_request_once(steps: int, wait: int) -> None:
    bench, readers = fail_in_wait(RuntimeError("kernel failed"), wait)(steps)
    failed = [reader for reader in readers if isinstance(reader.events[-1], Failed)]
    assert failed
    for reader in failed:
        assert isinstance(reader.error(), ModelFailed)
        assert sum(isinstance(event, Failed) for event in reader.events) == 1
    _, later = bench.submit(rows=2, steps=2, seed=9)
    assert later.rows() == {index: bytes_alone(9, index, 2) for index in range(2)}
    assert bench.engine.num_running == 0
    bench.engine.stop()


@pytest.mark.parametrize("wait", [1, 2, 3])
def test_lost_device_fails_rows_that_left_their_slots(wait: int) -> None:
    bench, readers = fail_in_wait(RuntimeError(LOST), wait)(1)
    failed = [reader for reader in readers if isinstance(reader.events[-1], Failed)]
    assert failed
    assert all(isinstance(reader.error(), Unavailable) for reader in failed)
    delivered = sum(reader.num_rows for reader in readers)
    discarded = bench.observer.discarded_steps.get("failed", 0)
    assert delivered + discarded <= 3 * CAPACITY
    assert delivered == CAPACITY * (3 - len(failed))
    assert bench.observer.restarts == 1
    bench.engine.stop()


def test_rows_cancelled_after_they_left_their_slots_are_discarded() -> None:
    first_wait, cancelled = threading.Event(), threading.Event()

    def pause() -> None:
        first_wait.set()
        assert cancelled.wait(500)

    bench = Bench(operations=DeferredOperations(on_wait=pause))
    # Two batches, so that the request is still open when the rows of the first one are delivered.
    submitted, reader = bench.submit(rows=3 * CAPACITY, steps=1)
    assert first_wait.wait(500)
    bench.engine.release(submitted)
    cancelled.set()
    _, other = bench.submit(rows=1, steps=1, seed=4)
    assert other.rows() == {0: bytes_alone(4, 0, 1)}
    assert not any(isinstance(event, Rows) for event in reader.events)
    assert bench.observer.discarded_steps == {"cancelled": 2 * CAPACITY}
    bench.engine.stop()
