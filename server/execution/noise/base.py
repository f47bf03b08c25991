"""Interface of a source of random numbers, and the keys of the numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from numpy.typing import NDArray

from server.core.spec import STEP_INDEX, TensorSpec

Array = NDArray[Any]

# Tables of the keys of rows on a device: the bits of the seed, the index, and the step. The dot keeps the
# first two names from those of a program's tensors.
SEED, ROW = "row.seed", "row.index"
KEY_TABLES = (TensorSpec(SEED, "int64"), TensorSpec(ROW, "int64"), TensorSpec(STEP_INDEX, "int64"))


@dataclass(frozen=True)
class NoiseKeys:
    """Keys of the random numbers of rows: seed, row index, step and number of steps, all [B]."""

    seed: Array
    row: Array
    step: Array
    num_steps: Array

    def __len__(self) -> int:
        return len(self.seed)

    def __getitem__(self, rows: slice | Array) -> "NoiseKeys":
        return NoiseKeys(self.seed[rows], self.row[rows], self.step[rows], self.num_steps[rows])

    def advanced_by(self, steps: int) -> "NoiseKeys":
        """Return the keys of the same rows, `steps` steps later."""
        return NoiseKeys(self.seed, self.row, self.step + steps, self.num_steps)

    def copy(self) -> "NoiseKeys":
        return NoiseKeys(self.seed.copy(), self.row.copy(), self.step.copy(), self.num_steps.copy())

    def equals(self, other: "NoiseKeys") -> Array:
        """Return where both have the same key, bool [B].

        Equal rows with fewer steps differ: their numbers end earlier.
        """
        equal: Array = (self.seed == other.seed) & (self.row == other.row) & (self.step == other.step)
        equal &= self.num_steps == other.num_steps
        return equal


class NoiseSource(Protocol):
    """Random numbers of the rows in slots, which depend only on the seed, index and step of a row.

    Attributes:
        tables: numbers by name, on the device of the graphs, float32 [2 * capacity, *row shape].
    """

    tables: Mapping[str, torch.Tensor]

    def prepare_step(self, count: int) -> None:
        """Do what the host does for a step of the rows in the first `count` slots."""
        ...

    def prepare_call(self, names: Sequence[str], start: int, count: int) -> None:
        """Do what the host does for a call of another graph, on `count` rows from slot `start`."""
        ...

    def launcher(self, names: Sequence[str], slots: slice) -> Callable[[], None] | None:
        """Return what the device does before a graph reads these tables, or None if it does nothing.

        It may be repeated, and a CUDA graph may hold it.
        """
        ...

    def advance(self) -> None:
        """Move on to the next step."""
        ...

    def move(self, target: Array, source: Array) -> None:
        """Move what is drawn ahead of rows from the `source` slots to the `target` slots."""
        ...

    def truncate(self, slots: int) -> None:
        """Record that only the first `slots` slots are in use."""
        ...
