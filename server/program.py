"""A program: init, step and readout over the rows in its slots.

Binds each graph's inputs by name to state, inputs, parameters, noise and the step
counters, and pads every call to a bucket. Knows nothing of queues, time or clients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samovar import noise
from server.request import Request, Rows
from server.runtime import Graph
from server.slots import Slots
from server.spec import GraphSpec, ProgramSpec

_DRAW = {"normal": noise.normal, "uniform": noise.uniform}


@dataclass(frozen=True)
class Readout:
    """Rows of one request that were read out: finished ones, or previews of ones on the way."""

    request: Request
    rows: Rows
    steps_done: Sequence[int]
    is_finished: bool
    is_finite: bool = True


class Program:
    """One operation of one model in one format, over up to `buckets[-1]` rows at a time."""

    def __init__(
        self, spec: ProgramSpec, graphs: Mapping[str, Graph], buckets: Sequence[int], device: torch.device
    ) -> None:
        self.spec = spec
        self.buckets = tuple(sorted(buckets))
        self._graphs = graphs
        self._device = device
        self._noise = {item.tensor.name: item for item in spec.noise}
        tables = [tensor for name, tensor in spec.tensors().items() if name not in self._noise]
        self.slots = Slots(self.buckets[-1], tables, device)

    @property
    def capacity(self) -> int:
        return self.slots.capacity

    def bucket(self, rows: int) -> int:
        """The batch size at which so many rows are called."""
        return next(bucket for bucket in self.buckets if bucket >= rows)

    def advance(self) -> list[Readout]:
        """Start the new rows, take one step with all, read out those that are done or due a preview."""
        self._start()
        if self.spec.step is not None and self.slots.num_active:
            self._store(self._call(self.spec.step, 0, self.slots.num_active), 0)
            self.slots.count_step()
        return self._finish() + self._preview()

    def _start(self) -> None:
        slots = self.slots
        start, count = slots.num_started, slots.num_active - slots.num_started
        if count and self.spec.init is not None:
            self._store(self._call(self.spec.init, start, count), start)
        elif count:
            for tensor in self.spec.state:
                slots.device[tensor.name][start : slots.num_active] = 0
        slots.num_started = slots.num_active

    def _store(self, state: Sequence[torch.Tensor], start: int) -> None:
        for tensor, rows in zip(self.spec.state, state, strict=True):
            self.slots.device[tensor.name][start : self.slots.num_active] = rows[
                : self.slots.num_active - start
            ]

    def _finish(self) -> list[Readout]:
        done = self._done()
        if not done.any():
            return []
        start = self.slots.move_to_tail(done)
        outputs = self._call(self.spec.readout, start, self.slots.num_active - start)
        readouts = self._group(outputs, np.arange(start, self.slots.num_active), start, is_finished=True)
        self.slots.release(start)
        return readouts

    def _done(self) -> NDArray[np.bool_]:
        active = slice(0, self.slots.num_active)
        done: NDArray[np.bool_] = self.slots.steps_done[active] >= self.slots.num_steps[active]
        if self.spec.steps.done:
            done |= self.slots.device[self.spec.steps.done][active].cpu().numpy()
        return done

    def _preview(self) -> list[Readout]:
        slots = self.slots
        active = slice(0, slots.num_active)
        every = slots.preview_every[active]
        due = np.flatnonzero((every > 0) & (slots.steps_done[active] % np.maximum(every, 1) == 0))
        if not len(due):
            return []
        outputs = self._call(self.spec.readout, 0, slots.num_active)
        return self._group(outputs, due, 0, is_finished=False)

    def _group(
        self, outputs: Sequence[torch.Tensor], chosen: NDArray[Any], start: int, *, is_finished: bool
    ) -> list[Readout]:
        """Outputs of a readout call that began at slot `start`, by request, for the chosen slots."""
        finite = self._finite(outputs, start)[chosen - start]
        arrays = {
            tensor.name: output.cpu().numpy()
            for tensor, output in zip(self.spec.outputs, outputs, strict=True)
        }
        readouts = []
        for request, members in self.slots.by_request(chosen):
            of_request = chosen[members]
            rows = Rows(
                indices=self.slots.row[of_request].tolist(),
                outputs={name: array[of_request - start] for name, array in arrays.items()},
            )
            steps_done = self.slots.steps_done[of_request].tolist()
            readouts.append(Readout(request, rows, steps_done, is_finished, bool(finite[members].all())))
        return readouts

    def _finite(self, outputs: Sequence[torch.Tensor], start: int) -> NDArray[np.bool_]:
        """Which rows have finite outputs and no NaN in their state (quantised outputs would hide one)."""
        count = self.slots.num_active - start
        finite = torch.ones(count, dtype=torch.bool, device=self._device)
        for output in outputs:
            if output.is_floating_point():
                finite &= torch.isfinite(output[:count]).reshape(count, -1).all(1)
        for tensor in self.spec.state:
            rows = self.slots.device[tensor.name][start : start + count]
            if rows.is_floating_point():
                finite &= ~torch.isnan(rows).reshape(count, -1).any(1)
        result: NDArray[np.bool_] = finite.cpu().numpy()
        return result

    def _call(self, graph: GraphSpec, start: int, count: int) -> Sequence[torch.Tensor]:
        """Call a graph on the rows from slot `start`; the rows beyond `count` are padding."""
        end = start + self.bucket(count)
        inputs = [
            self._draw(tensor.name, start, count, end)
            if tensor.name in self._noise
            else self.slots.device[tensor.name][start:end]
            for tensor in graph.inputs
        ]
        return self._graphs[graph.name](inputs)

    def _draw(self, name: str, start: int, count: int, end: int) -> torch.Tensor:
        item, slots = self._noise[name], self.slots
        rows = slice(start, start + count)
        drawn = _DRAW[item.distribution](
            slots.seed[rows], slots.row[rows], slots.steps_done[rows], item.stream, item.tensor.shape
        )
        padded = np.zeros((end - start, *item.tensor.shape), np.float32)
        padded[:count] = drawn
        return torch.from_numpy(padded).to(self._device)


def default_inputs(spec: ProgramSpec) -> dict[str, NDArray[Any]]:
    """What stands for the inputs that a request may leave out: one row each, for every row."""
    return {
        item.tensor.name: np.full((1, *item.tensor.shape), item.default, item.tensor.dtype)
        for item in spec.inputs
        if item.optional
    }
