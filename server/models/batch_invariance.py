"""Batch invariance: the batch sizes at which a row has the same bits regardless of its slot and neighbors.

The check warms up every graph at every batch size, called as the engine calls it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.spec import GoldenRows
from server.execution.program_runner import ProgramRunner
from server.models.golden_replay import golden_admissions
from server.runtime import Graph, bind_graph

# Batches that are compared for each graph.
MAX_RECORDED = 5

Array = NDArray[Any]
Tensors = Sequence[torch.Tensor]


@dataclass
class RecordingGraph:
    """A graph that records its inputs and outputs in the 1st, 2nd, 4th, 8th, … call with a full batch."""

    graph: Graph
    full_batch: int
    calls: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    num_calls: int = 0

    def __call__(self, inputs: Tensors) -> Tensors:
        outputs = self.graph(inputs)
        self._record(inputs, outputs)
        return outputs

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """Return a call of the graph that is bound as in the engine, and recorded."""
        step = bind_graph(self.graph, inputs, outputs)

        def call() -> None:
            step()
            self._record(inputs, outputs)

        return call

    def _record(self, inputs: Tensors, outputs: Tensors) -> None:
        if len(inputs[0]) < self.full_batch or len(self.calls) == MAX_RECORDED:
            return
        self.num_calls += 1
        if self.num_calls.bit_count() == 1:
            self.calls.append(([tensor.clone() for tensor in inputs], [tensor.clone() for tensor in outputs]))


class BatchInvarianceCheck:
    """Finds the batch sizes at which each graph of a model is batch-invariant.

    Run programs with the graphs in `recorded` first, for example by a golden replay.
    """

    def __init__(self, graphs: Mapping[str, Graph], buckets: Sequence[int]) -> None:
        self._buckets = sorted(buckets)
        self.recorded = {name: RecordingGraph(graph, self._buckets[-1]) for name, graph in graphs.items()}

    def invariant_buckets(self) -> dict[str, set[int]]:
        """Return the batch-invariant batch sizes of every graph that was called.

        A graph whose rows depend on their slot in the largest batch has none.
        """
        return {name: self._check(graph) for name, graph in self.recorded.items() if graph.calls}

    def _check(self, recorded: RecordingGraph) -> set[int]:
        # Every batch size is called, regardless of the results, so that each is warmed up.
        invariant = {bucket for bucket in self._buckets if self._is_same_in(bucket, recorded)}
        is_slot_invariant = all(_is_same_in_other_slots(recorded.graph, *call) for call in recorded.calls)
        return invariant if is_slot_invariant else set()

    def _is_same_in(self, bucket: int, recorded: RecordingGraph) -> bool:
        starts = {0, self._buckets[-1] - bucket}
        return all(
            _is_same_slice(recorded.graph, *call, start, start + bucket)
            for call in recorded.calls
            for start in starts
        )


def is_batch_invariant(runner: ProgramRunner, golden: GoldenRows, steps: int = 2, passes: int = 1) -> bool:
    """Take `steps` steps in every bucket, and return whether rows have the same bits in all.

    Two steps, one for each set of state tables, prepare everything that a runtime prepares for the tables
    that are used in serving. A second pass replays what the first one captured, after all other captures.
    """
    if runner.spec.step is None and not runner.uses_cuda_graphs:
        return True
    largest, *others = (
        _first_states(runner, golden, bucket)
        for _ in range(passes)
        for bucket in reversed(runner.buckets)
        for _ in range(steps)
    )
    return all(
        state.tobytes() == expected[: len(state)].tobytes()
        for states in others
        for state, expected in zip(states, largest, strict=True)
    )


def _first_states(runner: ProgramRunner, golden: GoldenRows, rows: int) -> list[Array]:
    """Return the state of `rows` rows after their first step, in order of their indices."""
    runner.admit(golden_admissions(runner.spec, golden, range(golden.first_row, golden.first_row + rows)))
    runner.advance().wait()
    slots = runner.slots
    order = np.argsort(slots.row[:rows])
    states = [slots.tables[tensor.name][:rows].cpu().numpy()[order] for tensor in runner.spec.state]
    runner.empty()
    return states


def _is_same_slice(graph: Graph, inputs: Tensors, outputs: Tensors, start: int, end: int) -> bool:
    again = graph([tensor[start:end] for tensor in inputs])
    return all(map(_has_same_bits, again, [tensor[start:end] for tensor in outputs]))


def _is_same_in_other_slots(graph: Graph, inputs: Tensors, outputs: Tensors) -> bool:
    """Reorder the rows: some kernels, for example, treat even and odd slots differently."""
    for shift in (1, 3, len(inputs[0]) // 2):
        again = graph([tensor.roll(shift, 0).flip(0) for tensor in inputs])
        if not all(map(_has_same_bits, again, [tensor.roll(shift, 0).flip(0) for tensor in outputs])):
            return False
    return True


def _has_same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.cpu().numpy().tobytes() == right.cpu().numpy().tobytes()
