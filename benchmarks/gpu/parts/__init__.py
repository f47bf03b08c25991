"""Parts of the GPU check, several implementations of `Part`, the most valuable first."""

import importlib
from dataclasses import dataclass

from benchmarks.gpu.base import Part


@dataclass(frozen=True)
class PartEntry:
    """A part of the check: the module whose function `run` it is, its time limit, and its purpose."""

    name: str
    seconds: float
    purpose: str

    def load(self) -> Part:
        """Import the part."""
        run: Part = importlib.import_module(f"benchmarks.gpu.parts.{self.name}").run
        return run


PARTS = (
    PartEntry("answers", 100, "Every operation answers on the device; values agree with the CPU."),
    PartEntry("tests", 80, "The contract, fault and memory tests pass on the device."),
    PartEntry("step_time", 140, "Step time by rows, runtime and CUDA graphs; kernels and host time a step."),
    PartEntry("noise", 30, "Transfers, and random numbers drawn on the device or ahead on the host."),
    PartEntry("engine", 120, "The engine compared with bare loops and request batching; rows per second."),
)

__all__ = ["PARTS", "PartEntry"]
