"""Baseline batching: batches of whole requests, as the benchmarks compare with."""

from collections.abc import Sequence

import torch

from benchmarks.batching import RequestBatching, WholeBatchRunner
from server.core.errors import ModelFailed
from tests.support import programs
from tests.support.engine import Bench, Gate, bytes_alone

Tensors = Sequence[torch.Tensor]


def request_batching(gate: Gate) -> Bench:
    return Bench({**programs.GRAPHS, "walk": gate}, batching=RequestBatching(), runner=WholeBatchRunner)


def test_batch_of_whole_requests_keeps_its_width_and_is_answered_together() -> None:
    sizes: list[int] = []

    def walk(inputs: Tensors) -> Tensors:
        sizes.append(len(inputs[0]))
        return programs.walk(inputs)

    gate = Gate(walk)
    bench = request_batching(gate)
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
    assert long.rows() == {0: bytes_alone(2, 0, 3)}
    assert sizes == [1, 8, 8, 8]
    bench.engine.stop()


def test_finished_rows_fail_with_the_batch_that_they_wait_for() -> None:
    calls = iter([False, False, True])

    def raises_later(inputs: Tensors) -> Tensors:
        if next(calls):
            raise RuntimeError("no more")
        return programs.walk(inputs)

    gate = Gate(raises_later)
    bench = request_batching(gate)
    bench.submit(rows=1, steps=1)
    gate.await_call()
    readers = [bench.submit(steps=steps)[1] for steps in (1, 3)]
    gate.open(3)
    assert all(isinstance(reader.error(), ModelFailed) for reader in readers)
    bench.engine.stop()
    assert bench.observer.discarded_steps == {"failed": 2}
