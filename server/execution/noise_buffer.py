"""The random numbers of a program's steps, drawn several steps at a time.

A tape holds the numbers of the next steps for every slot. Rows of any age lie on it
side by side: each has the numbers of its own steps, which depend on its seed, index
and step alone (samovar.noise), so when they are drawn changes no bit. While the
device works through one stretch of tape, a thread may draw the next.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from samovar import noise
from server.core.spec import NoiseSpec

# To draw few numbers takes as long as to draw a thousand, so rows of a few draw more steps ahead; but what
# is left of a stretch is drawn at once for a row that joins, which is much where a step has many.
_LEAST_STEPS, _MOST_STEPS = 16, 64
_ROW_BYTES = 1 << 10
_TAPE_BYTES = 4 << 20

Array = NDArray[Any]
_DRAW = {"normal": noise.normal, "uniform": noise.uniform}


@dataclass(frozen=True)
class Rows:
    """Whose numbers: seed, row index, step and number of steps of each row, all [B]."""

    seed: Array
    row: Array
    step: Array
    num_steps: Array

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, chosen: slice | Array) -> "Rows":
        return Rows(self.seed[chosen], self.row[chosen], self.step[chosen], self.num_steps[chosen])

    def later(self, steps: int) -> "Rows":
        """The same rows so many steps on."""
        return Rows(self.seed, self.row, self.step + steps, self.num_steps)

    def copy(self) -> "Rows":
        return Rows(self.seed.copy(), self.row.copy(), self.step.copy(), self.num_steps.copy())

    def same(self, other: "Rows") -> Array:
        """Where two sets of rows hold the same row at the same step with as many to go, bool [B].

        A shorter twin's numbers end with its steps.
        """
        same: Array = (self.seed == other.seed) & (self.row == other.row) & (self.step == other.step)
        same &= self.num_steps == other.num_steps
        return same


def draw(item: NoiseSpec, rows: Rows) -> Array:
    """The numbers of one step of each row, float32 [B, *shape]."""
    return _DRAW[item.distribution](rows.seed, rows.row, rows.step, item.stream, item.tensor.shape)


def _stretch(row_bytes: int, slots: int) -> int:
    """How many steps to draw at a time, where one has so many bytes of numbers for each row."""
    wanted = min(max(_LEAST_STEPS, _ROW_BYTES // max(1, row_bytes)), _MOST_STEPS)
    return max(1, min(wanted, _TAPE_BYTES // max(1, slots * row_bytes)))


def _table(shape: Sequence[int], device: torch.device | None) -> Array:
    is_cuda = device is not None and device.type == "cuda"
    table: Array = torch.zeros(*shape, pin_memory=is_cuda).numpy()
    return table


class NoiseBuffer:
    """The numbers of the next `length` steps of every slot, for the noise that a step reads.

    They lie in the host's memory, from which `device` may copy them while the host goes on.
    """

    def __init__(
        self,
        noise: Sequence[NoiseSpec],
        slots: int,
        ahead: Executor | None = None,
        device: torch.device | None = None,
    ) -> None:
        row_bytes = sum(item.tensor.row_bytes for item in noise)
        self.length = _stretch(row_bytes, slots)
        self._noise = tuple(noise)
        self._front, self._back = (
            {item.tensor.name: _table((self.length, slots, *item.tensor.shape), device) for item in noise}
            for _ in range(2)
        )
        self._prefetch_executor = ahead
        self._drawn: Future[None] | None = None
        self._drawn_for: Rows | None = None
        self._position = self.length
        self._num_ready = 0

    def numbers(self, name: str, count: int) -> Array:
        """The numbers of the present step of the rows in the first slots, float32 [count, *shape]."""
        numbers: Array = self._front[name][self._position, :count]
        return numbers

    @property
    def num_ready(self) -> int:
        """Of so many slots the numbers of the present step are there."""
        return self._num_ready if self._position < self.length else 0

    def ensure(self, rows: Rows) -> None:
        """Make sure that the numbers of these rows' present step are there."""
        if self._position >= self.length:
            self._swap_buffers(rows)
        if self._num_ready < len(rows):
            self._fill(self._front, rows, np.arange(self._num_ready, len(rows)), self._position)
            self._num_ready = len(rows)

    def advance(self) -> None:
        """Every row has taken its step."""
        self._position += 1

    def move(self, to: Array, source: Array) -> None:
        """Rows have moved from slots to others."""
        for table in self._front.values():
            table[self._position :, to] = table[self._position :, source]

    def truncate(self, slots: int) -> None:
        """Only the first so many slots are still in use."""
        self._num_ready = min(self._num_ready, slots)

    def _swap_buffers(self, rows: Rows) -> None:
        """Begin a new stretch: what was drawn ahead for rows that kept their slots, and the rest."""
        lacking = np.ones(len(rows), bool)
        drawn, self._drawn = self._drawn, None
        if drawn is not None and self._drawn_for is not None:
            drawn.result()
            self._front, self._back = self._back, self._front
            both = min(len(rows), len(self._drawn_for))
            lacking[:both] = ~rows[:both].same(self._drawn_for[:both])
        self._position, self._num_ready = 0, len(rows)
        self._fill(self._front, rows, np.flatnonzero(lacking), 0)
        self._draw_ahead(rows)

    def _draw_ahead(self, rows: Rows) -> None:
        if self._prefetch_executor is None:
            return
        later = rows.later(self.length)
        self._drawn_for = later.copy()
        self._drawn = self._prefetch_executor.submit(
            self._fill, self._back, later.copy(), np.arange(len(rows)), 0
        )

    def _fill(self, tables: dict[str, Array], rows: Rows, slots: Array, position: int) -> None:
        """Draw the rest of a stretch for some slots; not beyond a row's last step."""
        steps = np.arange(self.length - position)
        taken = (rows.step[slots, None] + steps) < rows.num_steps[slots, None]
        which, offsets = np.nonzero(taken)
        if not len(which):
            return
        chosen = rows[slots[which]]
        wanted = Rows(chosen.seed, chosen.row, chosen.step + offsets, chosen.num_steps)
        for item in self._noise:
            tables[item.tensor.name][position + offsets, slots[which]] = draw(item, wanted)
