"""The rows that a program is working on, in slots.

Active rows are a dense prefix of every table, so that a step reads and writes
slices in place; rows that leave are swapped to the tail. Tables that graphs read
lie on the device; what decides a row's fate lies on the host.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.core.request import Request
from server.core.spec import NUM_STEPS, STEP_INDEX, TensorSpec
from server.execution.noise_buffer import NoiseBuffer, Rows

Array = NDArray[Any]
Mask = NDArray[np.bool_]

_NEVER = 1 << 62


class Slots:
    """Tables of `capacity` rows: `device[name]` is a tensor [2 x capacity, *row shape].

    The tables are twice as long as the capacity because a call that is padded to
    its bucket may start at any active slot. The state's tables exist twice: a step
    reads `device` and writes `next`, and then they change places.
    """

    def __init__(
        self,
        capacity: int,
        tensors: Iterable[TensorSpec],
        device: torch.device,
        state: Iterable[TensorSpec] = (),
        tape: NoiseBuffer | None = None,
    ) -> None:
        self.capacity = capacity
        self.noise = tape or NoiseBuffer((), capacity)
        self.num_active = 0
        self.num_started = 0
        self.has_previews = False
        self._is_cpu = device.type == "cpu"
        slots = 2 * capacity
        self.device = {
            tensor.name: torch.zeros(
                (slots, *tensor.shape), dtype=getattr(torch, tensor.dtype), device=device
            )
            for tensor in tensors
        }
        self.next = {tensor.name: torch.zeros_like(self.device[tensor.name]) for tensor in state}
        index = self.device.get(STEP_INDEX)
        # On a CPU by numpy, of which a call takes a tenth of one of torch's.
        self._step_index: Any = index.numpy() if index is not None and self._is_cpu else index
        self.side = 0
        self.seed = np.zeros(slots, np.uint64)
        # One table, so that rows are written and moved in one go; its columns by name. When a row ends is
        # counted in steps taken by whatever rows, so that a step changes nothing here.
        self._facts = np.zeros((slots, 5), np.int64)
        self._owner, self.row, self.num_steps, self.preview_every, self._ends = self._facts.T
        self._num_taken = 0
        self._next_end = _NEVER
        self._requests: dict[int, Request] = {}
        self._arriving: list[tuple[Request, int, int]] = []

    @property
    def requests(self) -> list[Request]:
        """The requests that have active rows."""
        return list(self._requests.values())

    def admit(self, request: Request, first: int, count: int) -> None:
        """Rows first .. first + count of a request take free slots after the active ones.

        What the rows are is written by `fill`, for all arrivals at once.
        """
        self.num_active += count
        assert self.num_active <= self.capacity, "more rows admitted than there are slots. This is a bug."
        self._requests[id(request)] = request
        self.has_previews |= request.preview_every > 0
        self._arriving.append((request, first, count))

    def fill(self) -> None:
        """Write the rows that were admitted since this was last done into their slots."""
        if not self._arriving:
            return
        arriving, self._arriving = self._arriving, []
        requests, counts = [request for request, _, _ in arriving], [count for _, _, count in arriving]
        new = slice(self.num_active - sum(counts), self.num_active)
        self.seed[new] = _column([request.seed for request in requests], counts, np.uint64)
        now = self._num_taken
        facts = [
            (id(each), each.first_row + first, each.steps, each.preview_every, now + each.steps)
            for each, first, _ in arriving
        ]
        self._facts[new] = _column(facts, counts, np.int64)
        self._next_end = min(self._next_end, now + min(request.steps for request in requests))
        self.row[new] += _offsets(counts)
        for name, column in self._columns(requests, arriving, new):
            if name in self.device:
                self._put(name, new, column)

    def _columns(
        self, requests: Sequence[Request], arriving: Sequence[tuple[Request, int, int]], new: slice
    ) -> Iterator[tuple[str, Array]]:
        """What graphs may read of new rows: the step counters, parameters and inputs."""
        yield STEP_INDEX, self.steps_done[new]
        yield NUM_STEPS, self.num_steps[new]
        counts = [count for _, _, count in arriving]
        for name in requests[0].inputs.parameters:
            yield name, _column([request.inputs.parameters[name] for request in requests], counts, np.float64)
        for name in requests[0].inputs.inputs:
            rows = [
                _slice_rows(request.inputs.inputs[name], first, count) for request, first, count in arriving
            ]
            yield name, np.concatenate(rows)

    def count_step(self) -> None:
        """All active rows have taken one more step, whose state is in `next`."""
        for name in self.next:
            self.device[name], self.next[name] = self.next[name], self.device[name]
        self.side = 1 - self.side
        self._num_taken += 1
        if self._step_index is not None:
            # In place, and on a GPU without a copy from the host, which would wait for the step.
            self._step_index[: self.num_active] += 1

    @property
    def steps_done(self) -> Array:
        """Steps that each slot's row has taken."""
        ahead = self._ends - self._num_taken
        done: Array = self.num_steps - ahead
        return done

    @property
    def has_ended(self) -> bool:
        """Whether an active row has taken all its steps."""
        return self._next_end <= self._num_taken

    @property
    def ended(self) -> Mask:
        """Which of the active rows have taken all their steps."""
        ended: Mask = self._ends[: self.num_active] <= self._num_taken
        return ended

    def rows(self, slots: slice) -> Rows:
        """Whose numbers the rows in some slots draw."""
        return Rows(self.seed[slots], self.row[slots], self.steps_done[slots], self.num_steps[slots])

    def move_to_tail(self, leaving: Mask) -> int:
        """Reorder the active rows so that the leaving ones come last; returns the first one's slot.

        Args:
            leaving: which of the active rows leave, [num_active].
        """
        boundary = self.num_active - int(leaving.sum())
        if not boundary:
            return 0
        holes = np.flatnonzero(leaving[:boundary])
        movers = boundary + np.flatnonzero(~leaving[boundary:])
        if len(holes):
            to, source = np.concatenate([holes, movers]), np.concatenate([movers, holes])
            self.seed[to] = self.seed[source]
            self._facts[to] = self._facts[source]
            self._move(to, source)
            self.noise.move(to, source)
        return boundary

    def _put(self, name: str, slots: slice, rows: Array) -> None:
        """Write rows into a table."""
        if self._is_cpu:
            self.device[name].numpy()[slots] = rows
        else:
            self.device[name][slots] = torch.from_numpy(np.ascontiguousarray(rows))

    def _move(self, to: Array, source: Array) -> None:
        """Copy rows of every table over others."""
        for table in self.device.values():
            if self._is_cpu:
                rows = table.numpy()
                rows[to] = rows[source]
            else:
                table[torch.from_numpy(to)] = table[torch.from_numpy(source)]

    def release(self, boundary: int) -> None:
        """Free the slots from `boundary` on."""
        self.num_active = self.num_started = boundary
        self.noise.truncate(boundary)
        staying = set(self._owner[:boundary].tolist())
        self._requests = {owner: request for owner, request in self._requests.items() if owner in staying}
        self.has_previews = any(request.preview_every for request in self._requests.values())
        self._next_end = int(self._ends[:boundary].min(initial=_NEVER))

    def drop(self, request: Request) -> int:
        """Free the slots of one request; returns how many steps its rows had taken."""
        self.fill()
        mine = self._owner[: self.num_active] == id(request)
        steps = int(self.steps_done[: self.num_active][mine].sum())
        self.release(self.move_to_tail(mine))
        return steps

    def empty(self) -> dict[Request, int]:
        """Free every slot without the device's help; returns how many steps each request's rows had taken."""
        written = self.num_active - sum(count for _, _, count in self._arriving)
        owner, steps_done = self._owner[:written], self.steps_done[:written]
        steps = {request: int(steps_done[owner == id(request)].sum()) for request in self.requests}
        self._arriving.clear()
        self.release(0)
        return steps

    def by_request(self, slots: Array) -> Sequence[tuple[Request, Array | slice]]:
        """Group slots by the request that owns their rows: positions within `slots`."""
        owners = self._owner[slots]
        if len(self._requests) == 1:  # a slice spares copies of what is large
            return [(self._requests[int(owners[0])], slice(0, len(slots)))]
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order])) + 1
        return [(self._requests[int(owners[group[0]])], group) for group in np.split(order, ends)]


def _column(values: Sequence[Any], counts: Sequence[int], dtype: type) -> Array:
    """What is said of each request, for each of its rows."""
    column: Array = np.array(values, dtype)
    return column if max(counts) == 1 else np.repeat(column, counts, axis=0)


def _offsets(counts: Sequence[int]) -> Array | int:
    """The place of each row in its request's part of the arrivals."""
    return 0 if max(counts) == 1 else np.concatenate([np.arange(count) for count in counts])


def _slice_rows(array: Array, first: int, count: int) -> Array:
    """The rows of an input that is given for every row, or once for all."""
    if len(array) == count:
        return array
    if len(array) == 1:
        return np.broadcast_to(array, (count, *array.shape[1:]))
    return array[first : first + count]
