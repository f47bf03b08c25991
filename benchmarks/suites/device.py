"""What a GPU makes of batches: step time against batch size, CUDA graphs on and off, transfers."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import Line, Plot, Section, Table
from benchmarks.statistics import milliseconds, short
from benchmarks.suites.base import Bench
from benchmarks.suites.efficiency import ONE_SHOT, STEPPING, Case, tables, zeros
from server.models import artifact
from server.runtime import RUNTIMES, Device, bind_graph

BATCHES = tuple(2**exponent for exponent in range(11))
MEGABYTE = 1 << 20

TEXT = """\
The step graph of each family as TorchScript, or the only graph of one that takes no steps, on tensors that
stay on the GPU: milliseconds a call, launched kernel by kernel and as one CUDA graph; transfers of 16 MiB
from and to pageable and pinned memory. A dash is a graph that does not run there."""
ABSENT = """\
There was no GPU where this page was made, so this part is unrun: `make bench` adds it where there is one."""


def run(bench: Bench) -> Section:
    """Measure where there is a GPU, and say so where there is none."""
    if not torch.cuda.is_available():
        return Section("On a GPU", ABSENT)
    cases = STEPPING[:1] if bench.is_quick else (*STEPPING, *ONE_SHOT)
    measured = [_family(bench, case) for case in cases]
    parts = [part for part, _ in measured] + [_transfers()]
    lines = [line for _, line in measured]
    plot = Plot("device", "Step time, CUDA graphs", "rows a step", "milliseconds", lines)
    return Section("On a GPU", f"{TEXT} {torch.cuda.get_device_name()}.", parts, (plot,))


def _family(bench: Bench, case: Case) -> tuple[Table, Line]:
    """A family's table, and its line with CUDA graphs."""
    directory = bench.models(case.model, formats=("torchscript",)) / case.model / "1"
    batches = BATCHES[::5] if bench.is_quick else BATCHES
    devices = [Device("cuda", cuda_graphs=graphs) for graphs in (False, True)]
    times = [[_seconds_or_nan(directory, case, batch, device) for device in devices] for batch in batches]
    rows = [
        (str(batch), milliseconds(plain), milliseconds(replayed), short(plain / replayed))
        for batch, (plain, replayed) in zip(batches, times, strict=True)
    ]
    columns = ("rows a step", "kernel by kernel, ms", "CUDA graph, ms", "ratio")
    lines = Line(case.model, batches, [1000 * replayed for _, replayed in times])
    return Table(columns, rows, case.model), lines


def _seconds_or_nan(directory: Path, case: Case, rows: int, device: Device) -> float:
    """One family that does not run there is a gap in the page, and no reason to lose the page."""
    try:
        return call_seconds(directory, case, rows, device)
    except RuntimeError as error:
        print(f"{case.model} with {rows} rows on {device}: {str(error).strip()}", file=sys.stderr)
        return math.nan


def call_seconds(directory: Path, case: Case, rows: int, device: Device) -> float:
    """Seconds of one step of so many rows, or of the readout of a program without any."""
    _, spec = artifact.read(directory)
    program = spec.programs[case.operation]
    made = tables(program, rows, {**program.defaults(), **case.parameters})
    made["num_steps"].fill_(case.steps)
    graph, written = (program.step, program.state) if program.step else (program.readout, program.outputs)
    opened = RUNTIMES["torchscript"](spec.files["torchscript"][graph.name], graph, device)
    inputs = [made[tensor.name].to(device.torch) for tensor in graph.inputs]
    return seconds_of(bind_graph(opened, inputs, zeros(written, rows, device.torch)))


def _transfers() -> Table:
    """Copies of 16 MiB each way."""
    rows = []
    on_device = torch.zeros(16 * MEGABYTE, dtype=torch.uint8, device="cuda")
    for kind in ("pageable", "pinned"):
        host = torch.zeros(16 * MEGABYTE, dtype=torch.uint8, pin_memory=kind == "pinned")
        there = seconds_of(lambda host=host: on_device.copy_(host, non_blocking=True))  # type: ignore[misc]
        back = seconds_of(lambda host=host: host.copy_(on_device, non_blocking=True))  # type: ignore[misc]
        rows.append((kind, *(short(16 / 1024 / each) for each in (there, back))))
    return Table(("host memory", "to the GPU, GiB/s", "from it, GiB/s"), rows, "Transfers")


def seconds_of(call: Callable[[], object], repeats: int = 50) -> float:
    """Mean seconds of a call, after a few to warm up."""
    for _ in range(5):
        call()
    _synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronize()
    return (time.perf_counter() - start) / repeats


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
