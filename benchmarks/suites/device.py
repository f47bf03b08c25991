"""Step time on a GPU by batch size, with and without CUDA graphs, and transfers between host and GPU."""

import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.report import Line, Plot, Section, Table
from benchmarks.statistics import format_milliseconds, format_number
from benchmarks.suites.base import Bench
from benchmarks.suites.efficiency import SINGLE_CALL, STEPPING, Case, make_tensors, zeros
from server.models import artifact
from server.runtime import RUNTIMES, Device, bind_graph

BATCH_SIZES = tuple(2**exponent for exponent in range(11))
MEBIBYTE = 1 << 20
TRANSFER_MEBIBYTES = 16

TEXT = """\
Milliseconds per call of the step graph of each family as TorchScript, or of its only graph if it takes no
steps. Tensors stay on the GPU; kernels are launched one by one, or as one CUDA graph. Transfers copy 16 MiB
from and to pageable and pinned memory. A dash is a graph that does not run on the GPU."""
NO_GPU = "Not measured: the machine of this run has no GPU. `make bench` adds the figures if there is one."


def run(bench: Bench) -> Section:
    """Measure if there is a GPU."""
    if not torch.cuda.is_available():
        return Section("On a GPU", NO_GPU)
    cases = STEPPING[:1] if bench.is_quick else (*STEPPING, *SINGLE_CALL)
    tables, lines = zip(*(_measure_family(bench, case) for case in cases), strict=True)
    plot = Plot("device", "Step time with CUDA graphs", "rows per step", "milliseconds", lines)
    text = f"{TEXT} GPU: {torch.cuda.get_device_name()}."
    return Section("On a GPU", text, tables=(*tables, _measure_transfers()), plots=(plot,))


def _measure_family(bench: Bench, case: Case) -> tuple[Table, Line]:
    """Return the table of a family, and its line with CUDA graphs."""
    directory = bench.models(case.model, formats=("torchscript",)) / case.model / "1"
    sizes = BATCH_SIZES[::5] if bench.is_quick else BATCH_SIZES
    devices = [Device("cuda", cuda_graphs=graphs) for graphs in (False, True)]
    times = [[_seconds_or_nan(directory, case, size, device) for device in devices] for size in sizes]
    rows = [
        (
            str(size),
            format_milliseconds(kernels),
            format_milliseconds(cuda_graph),
            format_number(kernels / cuda_graph),
        )
        for size, (kernels, cuda_graph) in zip(sizes, times, strict=True)
    ]
    columns = ("rows per step", "kernels, ms", "CUDA graph, ms", "kernels / CUDA graph")
    line = Line(case.model, sizes, [1000 * cuda_graph for _, cuda_graph in times])
    return Table(f"device-{case.model}", case.model, columns, rows), line


def _seconds_or_nan(directory: Path, case: Case, rows: int, device: Device) -> float:
    """Return NaN and print the error if a family does not run on the GPU, so that the others are measured."""
    try:
        return call_seconds(directory, case, rows, device)
    except RuntimeError as error:
        print(f"{case.model} with {rows} rows on {device}: {str(error).strip()}", file=sys.stderr)
        return math.nan


def call_seconds(directory: Path, case: Case, rows: int, device: Device) -> float:
    """Return the seconds of one step of `rows` rows, or of the readout of a program without steps."""
    _, spec = artifact.read(directory)
    program = spec.programs[case.operation]
    tensors = make_tensors(program, rows, {**program.defaults(), **case.parameters})
    tensors["num_steps"].fill_(case.steps)
    graph, results = (program.step, program.state) if program.step else (program.readout, program.outputs)
    loaded = RUNTIMES["torchscript"](spec.files["torchscript"][graph.name], graph, device)
    inputs = [tensors[tensor.name].to(device.torch) for tensor in graph.inputs]
    return mean_seconds(bind_graph(loaded, inputs, zeros(results, rows, device.torch)))


def _measure_transfers() -> Table:
    rows = []
    size = TRANSFER_MEBIBYTES * MEBIBYTE
    on_device = torch.zeros(size, dtype=torch.uint8, device="cuda")
    for kind in ("pageable", "pinned"):
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=kind == "pinned")
        to_gpu = mean_seconds(partial(on_device.copy_, host, non_blocking=True))
        from_gpu = mean_seconds(partial(host.copy_, on_device, non_blocking=True))
        rates = (TRANSFER_MEBIBYTES / 1024 / seconds for seconds in (to_gpu, from_gpu))
        rows.append((kind, *map(format_number, rates)))
    columns = ("host memory", "to the GPU, GiB/s", "from the GPU, GiB/s")
    return Table("device-transfers", "transfers", columns, rows)


def mean_seconds(call: Callable[[], object], repeats: int = 50) -> float:
    """Return the mean seconds of a call, after warm-up calls."""
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
