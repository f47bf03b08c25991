"""Slots: the rows that a program is working on.

Active rows are a dense prefix of every table, so that a step reads and writes slices in place; rows that
leave are swapped to the tail first. Tables that graphs read are on the device; the bookkeeping of rows is
on the host.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.request import Admission, Request
from server.core.spec import NUM_STEPS, STEP_INDEX, TensorSpec
from server.execution.device_operations import CpuOperations, DeviceOperations
from server.execution.noise import ROW, SEED, NoiseKeys, NoiseSource

Array = NDArray[Any]
Mask = NDArray[np.bool_]

_NEVER = 1 << 62


class Slots:
    """Tables of `capacity` slots.

    `tables[name]` is a tensor [2 * capacity, *row shape]: a call that is padded to its bucket may start at
    any active slot. The state's tables exist twice: a step reads `tables` and writes `next_state`, and then
    they are swapped.

    Args:
        capacity: number of slots.
        tensors: tensors that graphs read, without their batch axis.
        operations: copies to the device of the tables.
        state: the tensors among them that a step writes.

    Attributes:
        noise: random numbers, of which some may be drawn ahead and move with their rows.
    """

    noise: NoiseSource | None = None

    def __init__(
        self,
        capacity: int,
        tensors: Iterable[TensorSpec],
        operations: DeviceOperations | None = None,
        state: Iterable[TensorSpec] = (),
    ) -> None:
        self.capacity = capacity
        self.num_active = 0
        self.num_started = 0
        self.has_previews = False
        self._operations = operations or CpuOperations()
        device = self._operations.device
        slots = 2 * capacity
        self.tables = {
            tensor.name: torch.zeros(
                (slots, *tensor.shape), dtype=getattr(torch, tensor.dtype), device=device
            )
            for tensor in tensors
        }
        self.next_state = {tensor.name: torch.zeros_like(self.tables[tensor.name]) for tensor in state}
        index = self.tables.get(STEP_INDEX)
        # On a CPU a NumPy operator takes a tenth of the time of a torch operator.
        self._step_index: Any = index.numpy() if index is not None and device.type == "cpu" else index
        self.side = 0
        self.seed = np.zeros(slots, np.uint64)
        # One table, so that a row is written and moved by one assignment. The end of a row is a value of the
        # step counter that all rows share, so that a step changes nothing here.
        self._columns = np.zeros((slots, 6), np.int64)
        self._owner, self.row, self.num_steps, self.preview_every, self._end, self.number = self._columns.T
        self._num_admitted = 0
        self._step_counter = 0
        self._next_end = _NEVER
        self._requests: dict[int, Request] = {}

    @property
    def requests(self) -> list[Request]:
        """Requests with active rows."""
        return list(self._requests.values())

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Write rows into the free slots after the active ones; all of them, or none if one does not fit."""
        if not admissions:
            return
        requests = [admission.request for admission in admissions]
        counts = [admission.count for admission in admissions]
        end = self.num_active + sum(counts)
        assert end <= self.capacity, "more rows admitted than slots are free. This is a bug."
        new = slice(self.num_active, end)
        self.seed[new] = _repeat([request.seed for request in requests], counts, np.uint64)
        now = self._step_counter
        columns = [
            (
                id(admission.request),
                admission.request.first_row + admission.first,
                admission.request.steps,
                admission.request.preview_every,
                now + admission.request.steps,
                0,
            )
            for admission in admissions
        ]
        self._columns[new] = _repeat(columns, counts, np.int64)
        self.row[new] += _offsets(counts)
        self.number[new] = np.arange(self._num_admitted, self._num_admitted + end - self.num_active)
        self._num_admitted += end - self.num_active
        for name, rows in self._graph_inputs(admissions, counts, new):
            if name in self.tables:
                self._operations.copy(rows, self.tables[name][new])
        self.num_active = end
        self._next_end = min(self._next_end, now + min(request.steps for request in requests))
        self._requests.update((id(request), request) for request in requests)
        self.has_previews |= any(request.preview_every for request in requests)

    def _graph_inputs(
        self, admissions: Sequence[Admission], counts: Sequence[int], new: slice
    ) -> Iterator[tuple[str, Array]]:
        """Yield what graphs and the noise may read of new rows: keys, step counters, parameters, inputs."""
        if SEED in self.tables:
            yield SEED, self.seed[new].view(np.int64)
            yield ROW, self.row[new]
        yield STEP_INDEX, self.steps_done[new]
        yield NUM_STEPS, self.num_steps[new]
        requests = [admission.request for admission in admissions]
        for name in requests[0].parameters:
            yield name, _repeat([request.parameters[name] for request in requests], counts, np.float64)
        for name in requests[0].inputs:
            yield name, np.concatenate([_input_rows(admission, name) for admission in admissions])

    def count_step(self, frozen: torch.Tensor | None = None) -> None:
        """Record that all active rows have taken a step, which wrote `next_state`.

        Args:
            frozen: rows that had ended before and did not change, bool [2 * capacity] on the device.
        """
        for name in self.next_state:
            self.tables[name], self.next_state[name] = self.next_state[name], self.tables[name]
        self.side = 1 - self.side
        self._step_counter += 1
        if self._step_index is None:
            return
        # In place: a copy from the host would wait for the step on a GPU.
        if frozen is None:
            self._step_index[: self.num_active] += 1
        else:
            self.tables[STEP_INDEX][: self.num_active] += ~frozen[: self.num_active]

    @property
    def steps_done(self) -> Array:
        """Steps that the row in each slot has taken, int64 [2 * capacity]."""
        done: Array = self.num_steps - (self._end - self._step_counter)
        return done

    @property
    def has_ended(self) -> bool:
        """Whether an active row has taken all its steps."""
        return self._next_end <= self._step_counter

    @property
    def ended(self) -> Mask:
        """Which active rows have taken all their steps, bool [num_active]."""
        ended: Mask = self._end[: self.num_active] <= self._step_counter
        return ended

    def end_early(self, numbers: Array) -> None:
        """Record that rows have ended, although steps are left; those that left their slots are skipped.

        Args:
            numbers: the `number` of each row, which no other row has.
        """
        rows = np.flatnonzero(np.isin(self.number[: self.num_active], numbers))
        if not len(rows):
            return
        left = np.maximum(self._end[rows] - self._step_counter, 0)
        self._end[rows] -= left
        self.num_steps[rows] -= left
        self._next_end = min(self._next_end, self._step_counter)

    def noise_keys(self, slots: slice) -> NoiseKeys:
        """Return the keys of the random numbers of the rows in some slots."""
        return NoiseKeys(self.seed[slots], self.row[slots], self.steps_done[slots], self.num_steps[slots])

    def move_to_tail(self, leaving: Mask) -> int:
        """Reorder the active rows so that the leaving ones come last.

        Args:
            leaving: which active rows leave, bool [num_active].

        Returns:
            The slot of the first leaving row.
        """
        boundary = self.num_active - int(leaving.sum())
        if not boundary:
            return 0
        holes = np.flatnonzero(leaving[:boundary])
        movers = boundary + np.flatnonzero(~leaving[boundary:])
        if len(holes):
            target, source = np.concatenate([holes, movers]), np.concatenate([movers, holes])
            self.seed[target] = self.seed[source]
            self._columns[target] = self._columns[source]
            self._operations.move_rows(self.tables.values(), target, source)
            if self.noise:
                self.noise.move(target, source)
        return boundary

    def release(self, boundary: int) -> None:
        """Free the slots from `boundary` on."""
        self.num_active = boundary
        self.num_started = min(self.num_started, boundary)
        if self.noise:
            self.noise.truncate(boundary)
        remaining = set(self._owner[:boundary].tolist())
        self._requests = {owner: request for owner, request in self._requests.items() if owner in remaining}
        self.has_previews = any(request.preview_every for request in self._requests.values())
        self._next_end = int(self._end[:boundary].min(initial=_NEVER))

    def drop(self, request: Request) -> int:
        """Free the slots of a request, and return the number of steps that its rows had taken."""
        owned = self._owner[: self.num_active] == id(request)
        steps = int(self.steps_done[: self.num_active][owned].sum())
        self.release(self.move_to_tail(owned))
        return steps

    def empty(self) -> dict[Request, int]:
        """Free every slot without using the device, and return the steps that each request had taken."""
        owner, steps_done = self._owner[: self.num_active], self.steps_done[: self.num_active]
        steps = {request: int(steps_done[owner == id(request)].sum()) for request in self.requests}
        self.release(0)
        return steps

    def group_by_request(self, slots: Array) -> Sequence[tuple[Request, Array | slice]]:
        """Group slots by the request that owns their rows; the groups index `slots`."""
        owners = self._owner[slots]
        if len(self._requests) == 1:  # a slice avoids a copy of large outputs
            return [(self._requests[int(owners[0])], slice(0, len(slots)))]
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order])) + 1
        return [(self._requests[int(owners[group[0]])], group) for group in np.split(order, ends)]


def _repeat(values: Sequence[Any], counts: Sequence[int], dtype: type) -> Array:
    """Repeat a value of each admission for each of its rows."""
    column: Array = np.array(values, dtype)
    return column if max(counts) == 1 else np.repeat(column, counts, axis=0)


def _offsets(counts: Sequence[int]) -> Array | int:
    """Return the position of each row in its admission."""
    return 0 if max(counts) == 1 else np.concatenate([np.arange(count) for count in counts])


def _input_rows(admission: Admission, name: str) -> Array:
    """Return an input's rows for an admission; the input may hold one row for all rows of the request."""
    array: Array = admission.request.inputs[name]
    count = admission.count
    if len(array) == count:
        return array
    if len(array) == 1:
        return np.broadcast_to(array, (count, *array.shape[1:]))
    return array[admission.first : admission.first + count]
