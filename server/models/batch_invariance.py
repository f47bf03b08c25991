"""Proof that programs do what their artifact promises, before they are served.

Compares golden rows with what the exporter measured, and finds the batch sizes in
which every graph gives a row the same bits whatever its slot and company. Doing so
warms each of them, called in the ways in which the engine calls them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.errors import InvalidArtifact
from server.core.request import Admission, Request
from server.core.spec import GoldenRows, ProgramKey, ProgramSpec
from server.execution.program_runner import ProgramRunner
from server.models.default_inputs import default_inputs
from server.runtime import Graph, bind_graph

# Of a graph that is called in every step, as many batches are compared with what they are elsewhere.
MAX_RECORDED = 5

Array = NDArray[Any]
Tensors = Sequence[torch.Tensor]


@dataclass
class Recorder:
    """A graph that remembers some full batches: inputs and outputs of its 1st, 2nd, 4th, 8th, … call."""

    graph: Graph
    full: int
    calls: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    num_calls: int = 0

    def __call__(self, inputs: Tensors) -> Tensors:
        outputs = self.graph(inputs)
        self._record(inputs, outputs)
        return outputs

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A step, called as it is while serving."""
        step = bind_graph(self.graph, inputs, outputs)

        def call() -> None:
            step()
            self._record(inputs, outputs)

        return call

    def _record(self, inputs: Tensors, outputs: Tensors) -> None:
        if len(inputs[0]) < self.full or len(self.calls) == MAX_RECORDED:
            return
        self.num_calls += 1
        if self.num_calls.bit_count() == 1:
            self.calls.append(([tensor.clone() for tensor in inputs], [tensor.clone() for tensor in outputs]))


class Probe:
    """Runs golden rows, and rows like them, through the programs of one model in one format."""

    def __init__(self, graphs: Mapping[str, Graph], buckets: Sequence[int], device: torch.device) -> None:
        self._buckets = sorted(buckets)
        self._recorders = {name: Recorder(graph, self._buckets[-1]) for name, graph in graphs.items()}
        self._device = device
        self._filled: set[str] = set()

    def prove(self, spec: ProgramSpec, golden: GoldenRows) -> None:
        """ArtifactRefused unless golden rows come out as the exporter measured them.

        The rows of a batch that golden rows do not fill are filled with their like. A program's first
        golden rows ride in the largest batches, the others in ones that they fill best.
        """
        size = self._buckets[-1]
        if spec.name in self._filled:
            size = next((bucket for bucket in self._buckets if bucket >= golden.rows), size)
        self._filled.add(spec.name)
        for start in range(0, golden.rows, size):
            outputs = self._run(spec, golden, start, size)
            for name, answers in golden.outputs.items():
                expected = answers[start : start + size]
                _compare(name, outputs[name][: len(expected)], expected, golden.tolerance[name])

    def stable_buckets(self) -> dict[str, set[int]]:
        """For every graph that has been run, the buckets in which rows keep their bits.

        A graph whose rows depend on their slot even in the largest bucket has none.
        """
        return {name: self._stable(recorder) for name, recorder in self._recorders.items() if recorder.calls}

    def _stable(self, recorder: Recorder) -> set[int]:
        """Calls the graph in every bucket, so that each is warm whatever comes out."""
        stable = {bucket for bucket in self._buckets if self._is_same_in(bucket, recorder)}
        is_slot_free = all(_same_in_other_slots(recorder.graph, *call) for call in recorder.calls)
        return stable if is_slot_free else set()

    def _is_same_in(self, bucket: int, recorder: Recorder) -> bool:
        starts = {0, self._buckets[-1] - bucket}
        return all(
            _same_slice(recorder.graph, *call, start, start + bucket)
            for call in recorder.calls
            for start in starts
        )

    def _run(self, spec: ProgramSpec, golden: GoldenRows, start: int, size: int) -> dict[str, Array]:
        """Outputs of the golden rows from `start` on and their successors, `size` rows in order."""
        program = ProgramRunner(spec, self._recorders, (size,), self._device)
        indices = range(golden.first_row + start, golden.first_row + start + size)
        _admit(program, golden, indices)
        finished = {}
        while program.num_active:
            for readout in program.advance().readouts:
                finished[readout.rows.indices[0]] = readout.rows.outputs
        rows = [finished[index] for index in indices]
        return {tensor.name: np.concatenate([row[tensor.name] for row in rows]) for tensor in spec.outputs}


def is_batch_invariant(program: ProgramRunner, golden: GoldenRows, steps: int = 2) -> bool:
    """Take some steps in every bucket; whether rows have the same bits in all.

    What a runtime prepares for a step it has after two, one for either side of the state, for the very
    tables that are used while serving.
    """
    if program.spec.step is None:
        return True
    largest, *others = (
        _first_states(program, golden, bucket) for bucket in reversed(program.buckets) for _ in range(steps)
    )
    return all(
        state.tobytes() == expected[: len(state)].tobytes()
        for states in others
        for state, expected in zip(states, largest, strict=True)
    )


def _first_states(program: ProgramRunner, golden: GoldenRows, rows: int) -> list[Array]:
    """The state of so many rows after their first step, by row index."""
    _admit(program, golden, range(golden.first_row, golden.first_row + rows))
    program.advance()
    order = np.argsort(program.slots.row[:rows])
    states = [program.slots.tables[tensor.name][:rows].cpu().numpy()[order] for tensor in program.spec.state]
    program.empty()
    return states


def _admit(program: ProgramRunner, golden: GoldenRows, indices: Iterable[int]) -> None:
    """Let golden rows and their successors enter, whose inputs are those of the golden rows again."""
    spec = program.spec
    parameters = {**spec.defaults(), **golden.parameters}
    admissions = []
    for index in indices:
        position = (index - golden.first_row) % golden.rows
        inputs = default_inputs(spec) | {
            name: array[position : position + 1] for name, array in golden.inputs.items()
        }
        request = Request(
            program=ProgramKey("probe", "", "", spec.operation, spec.variant),
            rows=1,
            steps=spec.steps.of(parameters),
            seed=golden.seed,
            first_row=index,
            parameters=parameters,
            inputs=inputs,
        )
        admissions.append(Admission(request, 0, 1))
    program.admit(admissions)


def _compare(name: str, given: Array, expected: Array, tolerance: float) -> None:
    if given.dtype != expected.dtype or given.shape != expected.shape:
        raise InvalidArtifact(f"{name} came out as {given.dtype}{list(given.shape[1:])}")
    difference = float(np.max(np.abs(given.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
    if not difference <= tolerance:
        raise InvalidArtifact(f"golden rows: {name} is off by {difference:.3g}, allowed is {tolerance:.3g}")


def _same_slice(graph: Graph, inputs: Tensors, outputs: Tensors, start: int, end: int) -> bool:
    again = graph([tensor[start:end] for tensor in inputs])
    return all(map(_same_bits, again, [tensor[start:end] for tensor in outputs]))


def _same_in_other_slots(graph: Graph, inputs: Tensors, outputs: Tensors) -> bool:
    """Kernels that read aligned packets treat the rows of odd and even slots differently, say."""
    for shift in (1, 3, len(inputs[0]) // 2):
        again = graph([tensor.roll(shift, 0).flip(0) for tensor in inputs])
        if not all(map(_same_bits, again, [tensor.roll(shift, 0).flip(0) for tensor in outputs])):
            return False
    return True


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.cpu().numpy().tobytes() == right.cpu().numpy().tobytes()
