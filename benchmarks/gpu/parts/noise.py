"""Transfers, and random numbers drawn by the kernel on the device or by NumPy on the host."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from benchmarks.gpu.base import Check, Finding, Note, Verdict
from benchmarks.gpu.timing import clocks
from benchmarks.report import Table
from benchmarks.statistics import format_number
from server.core.spec import NoiseSpec, TensorSpec
from server.execution.device_operations import DeviceOperations, operations_of
from server.execution.noise.base import NoiseKeys
from server.execution.noise.buffer import draw as draw_on_host
from server.execution.noise.device import Draw, keys_on
from server.runtime import Device, device_context

# Rows of a step, and numbers of a row: a digit, a latent vector, an image of 3 x 32 x 32.
CASES = ((64, 64), (256, 64), (64, 3072), (256, 3072))
COMPARED_NUMBERS = 10_000_000
MEBIBYTE = 1 << 20
SECONDS = 0.1


def run(check: Check) -> Iterator[Finding]:
    """Compare the numbers first, then measure."""
    device = Device(check.device).torch
    with device_context(device):
        operations = operations_of(device)
        if operations.noise_kernel is None:
            yield Note("Random numbers are drawn on the host here: the device has no kernel, see the log.")
        else:
            yield from _compare(operations.noise_kernel, device)
        yield _measure_noise(operations, check.is_rehearsal)
        if device.type == "cuda":
            yield _measure_transfers(device)


def _compare(kernel: Draw, device: torch.device) -> Iterator[Finding]:
    """Compare the kernel's numbers with the host's."""
    rows = 256
    count = COMPARED_NUMBERS // rows
    keys = _keys(rows)
    for distribution in ("uniform", "normal"):
        spec = _spec(distribution, count)
        numbers = torch.zeros((rows, count), device=device)
        kernel(spec, *keys_on(device, keys), numbers)
        expected, found = draw_on_host(spec, keys), numbers.cpu().numpy()
        differing = int(np.count_nonzero(found != expected))
        ulp = float((np.abs(found - expected) / np.spacing(np.abs(expected))).max())
        if distribution == "uniform":
            yield Verdict(
                "uniform numbers of the kernel have the bits of samovar.noise",
                differing == 0,
                f"{differing} of {found.size:,} differ",
            )
        else:
            yield Verdict(
                "normal numbers of the kernel are within one unit in the last place of samovar.noise",
                ulp <= 1,
                f"{differing} of {found.size:,} differ, by at most {ulp:.0f} units",
            )


def _measure_noise(operations: DeviceOperations, is_rehearsal: bool) -> Table:
    """Return the time of one step's numbers: by the kernel, by the host, and of their copy to the device."""
    rows = []
    for batch, count in CASES[: 2 if is_rehearsal else None]:
        spec, keys = _spec("normal", count), _keys(batch)
        numbers = torch.zeros((batch, count), device=operations.device)
        drawn = draw_on_host(spec, keys)
        host, device = torch.device("cpu"), operations.device
        cells = [_microseconds(partial(draw_on_host, spec, keys), host)]
        cells.append(_microseconds(partial(operations.copy, drawn, numbers), device))
        if kernel := operations.noise_kernel:
            cells.append(_microseconds(partial(kernel, spec, *keys_on(device, keys), numbers), device))
        else:
            cells.append("–")
        rows.append((str(batch), str(count), *cells))
    columns = ("rows", "numbers a row", "drawn on the host, µs", "copied to the device, µs", "kernel, µs")
    return Table("gpu-noise", "normal numbers of one step", columns, rows)


def _measure_transfers(device: torch.device) -> Table:
    rows = []
    for size in (1 << 10, 256 << 10, 16 * MEBIBYTE):
        on_device = torch.zeros(size, dtype=torch.uint8, device=device)
        for kind in ("pageable", "pinned"):
            host = torch.zeros(size, dtype=torch.uint8, pin_memory=kind == "pinned")
            cells = []
            for target, source in ((on_device, host), (host, on_device)):
                copy = partial(target.copy_, source, non_blocking=True)
                seconds = clocks.median_seconds(copy, device, SECONDS)
                cells += [format_number(1e6 * seconds), format_number(size / (1 << 30) / seconds)]
            rows.append((f"{size // 1024:,}", kind, *cells))
    columns = ("KiB", "host memory", "to the GPU, µs", "GiB/s", "from the GPU, µs", "GiB/s")
    return Table("gpu-transfers", "transfers", columns, rows)


def _spec(distribution: str, count: int) -> NoiseSpec:
    return NoiseSpec(TensorSpec("noise", "float32", (count,)), distribution, stream=1)  # type: ignore[arg-type]


def _keys(rows: int) -> NoiseKeys:
    index = np.arange(rows)
    return NoiseKeys(np.full(rows, 7, np.uint64), index, index % 20, np.full(rows, 20))


def _microseconds(call: Callable[[], object], device: torch.device) -> str:
    return format_number(1e6 * clocks.median_seconds(call, device, SECONDS))
