"""A program: init, step and readout over the rows in its slots.

Binds each graph's inputs by name to state, inputs, parameters, noise and the step
counters, and pads every call to a bucket. Knows nothing of queues, time or clients.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.request import Request, Rows
from server.core.spec import GraphSpec, ProgramSpec
from server.execution import noise_buffer
from server.execution.slots import Slots
from server.runtime import Graph, Tensors, bind_graph, device_context, is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")
# Rows of one request by their places in a readout, and whether they are finite.
Group = tuple[Request, NDArray[np.intp] | slice, bool]


@dataclass(frozen=True)
class Readout:
    """Rows of one request that were read out: finished ones, or previews of ones on the way.

    Those that are finite apart from those that are not.
    """

    request: Request
    rows: Rows
    steps_done: Sequence[int]
    is_finished: bool
    is_finite: bool = True


class ProgramRunner:
    """One operation of one model in one format, over up to `buckets[-1]` rows at a time.

    `ahead` draws the random numbers of later steps while the device works; without it they are
    drawn when they are due.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        graphs: Mapping[str, Graph],
        buckets: Sequence[int],
        device: torch.device,
        ahead: Executor | None = None,
    ) -> None:
        self.spec = spec
        self.buckets = tuple(sorted(buckets))
        self.capacity = self.buckets[-1]
        self._graphs = graphs
        self._device = device
        self._ahead = ahead
        self._noise = {item.tensor.name: item for item in spec.noise}
        self._num_shortages = 0
        self.clear()

    def reload(self, graphs: Mapping[str, Graph]) -> None:
        """Go on with graphs that were opened anew, and with empty slots."""
        self._graphs = graphs
        self.clear()

    def clear(self) -> None:
        """Empty the slots; what was in them is gone."""
        spec = self.spec
        self._largest = self.capacity
        read_at_all = {tensor.name for graph in spec.graphs for tensor in graph.inputs}
        kept = (read_at_all | {tensor.name for tensor in spec.state}) - set(self._noise)
        tables = [tensor for name, tensor in spec.tensors().items() if name in kept]
        read = {tensor.name for tensor in spec.step.inputs} if spec.step else set()
        self._step_noise = {
            name: torch.zeros((2 * self.capacity, *item.tensor.shape), device=self._device)
            for name, item in self._noise.items()
            if name in read
        }
        drawn = [self._noise[name] for name in self._step_noise]
        numbers = noise_buffer.NoiseBuffer(drawn, self.capacity, self._ahead, self._device)
        self._copied = torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.slots = Slots(self.capacity, tables, self._device, spec.state, numbers)
        self._steps: dict[tuple[int, int, int], Callable[[], None]] = {}

    def bucket(self, rows: int) -> int:
        """The batch size at which so many rows are called."""
        return self.buckets[bisect_left(self.buckets, rows)]

    def advance(self, width: int = 0) -> list[Readout]:
        """Start the new rows, take one step with all, read out those that are done or due a preview.

        A step is padded to `width` rows at least.
        """
        with device_context(self._device):
            self._start()
            if self.spec.step is not None and self.slots.num_active:
                self._step(self.spec.step, width)
            return self._preview() + self._finish()

    def _start(self) -> None:
        slots = self.slots
        slots.fill()
        start, count = slots.num_started, slots.num_active - slots.num_started
        if count and self.spec.init is not None:
            state = self._call(self.spec.init, start, count)
            for tensor, rows in zip(self.spec.state, state, strict=True):
                slots.device[tensor.name][start : slots.num_active] = rows[:count]
        elif count:
            for tensor in self.spec.state:
                slots.device[tensor.name][start : slots.num_active] = 0
        slots.num_started = slots.num_active

    def _step(self, graph: GraphSpec, width: int) -> None:
        """One step of all active rows, from one side of the state's tables to the other."""
        if self._step_noise:
            self._copy_numbers(self.slots.num_active)
        size = max(width, self.slots.num_active)
        self._in_parts(0, size, lambda start, count: self._bound_step(graph, start, count)())
        self.slots.noise.advance()
        self.slots.count_step()

    def _copy_numbers(self, count: int) -> None:
        """The numbers of a step of so many rows to the device, which may lag behind by one step's copy."""
        if self._copied:
            self._copied.synchronize()
        if self.slots.noise.num_ready < count:
            self.slots.noise.ensure(self.slots.rows(slice(0, count)))
        for name, table in self._step_noise.items():
            numbers = self.slots.noise.numbers(name, count)
            if self._copied:
                table[:count].copy_(torch.from_numpy(numbers), non_blocking=True)
            else:
                table.numpy()[:count] = numbers
        if self._copied:
            self._copied.record()

    def _bound_step(self, graph: GraphSpec, start: int, count: int) -> Callable[[], None]:
        """The step of the rows from slot `start` on; bound once for each bucket and side."""
        key = start, self.bucket(count), self.slots.side
        if (step := self._steps.get(key)) is None:
            step = self._steps[key] = self._bind(graph, start, key[1])
        return step

    def _bind(self, graph: GraphSpec, start: int, bucket: int) -> Callable[[], None]:
        """A step that reads this side of the state's tables and writes the other."""
        part, slots = slice(start, start + bucket), self.slots
        tables = {**slots.device, **self._step_noise}
        return bind_graph(
            self._graphs[graph.name],
            [tables[tensor.name][part] for tensor in graph.inputs],
            [slots.next[tensor.name][part] for tensor in self.spec.state],
        )

    def _preview(self) -> list[Readout]:
        slots = self.slots
        if not slots.has_previews:
            return []
        active = slice(0, slots.num_active)
        every = slots.preview_every[active]
        is_due = (every > 0) & (slots.steps_done[active] % np.maximum(every, 1) == 0)
        return self._read_out(is_due & ~self._done(), is_finished=False)

    def _finish(self) -> list[Readout]:
        if not (self.slots.has_ended or self.spec.steps.done_flag):
            return []
        done = self._done()
        if readouts := self._read_out(done, is_finished=True):
            self.slots.release(self.slots.num_active - int(np.count_nonzero(done)))
        return readouts

    def _done(self) -> NDArray[np.bool_]:
        """Which of the active rows have no step left to take."""
        done = self.slots.ended
        if self.spec.steps.done_flag:
            done |= self.slots.device[self.spec.steps.done_flag].cpu().numpy()[: len(done)]
        return done

    def _read_out(self, chosen: NDArray[np.bool_], *, is_finished: bool) -> list[Readout]:
        """What the chosen ones of the active rows have come to, by request; they are the last ones then."""
        if not np.count_nonzero(chosen):  # in a third of the time of any(), and every step asks
            return []
        start = self.slots.move_to_tail(chosen)
        outputs = self._call(self.spec.readout, start, self.slots.num_active - start)
        return self._group(outputs, start, is_finished)

    def _group(self, outputs: Tensors, start: int, is_finished: bool) -> list[Readout]:
        """Outputs of a readout of the active rows from slot `start` on, by request."""
        arrays = {
            tensor.name: output.cpu().numpy()
            for tensor, output in zip(self.spec.outputs, outputs, strict=True)
        }
        finite = self._finite(arrays, start)
        slots = np.arange(start, self.slots.num_active)
        groups = [(*group, True) for group in self.slots.by_request(slots)]
        if not finite.all():
            groups = list(_split_by_finite(groups, finite))
        steps_done = self.slots.steps_done
        readouts = []
        for request, members, is_finite in groups:
            chosen = slots[members]
            rows = Rows(
                indices=self.slots.row[chosen].tolist(),
                outputs={name: array[members] for name, array in arrays.items()},
            )
            readouts.append(Readout(request, rows, steps_done[chosen].tolist(), is_finished, is_finite))
        return readouts

    def _finite(self, outputs: Mapping[str, NDArray[Any]], start: int) -> NDArray[np.bool_]:
        """Which rows have finite outputs and a finite state (quantised outputs would hide what is wrong)."""
        count = self.slots.num_active - start
        finite = np.ones(count, np.bool_)
        for array in outputs.values():
            if array.dtype.kind == "f":
                finite &= np.isfinite(array[:count]).reshape(count, -1).all(1)
        for tensor in self.spec.state:
            rows = self.slots.device[tensor.name][start : start + count]
            if rows.is_floating_point():
                finite &= torch.isfinite(rows).reshape(count, -1).all(1).cpu().numpy()
        return finite

    def _call(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        """Call a graph on the rows from slot `start`; the rows beyond `count` are padding."""
        parts = self._in_parts(start, count, lambda first, rows: self._call_part(graph, first, rows))
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _call_part(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        end = start + self.bucket(count)
        inputs = [
            self._draw(tensor.name, start, count, end)
            if tensor.name in self._noise
            else self.slots.device[tensor.name][start:end]
            for tensor in graph.inputs
        ]
        return self._graphs[graph.name](inputs)

    def _in_parts(self, start: int, count: int, call: Callable[[int, int], T]) -> list[T]:
        """Call with first slot and number of rows: once, or for smaller batches where memory is short."""
        results, first = list[T](), start
        while first < start + count:
            rows = min(self._largest, start + count - first)
            try:
                results.append(call(first, rows))
            except Exception as error:  # each runtime has its own
                if not is_out_of_memory(error) or not self._shrink(self.bucket(rows)):
                    raise
            else:
                first += rows
        return results

    def _shrink(self, failed: int) -> bool:
        """From now on call with half of a batch that did not fit; False when there is nothing less."""
        largest = max((bucket for bucket in self.buckets if bucket <= failed // 2), default=self.buckets[0])
        if largest >= failed:
            return False
        log.warning("out of memory with batches of %d rows; going on with %d", failed, largest)
        self._largest = largest
        self._steps.clear()
        self._num_shortages += 1
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return True

    def pop_oom_count(self) -> int:
        """How often memory was short since this was last asked."""
        taken, self._num_shortages = self._num_shortages, 0
        return taken

    def _draw(self, name: str, start: int, count: int, end: int) -> torch.Tensor:
        rows = self.slots.rows(slice(start, start + count))
        padded = np.zeros((end - start, *self._noise[name].tensor.shape), np.float32)
        padded[:count] = noise_buffer.draw(self._noise[name], rows)
        return torch.from_numpy(padded).to(self._device)


def _split_by_finite(groups: Iterable[Group], finite: NDArray[np.bool_]) -> Iterator[Group]:
    """Groups of rows of which each is either finite or not."""
    for request, members, _ in groups:
        positions = np.arange(len(finite))[members]
        for is_finite in (True, False):
            alike = positions[finite[positions] == is_finite]
            if len(alike):
                yield request, alike, is_finite
