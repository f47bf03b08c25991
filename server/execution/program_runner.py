"""Runner of one program: init, step and readout over the rows in its slots.

Binds each graph's inputs by name to state, inputs, parameters, noise and the step counters, and pads every
call to a bucket. Knows nothing of queues, time or callers.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.request import Admission, Request
from server.core.spec import GraphSpec, ProgramSpec, TensorSpec
from server.execution.device_operations import Arrays, DeviceOperations, operations_of
from server.execution.noise import KEY_TABLES, NoiseSource
from server.execution.noise.device import DeviceNoise
from server.execution.noise.host import HostNoise
from server.execution.readout import Finished, PendingReadout, Readout, StepResult
from server.execution.slots import Slots
from server.runtime import Device, Graph, Tensors, bind_graph, is_out_of_memory
from server.runtime.cuda_graph import NotCapturable, capture

log = logging.getLogger(__name__)

T = TypeVar("T")
Mask = NDArray[np.bool_]


class ProgramRunner:
    """One operation of one model in one format, over up to `buckets[-1]` rows at a time.

    On a GPU no call waits for the device: a step's work is queued on its stream, and `StepResult.wait` waits.

    Args:
        spec: the program.
        graphs: its graphs by name.
        buckets: batch sizes at which graphs are called.
        device: device of the tables and graphs.
        prefetch_executor: draws random numbers of later steps while the device works; without it they are
            drawn when needed.
        operations: operations of the device (default: those of `device`).
    """

    def __init__(
        self,
        spec: ProgramSpec,
        graphs: Mapping[str, Graph],
        buckets: Sequence[int],
        device: Device,
        prefetch_executor: Executor | None = None,
        operations: DeviceOperations | None = None,
    ) -> None:
        self.spec = spec
        self.buckets = tuple(sorted(buckets))
        self.capacity = self.buckets[-1]
        self._graphs = graphs
        self._device = device
        self._prefetch_executor = prefetch_executor
        self._operations = operations or operations_of(device.torch)
        noise = {item.tensor.name for item in spec.noise}
        self._noise_names = {
            graph.name: [tensor.name for tensor in graph.inputs if tensor.name in noise]
            for graph in spec.graphs
        }
        self.uses_cuda_graphs = device.is_cuda and device.cuda_graphs
        # The host reads a done flag after each step, or one step later while an asynchronous device works on.
        is_async = self._operations.is_async
        self._done_flag = "" if is_async else spec.steps.done_flag
        self._late_done_flag = spec.steps.done_flag if is_async else ""
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
        self._max_batch = self.capacity
        self._num_oom = 0
        self._bound: dict[tuple[str, int, int, int], Callable[[], None]] = {}
        draw = self._operations.noise_kernel
        self.slots = Slots(
            self.capacity, self._table_specs(draw is not None), self._operations, self.spec.state
        )
        self._noise: NoiseSource = (
            DeviceNoise(self.spec.noise, self.slots.tables, draw) if draw else self._new_host_noise()
        )
        self.slots.noise = self._noise
        # Only a readout that always starts at slot 0 is bound to memory.
        bound_outputs = () if self.spec.step else self.spec.outputs
        self._outputs = {
            tensor.name: torch.zeros(
                (2 * self.capacity, *tensor.shape),
                dtype=getattr(torch, tensor.dtype),
                device=self._device.torch,
            )
            for tensor in bound_outputs
            if self.uses_cuda_graphs
        }

    def _table_specs(self, has_keys: bool) -> list[TensorSpec]:
        """Return the tensors that graphs read, except noise, and the keys of noise drawn on the device."""
        spec = self.spec
        names = {tensor.name for graph in spec.graphs for tensor in graph.inputs}
        names |= {tensor.name for tensor in spec.state}
        names -= {item.tensor.name for item in spec.noise}
        tables = {name: tensor for name, tensor in spec.tensors().items() if name in names}
        if has_keys:
            tables |= {tensor.name: tensor for tensor in KEY_TABLES}
        return list(tables.values())

    def _new_host_noise(self) -> HostNoise:
        step = self.spec.step
        return HostNoise(
            self.spec.noise,
            self._noise_names[step.name] if step else [],
            self.capacity,
            self.slots.noise_keys,
            self._operations,
            self._prefetch_executor,
        )

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

    def use_cuda_graphs(self, uses: bool) -> None:
        """Capture steps as CUDA graphs from now on, or launch their kernels one by one."""
        self.uses_cuda_graphs = uses
        self.clear()

    def batch_rows(self) -> int:
        """Return the number of rows of the next step, before padding to a bucket."""
        return self.slots.num_active

    def advance(self, max_steps: int = 1) -> StepResult:
        """Start new rows, take steps with all rows, and read out those that end or are due a preview.

        It takes `max_steps` steps, or fewer when a row ends or may end.
        """
        rows, batch_rows = self.slots.num_active, self.batch_rows()
        timer = self._operations.start_timer()
        self._start()
        ended_early, steps = None, 1
        if self.spec.step is not None and rows:
            steps = self._take_steps(self.spec.step, batch_rows, max_steps)
            ended_early = self._read_done_flags()
        pending = self._read_previews() + self._read_finished()
        timer.stop()
        num_oom, self._num_oom = self._num_oom, 0
        finished: dict[Request, Finished] = {}
        for readout in pending:
            finished |= readout.finished()

        def wait() -> list[Readout]:
            timer.wait()
            if ended_early:
                ended_early()
            return [rows for readout in pending for rows in readout.wait()]

        return StepResult(rows, self.bucket(batch_rows), finished, wait, timer.wait, num_oom, steps)

    def _take_steps(self, graph: GraphSpec, batch_rows: int, max_steps: int) -> int:
        """Take steps until a row ends or may end; return their number."""
        may_end_early = bool(self._done_flag) or self.slots.has_previews
        for taken in range(1, max_steps + 1):
            self._step(graph, batch_rows)
            if may_end_early or self.slots.has_ended:
                return taken
        return max_steps

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
        self._noise.prepare_step(self.slots.num_active)
        self._call_in_parts(0, batch_rows, lambda start, count: self._bound_call(graph, start, count)())
        self._noise.advance()
        self.slots.count_step(self._frozen_rows())

    def _frozen_rows(self) -> torch.Tensor | None:
        """Return which rows are done and yet take further steps, bool [2 * capacity] on the device."""
        return self.slots.tables[self._late_done_flag] if self._late_done_flag else None

    def _read_done_flags(self) -> Callable[[], None] | None:
        """Start to read the done flags; return a function that waits for them and ends the rows."""
        if (flags := self._frozen_rows()) is None:
            return None
        slots = self.slots
        numbers = slots.number[: slots.num_active].copy()
        arrays = self._operations.to_host([flags[: slots.num_active].clone()])
        return lambda: slots.end_early(numbers[arrays()[0]])

    def _bound_call(self, graph: GraphSpec, start: int, count: int) -> Callable[[], None]:
        """Return the call for `count` rows from slot `start`, bound once for each bucket and side."""
        key = graph.name, start, self.bucket(count), self.slots.side
        if (call := self._bound.get(key)) is None:
            call = self._bound[key] = self._bind(graph, slice(start, start + key[2]))
        return call

    def _bind(self, graph: GraphSpec, part: slice) -> Callable[[], None]:
        """Bind the step, or the readout of a program without steps, to the tables."""
        slots, is_step = self.slots, graph is self.spec.step
        targets = slots.next_state if is_step else self._outputs
        tensors = self.spec.state if is_step else self.spec.outputs
        outputs = [targets[tensor.name][part] for tensor in tensors]
        call = bind_graph(self._graphs[graph.name], self._inputs(graph, part), outputs)
        calls = [self._noise.launcher(self._noise_names[graph.name], part), call]
        if is_step and (frozen := self._frozen_rows()) is not None:
            old_state = [slots.tables[tensor.name][part] for tensor in tensors]
            calls.append(partial(_keep_rows, frozen[part], old_state, outputs))
        return self._capture(graph, _in_sequence([call for call in calls if call]), outputs)

    def _capture(self, graph: GraphSpec, call: Callable[[], None], outputs: Tensors) -> Callable[[], None]:
        if not self.uses_cuda_graphs:
            return call
        try:
            return capture(call, outputs)
        except NotCapturable as error:
            log.warning("%s runs kernel by kernel, not as a CUDA graph: %s", graph.name, error)
            self.uses_cuda_graphs = False
            return call

    def _inputs(self, graph: GraphSpec, part: slice) -> Tensors:
        tables = {**self.slots.tables, **self._noise.tables}
        return [tables[tensor.name][part] for tensor in graph.inputs]

    def _read_previews(self) -> list[PendingReadout]:
        slots = self.slots
        if not slots.has_previews:
            return []
        active = slice(0, slots.num_active)
        every = slots.preview_every[active]
        is_due = (every > 0) & (slots.steps_done[active] % np.maximum(every, 1) == 0)
        return self._read_out(is_due & ~self._done(), is_finished=False)

    def _read_finished(self) -> list[PendingReadout]:
        if not (self.slots.has_ended or self._done_flag):
            return []
        done = self._done()
        if readouts := self._read_out(done, is_finished=True):
            self.slots.release(self.slots.num_active - int(np.count_nonzero(done)))
        return readouts

    def _done(self) -> Mask:
        """Return which active rows are done, as far as the host knows, bool [num_active]."""
        done = self.slots.ended
        if self._done_flag:
            done |= self.slots.tables[self._done_flag].numpy()[: len(done)]
        return done

    def _read_out(self, selected: Mask, *, is_finished: bool) -> list[PendingReadout]:
        """Read out the selected active rows, by request; afterwards they are the last active rows."""
        if not np.count_nonzero(selected):  # takes a third of the time of any(), at every step
            return []
        start = self.slots.move_to_tail(selected)
        part = slice(start, self.slots.num_active)
        count = self.slots.num_active - start
        outputs = self._call(self.spec.readout, start, count)
        readout = PendingReadout(
            self.slots.group_by_request(np.arange(start, self.slots.num_active)),
            self.slots.row[part].copy(),
            self.slots.steps_done[part],
            [tensor.name for tensor in self.spec.outputs],
            self._to_host(outputs, part),
            is_finished,
        )
        return [readout]

    def _to_host(self, outputs: Tensors, part: slice) -> Arrays:
        """Start to copy the outputs of rows, and whether their state is finite."""
        count = part.stop - part.start
        is_finite = torch.ones(count, dtype=torch.bool, device=self._device.torch)
        for tensor in self.spec.state:
            rows = self.slots.tables[tensor.name][part]
            if rows.is_floating_point():
                is_finite &= torch.isfinite(rows).reshape(count, -1).all(1)
        return self._operations.to_host([*(output[:count] for output in outputs), is_finite])

    def _call(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        """Call a graph on `count` rows from slot `start`; outputs beyond them are padding."""
        parts = self._call_in_parts(start, count, lambda first, rows: self._call_part(graph, first, rows))
        return parts[0] if len(parts) == 1 else [torch.cat(outputs) for outputs in zip(*parts, strict=True)]

    def _call_part(self, graph: GraphSpec, start: int, count: int) -> Tensors:
        names = self._noise_names[graph.name]
        self._noise.prepare_call(names, start, count)
        if graph is self.spec.readout and self._outputs and start == 0:
            self._bound_call(graph, start, count)()
            # Copied: the next call overwrites the outputs while these may be on their way to the host.
            return [self._outputs[tensor.name][:count].clone() for tensor in self.spec.outputs]
        part = slice(start, start + self.bucket(count))
        if launch := self._noise.launcher(names, part):
            launch()
        return self._graphs[graph.name](self._inputs(graph, part))

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
        self._bound.clear()
        self._num_oom += 1
        if self._device.is_cuda:
            torch.cuda.empty_cache()
        return True


def _keep_rows(is_kept: torch.Tensor, old_state: Tensors, new_state: Tensors) -> None:
    """Keep the old state, [B, *row shape], in some rows, bool [B]."""
    for old, new in zip(old_state, new_state, strict=True):
        torch.where(is_kept.view(-1, *(1 for _ in new.shape[1:])), old, new, out=new)


def _in_sequence(calls: Sequence[Callable[[], None]]) -> Callable[[], None]:
    if len(calls) == 1:
        return calls[0]

    def call_all() -> None:
        for call in calls:
            call()

    return call_all
