"""A device that works asynchronously, on the CPU: results are copied as late as a GPU may copy them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from server.core.spec import NoiseSpec
from server.execution.device_operations import Arrays, CpuOperations, Timer
from server.execution.noise.base import NoiseKeys
from server.execution.noise.buffer import draw

Tensor = torch.Tensor


def draw_on_device(spec: NoiseSpec, seeds: Tensor, rows: Tensor, steps: Tensor, out: Tensor) -> None:
    """Draw into a tensor from keys in tensors, like the kernel of a GPU."""
    keys = NoiseKeys(seeds.numpy().view(np.uint64), rows.numpy(), steps.numpy(), steps.numpy() + 1)
    out.copy_(torch.from_numpy(draw(spec, keys)))


@dataclass
class DeferredOperations(CpuOperations):
    """Operations whose copies to the host read the tensors only when the host waits for them.

    Attributes:
        noise_kernel: draws on the device; None to draw on the host.
        events: "step" for each step that was launched, "wait" for each that the host waited for.
        on_wait: called before the host waits for a step, and may raise what a GPU reports then.
    """

    is_async = True
    noise_kernel: Callable[[NoiseSpec, Tensor, Tensor, Tensor, Tensor], None] | None = None
    events: list[str] = field(default_factory=list)
    on_wait: Callable[[], None] = lambda: None

    def to_host(self, tensors: Sequence[Tensor]) -> Arrays:
        """Return a function that copies the tensors, once."""
        copies: list[np.ndarray] = []

        def wait() -> Sequence[np.ndarray]:
            if not copies:
                copies.extend(tensor.numpy().copy() for tensor in tensors)
            return copies

        return wait

    def start_timer(self) -> Timer:
        self.events.append("step")
        return _RecordingTimer(self)


@dataclass
class _RecordingTimer:
    operations: DeferredOperations
    has_waited: bool = False

    def stop(self) -> None:
        pass

    def wait(self) -> float | None:
        if not self.has_waited:
            self.has_waited = True
            self.operations.events.append("wait")
            self.operations.on_wait()
        return 0.001


# The operations of a CPU, and of devices that work asynchronously.
OPERATIONS: Mapping[str, Callable[[], CpuOperations]] = {
    "cpu": CpuOperations,
    "asynchronous": DeferredOperations,
    "device-noise": lambda: DeferredOperations(noise_kernel=draw_on_device),
}
