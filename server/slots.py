"""The rows that a program is working on, in slots.

Active rows are a dense prefix of every table, so that a step reads and writes
slices in place; rows that leave are swapped to the tail. Tables that graphs read
lie on the device; what decides a row's fate lies on the host.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.request import Request
from server.spec import NUM_STEPS, STEP_INDEX, TensorSpec
from server.tape import Rows, Tape

Mask = NDArray[np.bool_]


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
        tape: Tape | None = None,
    ) -> None:
        self.capacity = capacity
        self.tape = tape or Tape((), capacity)
        self.num_active = 0
        self.num_started = 0
        slots = 2 * capacity
        self.device = {
            tensor.name: torch.zeros(
                (slots, *tensor.shape), dtype=getattr(torch, tensor.dtype), device=device
            )
            for tensor in tensors
        }
        self.next = {tensor.name: torch.zeros_like(self.device[tensor.name]) for tensor in state}
        self.side = 0
        self.seed = np.zeros(slots, np.uint64)
        self.row = np.zeros(slots, np.int64)
        self.steps_done = np.zeros(slots, np.int64)
        self.num_steps = np.zeros(slots, np.int64)
        self.preview_every = np.zeros(slots, np.int64)
        self._owner = np.zeros(slots, np.int64)
        self._requests: dict[int, Request] = {}

    @property
    def requests(self) -> list[Request]:
        """The requests that have active rows."""
        return list(self._requests.values())

    def admit(self, request: Request, first: int, count: int) -> None:
        """Rows first .. first + count of a request take free slots after the active ones."""
        start, end = self.num_active, self.num_active + count
        assert end <= self.capacity, "more rows admitted than there are slots. This is a bug."
        self._requests[id(request)] = request
        new = slice(start, end)
        self._owner[new] = id(request)
        self.seed[new] = request.seed
        self.row[new] = request.first_row + np.arange(first, first + count)
        self.steps_done[new] = 0
        self.num_steps[new] = request.steps
        self.preview_every[new] = request.preview_every
        self.device[STEP_INDEX][new] = 0
        self.device[NUM_STEPS][new] = request.steps
        for name, value in request.work.parameters.items():
            self.device[name][new] = value
        for name, array in request.work.inputs.items():
            rows = array if len(array) == 1 else array[first : first + count]
            self.device[name][new] = torch.tensor(rows, device=self.device[name].device)
        self.num_active = end

    def count_step(self) -> None:
        """All active rows have taken one more step, whose state is in `next`."""
        for name in self.next:
            self.device[name], self.next[name] = self.next[name], self.device[name]
        self.side = 1 - self.side
        self.steps_done[: self.num_active] += 1
        self.device[STEP_INDEX][: self.num_active] += 1

    @property
    def rows(self) -> Rows:
        """Whose numbers the active rows draw."""
        active = slice(0, self.num_active)
        return Rows(self.seed[active], self.row[active], self.steps_done[active], self.num_steps[active])

    def move_to_tail(self, leaving: Mask) -> int:
        """Reorder the active rows so that the leaving ones come last; returns the first one's slot.

        Args:
            leaving: which of the active rows leave, [num_active].
        """
        boundary = self.num_active - int(leaving.sum())
        holes = np.flatnonzero(leaving[:boundary])
        movers = boundary + np.flatnonzero(~leaving[boundary:])
        if len(holes):
            to, source = np.concatenate([holes, movers]), np.concatenate([movers, holes])
            for table in (
                self.seed,
                self.row,
                self.steps_done,
                self.num_steps,
                self.preview_every,
                self._owner,
            ):
                table[to] = table[source]
            for tensor in self.device.values():
                tensor[torch.from_numpy(to)] = tensor[torch.from_numpy(source)]
            self.tape.move(to, source)
        return boundary

    def release(self, boundary: int) -> None:
        """Free the slots from `boundary` on."""
        self.num_active = self.num_started = boundary
        self.tape.keep(boundary)
        self._requests = {
            owner: self._requests[owner] for owner in np.unique(self._owner[:boundary]).tolist()
        }

    def drop(self, request: Request) -> int:
        """Free the slots of one request; returns how many steps its rows had taken."""
        mine = self._owner[: self.num_active] == id(request)
        steps = int(self.steps_done[: self.num_active][mine].sum())
        self.release(self.move_to_tail(mine))
        return steps

    def by_request(self, slots: NDArray[Any]) -> Sequence[tuple[Request, NDArray[Any]]]:
        """Group slots by the request that owns their rows: positions within `slots`."""
        owners = self._owner[slots]
        return [
            (self._requests[owner], np.flatnonzero(owners == owner)) for owner in np.unique(owners).tolist()
        ]
