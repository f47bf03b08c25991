"""Proof that programs do what their artifact promises, before they are served.

Compares golden rows with what the exporter measured, and finds the batch sizes in
which every graph gives a row the same bits whatever its slot and company. Doing so
warms each of them. Runs outside of the engine.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.errors import ArtifactRefused
from server.program import Program
from server.request import Request, Work
from server.runtime import Graph
from server.spec import GoldenRows, ProgramKey, ProgramSpec

Array = NDArray[Any]
Tensors = Sequence[torch.Tensor]


@dataclass
class Recorder:
    """A graph that remembers its 1st, 2nd, 4th, 8th, ... call: inputs and outputs of full batches."""

    graph: Graph
    calls: list[tuple[Tensors, Tensors]] = field(default_factory=list)
    num_calls: int = 0

    def __call__(self, inputs: Tensors) -> Tensors:
        outputs = self.graph(inputs)
        self.num_calls += 1
        if self.num_calls.bit_count() == 1:
            self.calls.append(([tensor.clone() for tensor in inputs], [tensor.clone() for tensor in outputs]))
        return outputs


class Probe:
    """Runs golden rows, and rows like them, through the programs of one model in one format."""

    def __init__(self, graphs: Mapping[str, Graph], buckets: Sequence[int], device: torch.device) -> None:
        self._recorders = {name: Recorder(graph) for name, graph in graphs.items()}
        self._buckets = sorted(buckets)
        self._device = device

    def prove(self, spec: ProgramSpec, golden: GoldenRows) -> None:
        """ArtifactRefused unless golden rows come out as the exporter measured them.

        The rows of the batch that golden rows do not fill are filled with their like.
        """
        outputs = self._run(spec, golden)
        for name, expected in golden.outputs.items():
            given = outputs[name][: len(expected)]
            if given.dtype != expected.dtype or given.shape[1:] != expected.shape[1:]:
                raise ArtifactRefused(f"{name} came out as {given.dtype}{list(given.shape[1:])}")
            difference = _largest_difference(given, expected[: len(given)])
            if not difference <= golden.tolerance[name]:
                raise ArtifactRefused(
                    f"golden rows: {name} is off by {difference:.3g}, allowed is {golden.tolerance[name]:.3g}"
                )

    def stable_buckets(self) -> dict[str, set[int]]:
        """For every graph that has been run, the buckets in which rows keep their bits.

        A graph whose rows depend on their slot even in the largest bucket has none.
        """
        return {
            name: set(self._stable(recorder)) for name, recorder in self._recorders.items() if recorder.calls
        }

    def _stable(self, recorder: Recorder) -> Iterator[int]:
        largest = self._buckets[-1]
        if not all(_same_in_other_slots(recorder.graph, *call) for call in recorder.calls):
            return
        for bucket in self._buckets:
            starts = {0, largest - bucket}
            if all(
                _same_slice(recorder.graph, *call, s, s + bucket) for call in recorder.calls for s in starts
            ):
                yield bucket

    def _run(self, spec: ProgramSpec, golden: GoldenRows) -> dict[str, Array]:
        """Outputs of the golden rows and their successors in the largest bucket, in order."""
        program = Program(spec, self._recorders, self._buckets[-1:], self._device)
        parameters = {**spec.defaults(), **golden.parameters}
        for offset in range(program.capacity):
            position = offset % golden.rows
            inputs = _default_inputs(spec) | {
                name: array[position : position + 1] for name, array in golden.inputs.items()
            }
            request = Request(
                program=ProgramKey("probe", "", "", spec.operation),
                rows=1,
                steps=spec.steps.of(parameters),
                deliver=lambda events: None,
                seed=golden.seed,
                first_row=golden.first_row + offset,
                work=Work(parameters, inputs),
            )
            program.slots.admit(request, 0, 1)
        finished = {}
        while program.slots.num_active:
            for readout in program.advance():
                finished[readout.rows.indices[0]] = readout.rows.outputs
        rows = [finished[golden.first_row + offset] for offset in range(program.capacity)]
        return {tensor.name: np.concatenate([row[tensor.name] for row in rows]) for tensor in spec.outputs}


def _default_inputs(spec: ProgramSpec) -> dict[str, Array]:
    return {
        item.tensor.name: np.full((1, *item.tensor.shape), item.default, item.tensor.dtype)
        for item in spec.inputs
        if item.optional
    }


def _largest_difference(given: Array, expected: Array) -> float:
    return float(np.max(np.abs(given.astype(np.float64) - expected.astype(np.float64)), initial=0.0))


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
    """Equal, where any NaN equals any other."""
    same = (left == right) | ((left != left) & (right != right))
    return bool(same.all())
