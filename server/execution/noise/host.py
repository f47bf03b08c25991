"""Random numbers drawn on the host, those of steps several steps ahead."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor

import torch

from server.core.spec import NoiseSpec
from server.execution.device_operations import DeviceOperations
from server.execution.noise.base import Array, NoiseKeys
from server.execution.noise.buffer import NoiseBuffer, draw


class HostNoise:
    """Numbers drawn with NumPy and copied to the device.

    Args:
        noise: all noise of a program.
        step_names: the noise that its step reads.
        capacity: number of slots that are in use at once.
        keys: returns the keys of the rows in some slots.
        operations: copies to the device.
        prefetch_executor: draws numbers in the background; without it they are drawn when needed.
    """

    def __init__(
        self,
        noise: Sequence[NoiseSpec],
        step_names: Sequence[str],
        capacity: int,
        keys: Callable[[slice], NoiseKeys],
        operations: DeviceOperations,
        prefetch_executor: Executor | None = None,
    ) -> None:
        self._specs = {spec.tensor.name: spec for spec in noise}
        self._step_names = tuple(step_names)
        self._keys = keys
        self._operations = operations
        self._buffer = NoiseBuffer(
            [self._specs[name] for name in self._step_names], capacity, prefetch_executor
        )
        self.tables: Mapping[str, torch.Tensor] = {
            name: torch.zeros((2 * capacity, *spec.tensor.shape), device=operations.device)
            for name, spec in self._specs.items()
        }

    def prepare_step(self, count: int) -> None:
        """Copy the numbers of the current step to the device."""
        if self._step_names and self._buffer.num_ready < count:
            self._buffer.ensure(self._keys(slice(0, count)))
        for name in self._step_names:
            self._operations.copy(self._buffer.numbers(name, count), self.tables[name][:count])

    def prepare_call(self, names: Sequence[str], start: int, count: int) -> None:
        """Draw the numbers of some rows now, and copy them to the device."""
        slots = slice(start, start + count)
        for name in names:
            self._operations.copy(draw(self._specs[name], self._keys(slots)), self.tables[name][slots])

    def launcher(self, names: Sequence[str], slots: slice) -> None:
        """Return None: the numbers are on the device."""

    def advance(self) -> None:
        """Move on to the next step."""
        self._buffer.advance()

    def move(self, target: Array, source: Array) -> None:
        """Move the numbers of rows from the `source` slots to the `target` slots."""
        self._buffer.move(target, source)

    def truncate(self, slots: int) -> None:
        """Record that only the first `slots` slots are in use."""
        self._buffer.truncate(slots)
