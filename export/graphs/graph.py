"""Graphs: export of modules to files, and loading of files as functions of arrays.

A graph is a pure function of tensors with the batch axis first. An impure module is rejected before it
is written, an impure file after it is read. Of a program, this module uses the names of its tensors only.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from export.graphs import purity
from export.graphs.formats import SUFFIXES
from export.graphs.program import Program, ProgramError, TensorSpec, argument_names

Array = NDArray[Any]
GraphFunction = Callable[[Sequence[Array]], list[Array]]

OPSET = 20
# torch.export specializes on a batch of one row, and may on two. Three rows keep the batch axis dynamic.
_EXAMPLE_ROWS = 3


class GraphError(RuntimeError):
    """Raised for a module that cannot be exported, and for a file that is not a valid graph."""


@dataclass(frozen=True)
class Graph:
    """A named module; `inputs` and `outputs` describe one row of its arguments and results, in order."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def path(self, format: str) -> str:
        """Return the file name of the graph in a format."""
        return self.name + SUFFIXES[format]


def collect(programs: Sequence[Program]) -> list[Graph]:
    """Return the graphs of some programs; a module that several programs share is one graph.

    The graph of a program without init and step is named by operation and variant. All others also have
    their role in the name, for example `sample_inpaint_step`.

    Raises:
        ProgramError: If two programs use a module with different tensors.
    """
    graphs: dict[int, Graph] = {}
    for program in programs:
        has_one_graph = program.init is None and program.step is None
        for role, module, outputs in program.modules:
            name = "_".join(filter(None, (program.operation, program.variant, "" if has_one_graph else role)))
            inputs = tuple(_without_doc(program.scope[argument]) for argument in argument_names(module))
            graph = Graph(name, module, inputs, tuple(map(_without_doc, outputs)))
            _check_same_tensors(graphs.setdefault(id(module), graph), graph)
    return list(graphs.values())


def _without_doc(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, spec.shape)


def _check_same_tensors(first: Graph, second: Graph) -> None:
    if (first.inputs, first.outputs) != (second.inputs, second.outputs):
        raise ProgramError(
            f"{type(first.module).__name__} is used as {first.name} and as {second.name} with different "
            f"tensors: {first.inputs} -> {first.outputs} and {second.inputs} -> {second.outputs}; "
            "use two modules, or give the tensors the same names and shapes"
        )


def write(graph: Graph, formats: Sequence[str], directory: Path) -> dict[str, Path]:
    """Write a graph as one file per format.

    Returns:
        The path of the file by format.

    Raises:
        GraphError: If the module is not a pure function of the declared tensors, or cannot be exported.
    """
    check_module(graph)
    traces, paths = _TraceCache(graph), {format: directory / graph.path(format) for format in formats}
    for format, path in paths.items():
        try:
            _WRITERS[format](graph, traces, path)
        except GraphError:
            raise
        except Exception as error:  # Exporters raise exceptions of many types.
            raise GraphError(
                f"graph {graph.name}: {type(graph.module).__name__} cannot be exported to {format}: "
                f"{summarize_error(_root_cause(error))}"
            ) from error
    return paths


def check_module(graph: Graph) -> None:
    """Run a module on rows of zeros and check what it does and returns.

    Raises:
        GraphError: If the module is in training mode, is impure, or returns other tensors than declared.
    """
    for name, module in graph.module.named_modules():
        if module.training:
            raise GraphError(
                f"graph {graph.name}: {name or type(module).__name__} is in training mode; "
                "call eval() before exporting"
            )
    results, impurities = purity.run_and_detect(graph.module, _example_inputs(graph))
    if impurities:
        raise GraphError(f"graph {graph.name}: {'; '.join(impurities)}")
    returned = list(map(_describe, (results,) if isinstance(results, Tensor) else results))
    declared = [f"{spec.dtype}{[_EXAMPLE_ROWS, *spec.shape]}" for spec in graph.outputs]
    if returned != declared:
        names = ", ".join(spec.name for spec in graph.outputs)
        raise GraphError(
            f"graph {graph.name}: {type(graph.module).__name__}: for {_EXAMPLE_ROWS} rows, expected "
            f"{', '.join(declared)} as {names}, got {', '.join(returned)}; "
            "change forward or the declared tensors"
        )


def _describe(result: object) -> str:
    if not isinstance(result, Tensor):
        return f"a {type(result).__name__}"
    return f"{str(result.dtype).removeprefix('torch.')}{list(result.shape)}"


def summarize_error(error: BaseException) -> str:
    """Return an exception's type and full message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _root_cause(error: BaseException) -> BaseException:
    """Return the exception that started a chain; exporters wrap it in pages of general advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def load(path: Path, format: str) -> GraphFunction:
    """Load a graph file as a function of arrays in argument order.

    Raises:
        GraphError: If the file cannot be loaded in this format, or is impure.
    """
    try:
        return _LOADERS[format](path)
    except GraphError:
        raise
    except Exception as error:  # The exceptions of the libraries share no narrower base class.
        raise GraphError(
            f"{path.name}: expected a graph in {format}: {summarize_error(_root_cause(error))}"
        ) from error


