"""What the host does with a device besides calling graphs: at once on a CPU, asynchronously on a GPU."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from server.execution.noise.device import Draw, find_kernel

Array = NDArray[Any]
# Waits for a copy, and returns its arrays.
Arrays = Callable[[], Sequence[Array]]


class Timer(Protocol):
    """Duration of the work that a device gets between the start of the timer and `stop`."""

    def stop(self) -> None: ...

    def wait(self) -> float | None:
        """Wait for the work; return its seconds, or None if it was done when its calls returned."""
        ...


class DeviceOperations(Protocol):
    """Copies to and from a device and within it, in the order of the calls.

    Attributes:
        device: the device.
        is_async: whether calls return before the device has done them.
        noise_kernel: draws random numbers on the device; None if the host draws them.
    """

    device: torch.device
    is_async: bool
    noise_kernel: Draw | None

    def copy(self, array: Array, target: torch.Tensor) -> None:
        """Copy an array to a tensor on the device; the array may change afterwards."""
        ...

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Arrays:
        """Start to copy tensors to arrays. The caller leaves the tensors as they are."""
        ...

    def move_rows(self, tables: Iterable[torch.Tensor], target: Array, source: Array) -> None:
        """Copy the rows at `source` to `target` in every table; the positions may overlap."""
        ...

    def start_timer(self) -> Timer: ...


class CpuOperations:
    """Operations of a CPU, whose tensors share their memory with arrays.

    NumPy takes a tenth of torch's time for an operation on few rows.
    """

    device = torch.device("cpu")
    is_async = False
    noise_kernel: Draw | None = None

    def copy(self, array: Array, target: torch.Tensor) -> None:
        """Copy an array to a tensor."""
        target.numpy()[...] = array

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Arrays:
        """Return the tensors as arrays."""
        arrays = [tensor.numpy() for tensor in tensors]
        return lambda: arrays

    def move_rows(self, tables: Iterable[torch.Tensor], target: Array, source: Array) -> None:
        """Copy the rows at `source` to `target` in every table."""
        for table in tables:
            rows = table.numpy()
            rows[target] = rows[source]

    def start_timer(self) -> Timer:
        """Return a timer of work that is done at once."""
        return _NoTimer()


class _NoTimer:
    def stop(self) -> None:
        pass

    def wait(self) -> float | None:
        return None


class CudaOperations:
    """Operations of a GPU, with copies through pinned memory.

    The allocator of pinned memory reuses a block only after the copies from and to it have been done. Copies
    to the host run on a stream of their own, while the kernels of the next step run.
    """

    is_async = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.noise_kernel = find_kernel(device)
        self._copy_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, array: Array, target: torch.Tensor) -> None:
        """Copy an array to a tensor on the GPU."""
        target.copy_(_pin(array, target.dtype), non_blocking=True)

    def to_host(self, tensors: Sequence[torch.Tensor]) -> Arrays:
        """Start to copy tensors to pinned memory."""
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        copies = []
        with torch.cuda.stream(self._copy_stream):
            for tensor in tensors:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copies.append(copy.copy_(tensor, non_blocking=True))
                tensor.record_stream(self._copy_stream)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(self._copy_stream)

        def wait() -> Sequence[Array]:
            copied.synchronize()
            return [copy.numpy() for copy in copies]

        return wait

    def move_rows(self, tables: Iterable[torch.Tensor], target: Array, source: Array) -> None:
        """Copy the rows at `source` to `target` in every table."""
        positions = _pin(np.stack([target, source]), torch.int64)
        targets, sources = positions.to(self.device, non_blocking=True)
        for table in tables:
            table.index_copy_(0, targets, table.index_select(0, sources))

    def start_timer(self) -> Timer:
        """Record the start in the current stream."""
        return _EventTimer(self.device)


def _pin(array: Array, dtype: torch.dtype) -> torch.Tensor:
    # Converted here: a copy that converts waits for the GPU.
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).pin_memory()


class _EventTimer:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._start.record(self._stream)

    def stop(self) -> None:
        self._end.record(self._stream)

    def wait(self) -> float | None:
        self._end.synchronize()
        return float(self._start.elapsed_time(self._end)) / 1000


def operations_of(device: torch.device) -> DeviceOperations:
    """Return the operations of a device."""
    return CudaOperations(device) if device.type == "cuda" else CpuOperations()
