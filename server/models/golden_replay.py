"""Replay of golden rows: a program must compute what the exporter recorded before it is served."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.core.errors import InvalidArtifact
from server.core.request import Admission, Request
from server.core.spec import GoldenRows, ProgramKey, ProgramSpec
from server.execution.program_runner import ProgramRunner
from server.models.default_inputs import default_inputs
from server.runtime import Device, Graph

Array = NDArray[Any]


class GoldenReplay:
    """Replays golden rows through the programs of one model in one format.

    Args:
        graphs: the graphs by name.
        buckets: the batch sizes to use.
        device: device of the graphs.
    """

    def __init__(self, graphs: Mapping[str, Graph], buckets: Sequence[int], device: Device) -> None:
        self._graphs = graphs
        self._buckets = sorted(buckets)
        # Graphs may do more than launch kernels here: those of the batch-invariance check record their calls.
        self._device = dataclasses.replace(device, cuda_graphs=False)
        self._replayed: set[str] = set()

    def check(self, spec: ProgramSpec, golden: GoldenRows) -> None:
        """Raise InvalidArtifact if golden rows differ from their recorded outputs by more than the tolerance.

        The first golden rows of a program run in the largest batch, the others in the smallest batch that
        holds them. Batches are padded with further rows of the same inputs.
        """
        size = self._buckets[-1]
        if spec.name in self._replayed:
            size = next((bucket for bucket in self._buckets if bucket >= golden.rows), size)
        self._replayed.add(spec.name)
        for start in range(0, golden.rows, size):
            outputs = self._run(spec, golden, start, size)
            for name, recorded in golden.outputs.items():
                expected = recorded[start : start + size]
                _compare(name, outputs[name][: len(expected)], expected, golden.tolerance[name])

    def _run(self, spec: ProgramSpec, golden: GoldenRows, start: int, size: int) -> dict[str, Array]:
        """Return the outputs of `size` consecutive rows, from the golden row at `start`."""
        runner = ProgramRunner(spec, self._graphs, (size,), self._device)
        indices = range(golden.first_row + start, golden.first_row + start + size)
        runner.admit(golden_admissions(spec, golden, indices))
        finished = {}
        while runner.num_active:
            for readout in runner.advance().wait():
                finished[readout.rows.indices[0]] = readout.rows.outputs
        rows = [finished[index] for index in indices]
        return {tensor.name: np.concatenate([row[tensor.name] for row in rows]) for tensor in spec.outputs}


def golden_admissions(spec: ProgramSpec, golden: GoldenRows, indices: Iterable[int]) -> list[Admission]:
    """Return a request for each row index, which repeat the inputs of the golden rows."""
    parameters = {**spec.defaults(), **golden.parameters}
    admissions = []
    for index in indices:
        position = (index - golden.first_row) % golden.rows
        inputs = default_inputs(spec) | {
            name: array[position : position + 1] for name, array in golden.inputs.items()
        }
        request = Request(
            program=ProgramKey("golden-replay", "", "", spec.operation, spec.variant),
            rows=1,
            steps=spec.steps.of(parameters),
            seed=golden.seed,
            first_row=index,
            parameters=parameters,
            inputs=inputs,
        )
        admissions.append(Admission(request, 0, 1))
    return admissions


def _compare(name: str, actual: Array, expected: Array, tolerance: float) -> None:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise InvalidArtifact(
            f"golden rows: output {name} is {actual.dtype}{list(actual.shape[1:])}, expected "
            f"{expected.dtype}{list(expected.shape[1:])}"
        )
    difference = float(np.max(np.abs(actual.astype(np.float64) - expected.astype(np.float64)), initial=0.0))
    if not difference <= tolerance:
        raise InvalidArtifact(
            f"golden rows: output {name} differs by {difference:.3g}, expected at most {tolerance:.3g}"
        )
