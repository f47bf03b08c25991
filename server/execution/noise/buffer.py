"""Random numbers of a program's steps, drawn several steps ahead.

The numbers of a row depend only on its seed, index and step (samovar.noise), so the time at which they are
drawn changes no bit. A buffer holds the numbers of the next steps of every slot, whose rows may be at any
step. While the device works through one buffer, a thread may fill the next.
"""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samovar import noise
from server.core.spec import NoiseSpec
from server.execution.noise.base import NoiseKeys

# A draw of few numbers takes as long as one of a thousand, so rows with few numbers are drawn more steps
# ahead. The rest of a buffer is drawn at once for a row that joins, which is expensive for large rows.
_MIN_STEPS, _MAX_STEPS = 16, 64
_ROW_BYTES = 1 << 10
_BUFFER_BYTES = 4 << 20

Array = NDArray[Any]
_DRAW = {"normal": noise.normal, "uniform": noise.uniform}


def draw(spec: NoiseSpec, keys: NoiseKeys) -> Array:
    """Draw the numbers of one step of each row, float32 [B, *shape]."""
    return _DRAW[spec.distribution](keys.seed, keys.row, keys.step, spec.stream, spec.tensor.shape)


def _num_buffered_steps(row_bytes: int, slots: int) -> int:
    """Return how many steps a buffer holds, where one step of a row has `row_bytes` bytes of numbers."""
    steps = min(max(_MIN_STEPS, _ROW_BYTES // max(1, row_bytes)), _MAX_STEPS)
    return max(1, min(steps, _BUFFER_BYTES // max(1, slots * row_bytes)))


class NoiseBuffer:
    """Random numbers of the next `length` steps of every slot, in host memory.

    Args:
        noise: the noise that a step reads.
        slots: number of slots.
        prefetch_executor: draws the next buffer in the background; without it numbers are drawn when needed.
    """

    def __init__(
        self,
        noise: Sequence[NoiseSpec],
        slots: int,
        prefetch_executor: Executor | None = None,
    ) -> None:
        row_bytes = sum(spec.tensor.row_bytes for spec in noise)
        self.length = _num_buffered_steps(row_bytes, slots)
        self._noise = tuple(noise)
        self._front, self._back = (
            {
                spec.tensor.name: np.zeros((self.length, slots, *spec.tensor.shape), np.float32)
                for spec in noise
            }
            for _ in range(2)
        )
        self._prefetch_executor = prefetch_executor
        self._prefetch: Future[None] | None = None
        self._prefetch_keys: NoiseKeys | None = None
        self._position = self.length
        self._num_ready = 0

    def numbers(self, name: str, count: int) -> Array:
        """Return the numbers of the current step of the first `count` slots, float32 [count, *shape]."""
        numbers: Array = self._front[name][self._position, :count]
        return numbers

    @property
    def num_ready(self) -> int:
        """Number of slots whose numbers for the current step are ready."""
        return self._num_ready if self._position < self.length else 0

    def ensure(self, keys: NoiseKeys) -> None:
        """Draw the numbers of the current step of these rows, in the first slots, unless they are ready."""
        if self._position >= self.length:
            self._swap_buffers(keys)
        if self._num_ready < len(keys):
            self._fill(self._front, keys, np.arange(self._num_ready, len(keys)), self._position)
            self._num_ready = len(keys)

    def advance(self) -> None:
        """Move on to the next step."""
        self._position += 1

    def move(self, target: Array, source: Array) -> None:
        """Move the numbers of rows from the `source` slots to the `target` slots."""
        for table in self._front.values():
            table[self._position :, target] = table[self._position :, source]

    def truncate(self, slots: int) -> None:
        """Record that only the first `slots` slots are in use."""
        self._num_ready = min(self._num_ready, slots)

    def _swap_buffers(self, keys: NoiseKeys) -> None:
        """Start a new buffer: reuse what was prefetched for rows that kept their slots, and draw the rest."""
        is_missing = np.ones(len(keys), bool)
        prefetch, self._prefetch = self._prefetch, None
        if prefetch is not None and self._prefetch_keys is not None:
            prefetch.result()
            self._front, self._back = self._back, self._front
            common = min(len(keys), len(self._prefetch_keys))
            is_missing[:common] = ~keys[:common].equals(self._prefetch_keys[:common])
        self._position, self._num_ready = 0, len(keys)
        self._fill(self._front, keys, np.flatnonzero(is_missing), 0)
        self._start_prefetch(keys)

    def _start_prefetch(self, keys: NoiseKeys) -> None:
        if self._prefetch_executor is None:
            return
        # Two copies: the rows move in the tables while the thread reads its keys.
        next_keys = keys.advanced_by(self.length)
        self._prefetch_keys = next_keys.copy()
        self._prefetch = self._prefetch_executor.submit(
            self._fill, self._back, next_keys.copy(), np.arange(len(keys)), 0
        )

    def _fill(self, tables: dict[str, Array], keys: NoiseKeys, slots: Array, position: int) -> None:
        """Draw the numbers of some slots from a position on, up to the last step of each row."""
        steps = np.arange(self.length - position)
        is_needed = (keys.step[slots, None] + steps) < keys.num_steps[slots, None]
        rows, offsets = np.nonzero(is_needed)
        if not len(rows):
            return
        selected = keys[slots[rows]]
        step_keys = NoiseKeys(selected.seed, selected.row, selected.step + offsets, selected.num_steps)
        for spec in self._noise:
            tables[spec.tensor.name][position + offsets, slots[rows]] = draw(spec, step_keys)