def eager_function(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> GraphFunction:
    """Return a module, or a function of tensors, as a function of arrays in argument order."""

    def run(arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            results = function(*map(torch.tensor, arrays))
        return [result.numpy() for result in ((results,) if isinstance(results, Tensor) else results)]

    return run


def _example_inputs(graph: Graph) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros((_EXAMPLE_ROWS, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in graph.inputs
    )


class _TraceCache:
    """The torch.export trace of a module, shared by all formats that start from it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """The exported module, with a dynamic number of rows."""
        batch = {0: torch.export.Dim("batch", min=1, max=2**20)}
        with _quiet(), torch.no_grad():
            return torch.export.export(
                self._graph.module,
                _example_inputs(self._graph),
                dynamic_shapes=tuple(batch for _ in self._graph.inputs),
                strict=False,
            )


def _write_torch_export(graph: Graph, traces: _TraceCache, path: Path) -> None:
    program = traces.exported
    is_used = {node.name: bool(node.users) for node in program.graph.nodes if node.op == "placeholder"}
    _reject_unused(graph, [is_used[str(name)] for name in program.graph_signature.user_inputs])
    with _quiet():
        torch.export.save(program, path)


def _write_onnx(graph: Graph, traces: _TraceCache, path: Path) -> None:
    with _quiet():
        program = torch.onnx.export(
            traces.exported,
            input_names=[spec.name for spec in graph.inputs],
            output_names=_onnx_output_names(graph),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    model = onnx.load(path)
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    _reject_unused(graph, [spec.name in used for spec in graph.inputs])


def _onnx_output_names(graph: Graph) -> list[str]:
    """Return the output names; ONNX names are unique, so an output named like an input gets a suffix."""
    inputs = {spec.name for spec in graph.inputs}
    return [f"{spec.name}_out" if spec.name in inputs else spec.name for spec in graph.outputs]


def _reject_unused(graph: Graph, used: Sequence[bool]) -> None:
    for spec, is_used in zip(graph.inputs, used, strict=True):
        if not is_used:
            raise GraphError(
                f"graph {graph.name}: {type(graph.module).__name__}.forward takes {spec.name!r} but does "
                "not use it; remove the argument"
            )


def _write_torchscript(graph: Graph, traces: _TraceCache, path: Path) -> None:
    with torch.no_grad(), _quiet():
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.module, _example_inputs(graph), check_trace=False
        )
        frozen = torch.jit.freeze(traced)
    _reject_unused(graph, [bool(value.uses()) for value in list(frozen.graph.inputs())[1:]])
    frozen.save(str(path))


_KNOWN_WARNINGS = (
    (r"`torch\.jit\.\w+` is deprecated", DeprecationWarning, ""),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning, ""),
    (r"# The axis name: batch will not be used", UserWarning, ""),
    (r"No complete tensor found in the group", UserWarning, ""),
    # Before 2.13, torch.export.load wraps the read-only bytes of the file; the weights are never written to.
    (r"The given buffer is not writable", UserWarning, ""),
    (r"Converting a tensor to a Python boolean", TracerWarning, r"torch\."),
)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the known warnings of the exporters: deprecations, and warnings about their own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # A trace is used for all rows, so it must not branch on the values of the example rows.
            warnings.simplefilter("error", TracerWarning)
            for message, category, module in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message, category, module)
            yield
    finally:
        logger.setLevel(level)


def _load_onnx(path: Path) -> GraphFunction:
    model = onnx.load(path, load_external_data=False)
    _reject_impure(path, purity.onnx_impurities(model))
    if any(map(onnx.external_data_helper.uses_external_data, model.graph.initializer)):
        raise GraphError(
            f"{path.name}: weights are in external files, which no checksum covers; "
            "expected them inside the graph file; save it with external_data=False"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def run(arrays: Sequence[Array]) -> list[Array]:
        results: list[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
        return results

    return run


def _load_torchscript(path: Path) -> GraphFunction:
    with _quiet():
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    # Nodes do not keep their graph alive, so keep a reference to it while they are read.
    inlined = module.inlined_graph
    _reject_impure(path, purity.torchscript_impurities(inlined))
    return eager_function(module)


def _reject_impure(path: Path, impurities: Iterator[str]) -> None:
    found = "; ".join(impurities)
    if found:
        raise GraphError(f"{path.name}: expected a pure function, but {found}")


def _load_torch_export(path: Path) -> GraphFunction:
    with _quiet():
        program = torch.export.load(path)
    _reject_impure(path, purity.exported_impurities(program))
    return eager_function(program.module())


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch_export": _write_torch_export}
_LOADERS = {"onnx": _load_onnx, "torchscript": _load_torchscript, "torch_export": _load_torch_export}
