"""Runner of one program: init, step and readout over the rows in its slots.

Binds each graph's inputs by name to state, inputs, parameters, noise and the step counters, and pads every
call to a bucket. Knows nothing of queues, time or callers.
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

from server.core.request import Admission, Request, Rows
from server.core.spec import GraphSpec, ProgramSpec
from server.execution import noise_buffer
from server.execution.slots import Slots
from server.runtime import Graph, Tensors, bind_graph, device_context, is_out_of_memory

log = logging.getLogger(__name__)

T = TypeVar("T")
# Rows of one request by their positions in a readout, and whether they are finite.
Group = tuple[Request, NDArray[np.intp] | slice, bool]


@dataclass(frozen=True)
class Readout:
    """Rows of one request that were read out: finished rows, or previews of unfinished ones.

    Finite and non-finite rows of a request are in separate readouts.
    """

    request: Request
    rows: Rows
    steps_done: Sequence[int]
    is_finished: bool
    is_finite: bool = True


@dataclass(frozen=True)
class StepResult:
    """Result of a step: its readouts, and what it cost.

    Attributes:
        readouts: rows that were read out.
        rows: rows that took part.
        bucket: batch size of the call, padding included.
        num_oom: batches that did not fit into memory and were split.
    """

    readouts: list[Readout]
    rows: int
    bucket: int
    num_oom: int = 0


class ProgramRunner:
    """One operation of one model in one format, over up to `buckets[-1]` rows at a time.

    Args:
        spec: the program.
        graphs: its graphs by name.
        buckets: batch sizes at which graphs are called.
        device: device of the tables and graphs.
        prefetch_executor: draws random numbers of later steps while the device works; without it they are
            drawn when needed.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        graphs: Mapping[str, Graph],
        buckets: Sequence[int],
        device: torch.device,
        prefetch_executor: Executor | None = None,
    ) -> None:
        self.spec = spec
        self.buckets = tuple(sorted(buckets))
        self.capacity = self.buckets[-1]
        self._graphs = graphs
        self._device = device
        self._device_context = device_context(device)
        self._prefetch_executor = prefetch_executor
        self._noise = {item.tensor.name: item for item in spec.noise}
        self.clear()

    @property
    def num_active(self) -> int:
        """Rows in slots."""
        return self.slots.num_active

    @property
    def requests(self) -> list[Request]:
        """Requests with rows in slots."""
        return self.slots.requests

    def reload(self, graphs: Mapping[str, Graph]) -> None:
        """Continue with graphs that were opened again, and with empty slots."""
        self._graphs = graphs
        self.clear()

    def clear(self) -> None:
        """Allocate empty slots; rows in the old ones are lost."""
        spec = self.spec
        self._max_batch = self.capacity
        self._num_oom = 0
        graph_inputs = {tensor.name for graph in spec.graphs for tensor in graph.inputs}
        table_names = (graph_inputs | {tensor.name for tensor in spec.state}) - set(self._noise)
        tables = [tensor for name, tensor in spec.tensors().items() if name in table_names]
        step_inputs = {tensor.name for tensor in spec.step.inputs} if spec.step else set()
        self._step_noise = {
            name: torch.zeros((2 * self.capacity, *item.tensor.shape), device=self._device)
            for name, item in self._noise.items()
            if name in step_inputs
        }
        noise = noise_buffer.NoiseBuffer(
            [self._noise[name] for name in self._step_noise],
            self.capacity,
            self._prefetch_executor,
            self._device,
        )
        self._noise_copied = (
            torch.cuda.Event() if self._device.type == "cuda" else None  # type: ignore[no-untyped-call]
        )
        self.slots = Slots(self.capacity, tables, self._device, spec.state, noise)
        self._bound_steps: dict[tuple[int, int, int], Callable[[], None]] = {}

    def bucket(self, rows: int) -> int:
        """Return the batch size at which `rows` rows are called."""
        return self.buckets[bisect_left(self.buckets, rows)]

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Put rows into free slots; they start with the next step."""
        self.slots.admit(admissions)

    def drop(self, request: Request) -> int:
        """Free the slots of a request, and return the number of steps that its rows had taken."""
        return self.slots.drop(request)

    def empty(self) -> dict[Request, int]:
        """Free every slot without using the device, and return the steps that each request had taken."""
        return self.slots.empty()

    def batch_rows(self) -> int:
        """Return the number of rows of the next step, before padding to a bucket."""
        return self.slots.num_active

    def advance(self) -> StepResult:
        """Start new rows, take one step with all rows, and read out those that end or are due a preview."""
        rows, batch_rows = self.slots.num_active, self.batch_rows()
        with self._device_context:
            self._start()
            if self.spec.step is not None and rows:
                self._step(self.spec.step, batch_rows)
            readouts = self._read_previews() + self._read_finished()
        num_oom, self._num_oom = self._num_oom, 0
        return StepResult(readouts, rows, self.bucket(batch_rows), num_oom)

    def _start(self) -> None:
        """Compute the initial state of the rows that have not started."""
        slots = self.slots
        start, count = slots.num_started, slots.num_active - slots.num_started
        if count and self.spec.init is not None:
            state = self._call(self.spec.init, start, count)
            for tensor, rows in zip(self.spec.state, state, strict=True):
                slots.tables[tensor.name][start : slots.num_active] = rows[:count]
        elif count:
            for tensor in self.spec.state:
                slots.tables[tensor.name][start : slots.num_active] = 0
        slots.num_started = slots.num_active

    def _step(self, graph: GraphSpec, batch_rows: int) -> None:
        """Take one step of all active rows, from one set of state tables to the other."""
        if self._step_noise:
            self._copy_noise(self.slots.num_active)
        self._call_in_parts(0, batch_rows, lambda start, count: self._bound_step(graph, start, count)())
        self.slots.noise.advance()
        self.slots.count_step()

    def _copy_noise(self, count: int) -> None:
        """Copy the numbers of the current step to the device, asynchronously on a GPU."""
        if self._noise_copied:
            self._noise_copied.synchronize()
        noise = self.slots.noise
        if noise.num_ready < count:
            noise.ensure(self.slots.noise_keys(slice(0, count)))
        for name, table in self._step_noise.items():
            numbers = noise.numbers(name, count)
            if self._noise_copied:
                table[:count].copy_(torch.from_numpy(numbers), non_blocking=True)
            else:
                table.numpy()[:count] = numbers
        if self._noise_copied:
            self._noise_copied.record()

    def _bound_step(self, graph: GraphSpec, start: int, count: int) -> Callable[[], None]:
        """Return the step of `count` rows from slot `start`, bound once for each bucket and side."""
        key = start, self.bucket(count), self.slots.side
        if (step := self._bound_steps.get(key)) is None:
            step = self._bound_steps[key] = self._bind_step(graph, start, key[1])
        return step

    def _bind_step(self, graph: GraphSpec, start: int, bucket: int) -> Callable[[], None]:
        part, slots = slice(start, start + bucket), self.slots
        tables = {**slots.tables, **self._step_noise}
        return bind_graph(
            self._graphs[graph.name],
            [tables[tensor.name][part] for tensor in graph.inputs],
            [slots.next_state[tensor.name][part] for tensor in self.spec.state],
        )

    def _read_previews(self) -> list[Readout]:
        slots = self.slots
        if not slots.has_previews:
            return []
        active = slice(0, slots.num_active)
        every = slots.preview_every[active]
        is_due = (every > 0) & (slots.steps_done[active] % np.maximum(every, 1) == 0)
        return self._read_out(is_due & ~self._done(), is_finished=False)

    def _read_finished(self) -> list[Readout]:
        if not (self.slots.has_ended or self.spec.steps.done_flag):
            return []
        done = self._done()
        if readouts := self._read_out(done, is_finished=True):
            self.slots.release(self.slots.num_active - int(np.count_nonzero(done)))
        return readouts

    def _done(self) -> NDArray[np.bool_]:
        """Return which active rows are done, bool [num_active]."""
        done = self.slots.ended
        if self.spec.steps.done_flag:
            done |= self.slots.tables[self.spec.steps.done_flag].cpu().numpy()[: len(done)]
        return done

    def _read_out(self, selected: NDArray[np.bool_], *, is_finished: bool) -> list[Readout]:
        """Read out the selected active rows, by request; afterwards they are the last active rows."""
        if not np.count_nonzero(selected):  # takes a third of the time of any(), at every step
            return []
        start = self.slots.move_to_tail(selected)
        outputs = self._call(self.spec.readout, start, self.slots.num_active - start)
        return self._group(outputs, start, is_finished)

    def _group(self, outputs: Tensors, start: int, is_finished: bool) -> list[Readout]:
        """Group the outputs of the active rows from slot `start` by request."""
        arrays = {
            tensor.name: output.cpu().numpy()
            for tensor, output in zip(self.spec.outputs, outputs, strict=True)
        }
        is_finite = self._finite(arrays, start)
        slots = np.arange(start, self.slots.num_active)
        groups = [(*group, True) for group in self.slots.group_by_request(slots)]
        if not is_finite.all():
            groups = list(_split_by_finite(groups, is_finite))
        steps_done = self.slots.steps_done
        readouts = []
        for request, members, are_finite in groups:
            selected = slots[members]
            rows = Rows(
                indices=self.slots.row[selected].tolist(),
                outputs={name: array[members] for name, array in arrays.items()},
            )
            readouts.append(Readout(request, rows, steps_done[selected].tolist(), is_finished, are_finite))
        return readouts

    def _finite(self, outputs: Mapping[str, NDArray[Any]], start: int) -> NDArray[np.bool_]:
        """Return which rows have finite outputs and state: quantized outputs hide a non-finite state."""
        count = self.slots.num_active - start
        is_finite = np.ones(count, np.bool_)
        for array in outputs.values():
            if array.dtype.kind == "f":
                is_finite &= np.isfinite(array[:count]).reshape(count, -1).all(1)
        for tensor in self.spec.state:
            rows = self.slots.tables[tensor.name][start : start + count]
            if rows.is_floating_point():
                is_finite &= torch.isfinite(rows).reshape(count, -1).all(1).cpu().numpy()
        return is_finite

    def _call(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        """Call a graph on `count` rows from slot `start`; outputs beyond them are padding."""
        parts = self._call_in_parts(start, count, lambda first, rows: self._call_part(graph, first, rows))
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _call_part(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        end = start + self.bucket(count)
        inputs = [
            self._draw(tensor.name, start, count, end)
            if tensor.name in self._noise
            else self.slots.tables[tensor.name][start:end]
            for tensor in graph.inputs
        ]
        return self._graphs[graph.name](inputs)

    def _draw(self, name: str, start: int, count: int, end: int) -> torch.Tensor:
        keys = self.slots.noise_keys(slice(start, start + count))
        padded = np.zeros((end - start, *self._noise[name].tensor.shape), np.float32)
        padded[:count] = noise_buffer.draw(self._noise[name], keys)
        return torch.from_numpy(padded).to(self._device)

    def _call_in_parts(self, start: int, count: int, call: Callable[[int, int], T]) -> list[T]:
        """Call with first slot and number of rows: once, or in smaller batches when memory is short."""
        results, first = list[T](), start
        while first < start + count:
            rows = min(self._max_batch, start + count - first)
            try:
                results.append(call(first, rows))
            except Exception as error:  # every runtime has its own exceptions
                if not is_out_of_memory(error) or not self._shrink(self.bucket(rows)):
                    raise
            else:
                first += rows
        return results

    def _shrink(self, failed: int) -> bool:
        """Halve the batch size after one that did not fit into memory; return False at the smallest."""
        largest = max((bucket for bucket in self.buckets if bucket <= failed // 2), default=self.buckets[0])
        if largest >= failed:
            return False
        log.warning("out of memory at batch size %d; continuing with batch size %d", failed, largest)
        self._max_batch = largest
        self._bound_steps.clear()
        self._num_oom += 1
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def _split_by_finite(groups: Iterable[Group], is_finite: NDArray[np.bool_]) -> Iterator[Group]:
    for request, members, _ in groups:
        positions = np.arange(len(is_finite))[members]
        for are_finite in (True, False):
            selected = positions[is_finite[positions] == are_finite]
            if len(selected):
                yield request, selected, are_finite
