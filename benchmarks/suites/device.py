"""What a GPU makes of batches: step time against batch size, CUDA graphs on and off, transfers."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import artifacts
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.spread import milliseconds, short
from benchmarks.suites.base import Bench
from benchmarks.suites.efficiency import tables
from server import artifact
from server.runtime import RUNTIMES, Device, bound

BATCHES = tuple(2**exponent for exponent in range(11))
MEGABYTE = 1 << 20

TEXT = """\
The step graph of each family as TorchScript, on tensors that stay on the GPU: milliseconds a step, launched
kernel by kernel and as one CUDA graph; transfers of 16 MiB from and to pageable and pinned memory."""
ABSENT = """\
There was no GPU where this page was made, so this part is unrun: `make bench` adds it where there is one."""


def run(bench: Bench) -> Section:
    """Measure where there is a GPU, and say so where there is none."""
    if not torch.cuda.is_available():
        return Section("On a GPU", ABSENT)
    measured = [_family(bench, name) for name in artifacts.FAMILIES]
    parts = [part for part, _ in measured] + [_transfers()]
    lines = [line for _, line in measured]
    plot = Plot("device", "Step time, CUDA graphs", "rows a step", "milliseconds", lines)
    return Section("On a GPU", f"{TEXT} {torch.cuda.get_device_name()}.", parts, (plot,))


def _family(bench: Bench, name: str) -> tuple[Table, Line]:
    """A family's table, and its line with CUDA graphs."""
    directory = bench.models(name, formats=("torchscript",)) / name / "1"
    batches = BATCHES[::5] if bench.is_quick else BATCHES
    times = [[_step(directory, batch, graphs) for graphs in (False, True)] for batch in batches]
    rows = [
        (str(batch), milliseconds(plain), milliseconds(replayed), short(plain / replayed))
        for batch, (plain, replayed) in zip(batches, times, strict=True)
    ]
    columns = ("rows a step", "kernel by kernel, ms", "CUDA graph, ms", "ratio")
    return Table(columns, rows, name), Line(name, batches, [1000 * replayed for _, replayed in times])


def _step(directory: Path, rows: int, cuda_graphs: bool) -> float:
    """Seconds of one step of so many rows."""
    device = Device("cuda", cuda_graphs=cuda_graphs)
    _, spec = artifact.read(directory)
    program = spec.programs["sample"]
    assert program.step is not None, f"{spec.name} has no steps. This is a bug."
    made = tables(program, rows, program.defaults())
    made["num_steps"].fill_(program.steps.of(program.defaults()))
    on_device = {name: table.to(device.torch) for name, table in made.items()}
    graph = RUNTIMES["torchscript"](spec.files["torchscript"][program.step.name], program.step, device)
    inputs = [on_device[tensor.name] for tensor in program.step.inputs]
    outputs = [torch.empty_like(on_device[tensor.name]) for tensor in program.state]
    return seconds_of(bound(graph, inputs, outputs))


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
    """Mean seconds of a call on the GPU, after a few to warm up."""
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
