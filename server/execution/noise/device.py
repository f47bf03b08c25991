"""Random numbers drawn on a GPU, when a graph reads them."""

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import torch

from server.core.spec import STEP_INDEX, NoiseSpec, TensorSpec
from server.execution.noise.base import ROW, SEED, Array, NoiseKeys
from server.execution.noise.buffer import draw as draw_on_host
from server.runtime import summarize_error

log = logging.getLogger(__name__)

Tensor = torch.Tensor
# Draws the numbers of one step of each row: (noise, seeds, rows, steps, out); see kernel.draw.
Draw = Callable[[NoiseSpec, Tensor, Tensor, Tensor, Tensor], None]


class DeviceNoise:
    """Numbers drawn by one kernel launch for each tensor, from keys that are on the GPU as well.

    The launch is part of the step, and of its CUDA graph. The host draws, copies and moves nothing.

    Args:
        noise: all noise of a program.
        keys: tables of KEY_TABLES, int64 [2 * capacity].
        draw: launches the kernel.
    """

    def __init__(self, noise: Sequence[NoiseSpec], keys: Mapping[str, Tensor], draw: Draw) -> None:
        self._specs = {spec.tensor.name: spec for spec in noise}
        self._keys = keys
        self._draw = draw
        slots, device = len(keys[SEED]), keys[SEED].device
        self.tables: Mapping[str, Tensor] = {
            name: torch.zeros((slots, *spec.tensor.shape), device=device)
            for name, spec in self._specs.items()
        }

    def prepare_step(self, count: int) -> None:
        """Do nothing."""

    def prepare_call(self, names: Sequence[str], start: int, count: int) -> None:
        """Do nothing."""

    def launcher(self, names: Sequence[str], slots: slice) -> Callable[[], None] | None:
        """Return a call that draws the numbers of the rows in these slots at their current step."""
        seeds, rows, steps = (self._keys[name][slots] for name in (SEED, ROW, STEP_INDEX))
        draws = [(self._specs[name], seeds, rows, steps, self.tables[name][slots]) for name in names]

        def launch() -> None:
            for arguments in draws:
                self._draw(*arguments)

        return launch if draws else None

    def advance(self) -> None:
        """Do nothing: the table of steps advances."""

    def move(self, target: Array, source: Array) -> None:
        """Do nothing: the keys move with the other tables."""

    def truncate(self, slots: int) -> None:
        """Do nothing."""


@cache
def find_kernel(device: torch.device) -> Draw | None:
    """Return the function that draws on a device; None, and one line in the log, if it does not work there.

    Triton compiles the kernel with a C compiler, which a small container may lack.
    """
    if device.type != "cuda":
        return None
    try:
        draw: Draw = importlib.import_module("server.execution.noise.kernel").draw
        check_kernel(draw, device)
    except Exception as error:  # Triton and the compiler have many
        log.warning("random numbers are drawn on the host, not on the GPU: %s", summarize_error(error))
        return None
    return draw


def keys_on(device: torch.device, keys: NoiseKeys) -> tuple[Tensor, Tensor, Tensor]:
    """Return the seeds, row indices and steps of keys as a kernel reads them."""
    seeds, rows, steps = (
        torch.from_numpy(array).to(device) for array in (keys.seed.view(np.int64), keys.row, keys.step)
    )
    return seeds, rows, steps


def check_kernel(draw: Draw, device: torch.device) -> None:
    """Raise RuntimeError if a kernel draws other numbers than the host.

    Uniform numbers must have the same bits. Normal numbers may differ in the last bit.
    """
    seeds = np.array([0, 7, 2**64 - 1], np.uint64)
    rows, steps = np.array([0, 5, 2**32 - 1]), np.array([0, 999, 3])
    keys = NoiseKeys(seeds, rows, steps, steps + 1)
    for distribution, max_ulp in (("uniform", 0), ("normal", 1)):
        # Five numbers: a whole block of the generator, and a part of one.
        spec = NoiseSpec(TensorSpec(distribution, "float32", (5,)), distribution, stream=2)  # type: ignore[arg-type]
        out = torch.zeros((len(seeds), 5), device=device)
        draw(spec, *keys_on(device, keys), out)
        expected = draw_on_host(spec, keys)
        difference = np.abs(out.cpu().numpy() - expected)
        if not np.all(difference <= max_ulp * np.spacing(np.abs(expected))):
            raise RuntimeError(f"its {distribution} numbers differ from the host's by {difference.max():.3g}")
