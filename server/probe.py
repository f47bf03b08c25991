"""Proof that a program does what its artifact promises, before it is served.

Runs it outside of the engine, in every batch size: compares golden rows with what
the exporter measured, and finds the batch sizes in which rows have the same bits
whatever their company. Doing so warms each of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.errors import ArtifactRefused
from server.program import Program
from server.request import Request, Rows, Work
from server.runtime import Device, Graph
from server.spec import GoldenRows, ProgramKey, ProgramSpec

Array = NDArray[Any]


class Probe:
    """Runs golden rows and their successors, batch size by batch size."""

    def __init__(self, spec: ProgramSpec, graphs: Mapping[str, Graph], device: Device) -> None:
        self._spec = spec
        self._graphs = graphs
        self._device = device

    def prove(self, golden: GoldenRows, bucket: int) -> None:
        """ArtifactRefused unless the golden rows come out as the exporter measured them."""
        outputs = self._run(golden, bucket, range(min(golden.rows, bucket)))
        for name, expected in golden.outputs.items():
            expected = expected[: len(outputs[name])]
            if outputs[name].shape != expected.shape or outputs[name].dtype != expected.dtype:
                raise ArtifactRefused(f"{name} came out as {outputs[name].dtype}{list(outputs[name].shape)}")
            difference = float(np.max(np.abs(outputs[name].astype(np.float64) - expected), initial=0.0))
            if not difference <= golden.tolerance[name]:
                raise ArtifactRefused(
                    f"golden rows: {name} is off by {difference:.3g}, allowed is {golden.tolerance[name]:.3g}"
                )

    def stable_buckets(self, golden: Sequence[GoldenRows], buckets: Sequence[int]) -> tuple[list[int], bool]:
        """The buckets in which rows have the bits that they have in the largest one.

        The second result is False when even there they depend on their neighbours or slot.
        """
        stable, is_bitwise = set(buckets), True
        for rows in golden:
            largest = buckets[-1]
            reference = self._run(rows, largest, range(largest))
            reversed_ = self._run(rows, largest, range(largest)[::-1])
            is_bitwise &= _equal(reversed_, {name: array[::-1] for name, array in reference.items()})
            for bucket in buckets[:-1]:
                outputs = self._run(rows, bucket, range(bucket))
                if not _equal(outputs, {name: array[:bucket] for name, array in reference.items()}):
                    stable.discard(bucket)
        return sorted(stable), is_bitwise

    def _run(self, golden: GoldenRows, bucket: int, offsets: Sequence[int]) -> dict[str, Array]:
        """Outputs of rows at these offsets from the golden request's first, in one bucket, in order.

        Inputs repeat beyond the golden rows; noise goes on.
        """
        program = Program(self._spec, self._graphs, [bucket], self._device.torch)
        parameters = {**self._spec.defaults(), **golden.parameters}
        for offset in offsets:
            position = offset % golden.rows
            inputs = _defaults(self._spec) | {
                name: array[position : position + 1] for name, array in golden.inputs.items()
            }
            request = Request(
                program=ProgramKey("probe", "", "", self._spec.operation),
                rows=1,
                steps=self._spec.steps.of(parameters),
                deliver=lambda event: None,
                seed=golden.seed,
                first_row=golden.first_row + offset,
                work=Work(parameters, inputs),
            )
            program.slots.admit(request, 0, 1)
        finished: dict[int, Rows] = {}
        while program.slots.num_active:
            for readout in program.advance():
                finished[readout.rows.indices[0]] = readout.rows
        rows = [finished[golden.first_row + offset].outputs for offset in offsets]
        return {
            tensor.name: np.concatenate([row[tensor.name] for row in rows]) for tensor in self._spec.outputs
        }


def _defaults(spec: ProgramSpec) -> dict[str, Array]:
    return {
        item.tensor.name: np.full((1, *item.tensor.shape), item.default, item.tensor.dtype)
        for item in spec.inputs
        if item.optional
    }


def _equal(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    return all(left[name].tobytes() == right[name].tobytes() for name in left)
