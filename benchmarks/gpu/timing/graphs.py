"""Graphs to measure: the step of a program, or the readout of one without steps, in each runtime.

A runtime is one of the server's, or a compiler of torch on the program in the format torch_export:
torch.compile, and AOTInductor, which compiles beforehand.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.passes import move_to_device_pass

from benchmarks import artifacts
from benchmarks.suites.efficiency import SINGLE_CALL, STEPPING, Case, make_tensors, zeros
from server.core.spec import NUM_STEPS, STEP_INDEX, GraphSpec, ProgramSpec, TensorSpec
from server.models import artifact
from server.runtime import RUNTIMES, Device, Graph, Tensors, bind_graph
from server.runtime.base import detach_outputs

UNET = Case("unet", 20, "steps")
UNET_FILE = artifacts.CUSTOM_MODELS / f"{UNET.model}.py"
CASES = {case.model: case for case in (*STEPPING, *SINGLE_CALL, UNET)}
# The compiler makes a program of its own for one row, and may choose other kernels for few rows.
_COMPILED_ROWS = (64, 1, 8)
FORMATS = {"TorchScript": "torchscript", "torch.export": "torch_export", "ONNX Runtime": "onnx"}


@dataclass(frozen=True)
class StepGraph:
    """Graph of a program, with the tensors that it reads and writes.

    Attributes:
        case: model, operation and steps.
        program: program of the graph.
        graph: specification of the graph.
        results: tensors that it returns.
        files: file of the graph in each format.
    """

    case: Case
    program: ProgramSpec
    graph: GraphSpec
    results: tuple[TensorSpec, ...]
    files: Mapping[str, Path]

    def inputs(self, rows: int, device: torch.device) -> list[Tensor]:
        """Return random tensors [rows, *shape]: state and inputs as well, in contrast to `make_tensors`."""
        case, program = self.case, self.program
        tensors = make_tensors(program, rows, {**program.defaults(), **case.parameters})
        tensors[NUM_STEPS].fill_(max(1, case.steps))
        tensors[STEP_INDEX].random_(0, max(1, case.steps))
        for spec in (*program.state, *(item.tensor for item in program.inputs)):
            fill_random(tensors[spec.name], spec)
        return [tensors[tensor.name].to(device) for tensor in self.graph.inputs]

    def bind(self, graph: Graph, rows: int, device: torch.device) -> Callable[[], None]:
        """Return a call of a graph that reads random tensors and writes others, all on the device."""
        return bind_graph(graph, self.inputs(rows, device), zeros(self.results, rows, device))


def read(models: Path, case: Case) -> StepGraph:
    """Read the artifact NAME/1 in the directory `models`."""
    _, spec = artifact.read(models / case.model / "1")
    program = spec.programs[case.operation]
    graph, results = (program.step, program.state) if program.step else (program.readout, program.outputs)
    files = {format: paths[graph.name] for format, paths in spec.files.items()}
    return StepGraph(case, program, graph, results, files)


def fill_random(tensor: Tensor, spec: TensorSpec) -> None:
    """Fill a tensor with random numbers within the bounds of its specification."""
    low, high = spec.minimum, spec.maximum
    if not tensor.is_floating_point():
        first = 0 if low is None else math.ceil(low)
        last = first + 1 if high is None else math.floor(high)
        tensor.copy_(torch.randint(first, last + 1, tensor.shape))
    elif low is None or high is None:
        tensor.normal_()
    else:
        tensor.uniform_(low, high)


def open_graph(step_graph: StepGraph, runtime: str, device: Device) -> Graph:
    """Open a graph in one of the server's runtimes, named as in FORMATS."""
    format = FORMATS[runtime]
    return RUNTIMES[format](step_graph.files[format], step_graph.graph, device)


def load_exported(step_graph: StepGraph, device: torch.device) -> torch.export.ExportedProgram:
    """Return the exported program of a graph on a device."""
    program = torch.export.load(step_graph.files[FORMATS["torch.export"]])
    return program if device.type == "cpu" else move_to_device_pass(program, device)


def open_compiled(step_graph: StepGraph, device: torch.device) -> Graph:
    """Return a graph that torch.compile has compiled for any number of rows."""
    compiled = torch.compile(load_exported(step_graph, device).module())

    def call(inputs: Tensors) -> Tensors:
        with torch.no_grad():
            return detach_outputs(compiled(*inputs), inputs)

    for rows in _COMPILED_ROWS:
        inputs = step_graph.inputs(rows, device)
        for tensor in inputs if rows > 1 else ():
            torch._dynamo.mark_dynamic(tensor, 0)
        call(inputs)
    return call


def compile_package(step_graph: StepGraph, device: torch.device, path: Path, is_single: bool) -> None:
    """Compile a graph for any number of rows with AOTInductor.

    Args:
        step_graph: graph to compile.
        device: device that will run it.
        path: file to write, *.pt2.
        is_single: whether it is the only one: C++ headers that are compiled beforehand pay for several.
    """
    torch._inductor.aoti_compile_and_package(
        load_exported(step_graph, device),
        package_path=str(path),
        inductor_configs={"aot_inductor.precompile_headers": not is_single},
    )


def open_package(path: Path) -> Graph:
    """Open a graph that AOTInductor compiled."""
    # Without threads' locks, which wait for events: a CUDA graph cannot hold that.
    loaded: Any = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)

    def call(inputs: Tensors) -> Tensors:
        return detach_outputs(loaded(*inputs), inputs)

    return call
