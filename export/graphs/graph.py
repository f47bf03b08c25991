"""Graphs: modules as files, and files as functions of arrays.

A graph is a pure function of tensors with the batch axis first. A module that
is none is refused before it is written, a file that is none after it is read.
Knows nothing of programs beyond the names of a graph's tensors.
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
# Two would let torch.export specialise on it, as it does on one; three is the smallest honest batch.
_EXAMPLE_ROWS = 3


class GraphError(RuntimeError):
    """A module that cannot become a graph, or a file that must not be one."""


@dataclass(frozen=True)
class Graph:
    """A named module with its arguments and results in order, all per row."""

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def path(self, format: str) -> str:
        """The file name in a format."""
        return self.name + SUFFIXES[format]


def collect(programs: Sequence[Program]) -> list[Graph]:
    """The graphs of some programs; a module that several use is one graph.

    A program's only graph is named by its operation and method, the others by
    their role too, such as `sample_inpaint_step`.
    """
    graphs: dict[int, Graph] = {}
    for program in programs:
        for role, module, outputs in program.modules:
            only = program.init is None and program.step is None
            name = "_".join(filter(None, (program.operation, program.variant, "" if only else role)))
            inputs = tuple(_bare(program.scope[argument]) for argument in argument_names(module))
            graph = Graph(name, module, inputs, tuple(map(_bare, outputs)))
            known = graphs.setdefault(id(module), graph)
            _refuse_disagreement(known, graph)
    return list(graphs.values())


def _bare(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, spec.dtype, spec.shape)


def _refuse_disagreement(first: Graph, second: Graph) -> None:
    if (first.inputs, first.outputs) != (second.inputs, second.outputs):
        raise ProgramError(
            f"{type(first.module).__name__} is used as {first.name} and as {second.name} with different "
            f"tensors: {first.inputs} -> {first.outputs} and {second.inputs} -> {second.outputs}; "
            "use two modules, or give the tensors the same names and shapes"
        )


def write(graph: Graph, formats: Sequence[str], directory: Path) -> dict[str, Path]:
    """Write a graph, a file per format; GraphError when it is not a pure function of what it declares."""
    check_module(graph)
    traces, paths = _TraceCache(graph), {format: directory / graph.path(format) for format in formats}
    for format, path in paths.items():
        try:
            _WRITERS[format](graph, traces, path)
        except GraphError:
            raise
        except Exception as error:  # what cannot be traced raises anything
            raise GraphError(
                f"graph {graph.name}: {type(graph.module).__name__} cannot be written as {format}: "
                f"{_cause(error)}"
            ) from error
    return paths


def check_module(graph: Graph) -> None:
    """Run a module on rows of zeros; GraphError when it is not pure or returns what it does not declare."""
    training = [
        name or type(graph.module).__name__
        for name, module in graph.module.named_modules()
        if module.training
    ]
    if training:
        raise GraphError(
            f"graph {graph.name}: {training[0]} is in training mode; call eval() before exporting"
        )
    results, impurities = purity.run_and_detect(graph.module, _examples(graph))
    if impurities:
        raise GraphError(f"graph {graph.name}: {'; '.join(impurities)}")
    returned = list(map(_described, (results,) if isinstance(results, Tensor) else results))
    declared = [f"{spec.dtype}{[_EXAMPLE_ROWS, *spec.shape]}" for spec in graph.outputs]
    if returned != declared:
        names = ", ".join(spec.name for spec in graph.outputs)
        raise GraphError(
            f"graph {graph.name}: {type(graph.module).__name__} should return {', '.join(declared)} for "
            f"{names} of {_EXAMPLE_ROWS} rows, and returns {', '.join(returned)}"
        )


def _described(result: object) -> str:
    if not isinstance(result, Tensor):
        return f"a {type(result).__name__}"
    return f"{str(result.dtype).removeprefix('torch.')}{list(result.shape)}"


def _cause(error: BaseException) -> str:
    """The first line of what went wrong at the bottom; exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def load(path: Path, format: str) -> GraphFunction:
    """Read a graph as a function of arrays in argument order; GraphError when it is none, or not pure."""
    try:
        return _LOADERS[format](path)
    except GraphError:
        raise
    except Exception as error:  # the libraries' exceptions share no narrower base
        raise GraphError(f"{path.name}: expected a graph in {format}: {_cause(error)}") from error


def eager_function(module: nn.Module) -> GraphFunction:
    """A module as a function of arrays in argument order."""
    return _torch_call(module)


def _torch_call(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> GraphFunction:
    def call(arrays: Sequence[Array]) -> list[Array]:
        with torch.no_grad():
            results = function(*map(torch.tensor, arrays))
        return [result.numpy() for result in ((results,) if isinstance(results, Tensor) else results)]

    return call


def _examples(graph: Graph) -> tuple[Tensor, ...]:
    return tuple(
        torch.zeros((_EXAMPLE_ROWS, *spec.shape), dtype=getattr(torch, spec.dtype)) for spec in graph.inputs
    )


class _TraceCache:
    """What a module does, taken down once for all formats that start from it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @cached_property
    def exported(self) -> torch.export.ExportedProgram:
        """The module as torch.export sees it, for any number of rows."""
        rows = {0: torch.export.Dim("batch", min=1, max=2**20)}
        with _quiet(), torch.no_grad():
            return torch.export.export(
                self._graph.module,
                _examples(self._graph),
                dynamic_shapes=tuple(rows for _ in self._graph.inputs),
                strict=False,
            )


def _write_torch_export(graph: Graph, traces: _TraceCache, path: Path) -> None:
    program = traces.exported
    placeholders = {node.name: bool(node.users) for node in program.graph.nodes if node.op == "placeholder"}
    _refuse_unused(graph, [placeholders[str(name)] for name in program.graph_signature.user_inputs])
    with _quiet():
        torch.export.save(program, path)


def _write_onnx(graph: Graph, traces: _TraceCache, path: Path) -> None:
    with _quiet():
        program = torch.onnx.export(
            traces.exported,
            input_names=[spec.name for spec in graph.inputs],
            output_names=_onnx_outputs(graph),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    model = onnx.load(path)
    used = {name for node in model.graph.node for name in node.input} | {o.name for o in model.graph.output}
    _refuse_unused(graph, [spec.name in used for spec in graph.inputs])


def _onnx_outputs(graph: Graph) -> list[str]:
    """ONNX has one name space for inputs and outputs, so a state that comes and goes changes its name."""
    taken = {spec.name for spec in graph.inputs}
    return [f"{spec.name}_out" if spec.name in taken else spec.name for spec in graph.outputs]


def _refuse_unused(graph: Graph, used: Sequence[bool]) -> None:
    for spec, is_used in zip(graph.inputs, used, strict=True):
        if not is_used:
            raise GraphError(
                f"graph {graph.name}: {type(graph.module).__name__}.forward takes {spec.name!r} but does "
                "not use it; remove the argument"
            )


def _write_torchscript(graph: Graph, traces: _TraceCache, path: Path) -> None:
    with torch.no_grad(), _quiet():
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            graph.module, _examples(graph), check_trace=False
        )
        frozen = torch.jit.freeze(traced)
    _refuse_unused(graph, [bool(value.uses()) for value in list(frozen.graph.inputs())[1:]])
    frozen.save(str(path))


_KNOWN_WARNINGS = (
    (r"`torch\.jit\.\w+` is deprecated", DeprecationWarning, ""),
    (r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning, ""),
    (r"# The axis name: batch will not be used", UserWarning, ""),
    (r"No complete tensor found in the group", UserWarning, ""),
    # Until 2.13 torch.export.load wraps the file's bytes; nobody writes to weights.
    (r"The given buffer is not writable", UserWarning, ""),
    (r"Converting a tensor to a Python boolean", TracerWarning, r"torch\."),
)


@contextmanager
def _quiet() -> Iterator[None]:
    """TorchScript is deprecated upstream, and the ONNX exporter warns of its own code."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # What is traced once for all rows may not branch on the numbers of some.
            warnings.simplefilter("error", TracerWarning)
            for message, category, module in _KNOWN_WARNINGS:
                warnings.filterwarnings("ignore", message, category, module)
            yield
    finally:
        logger.setLevel(level)


def _load_onnx(path: Path) -> GraphFunction:
    model = onnx.load(path, load_external_data=False)
    _refuse_impure(path, purity.onnx_impurities(model))
    if any(map(onnx.external_data_helper.uses_external_data, model.graph.initializer)):
        raise GraphError(f"{path.name}: expected its weights inside, because only its own bytes are sealed")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]

    def call(arrays: Sequence[Array]) -> list[Array]:
        results: list[Array] = session.run(None, dict(zip(names, arrays, strict=True)))
        return results

    return call


def _load_torchscript(path: Path) -> GraphFunction:
    with _quiet():
        module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    # The graph is kept while its nodes are read: they do not keep it.
    inlined = module.inlined_graph
    _refuse_impure(path, purity.torchscript_impurities(inlined))
    return _torch_call(module)


def _refuse_impure(path: Path, impurities: Iterator[str]) -> None:
    found = "; ".join(impurities)
    if found:
        raise GraphError(f"{path.name}: expected a pure function, but {found}")


def _load_torch_export(path: Path) -> GraphFunction:
    with _quiet():
        program = torch.export.load(path)
    _refuse_impure(path, purity.exported_impurities(program))
    return _torch_call(program.module())


_WRITERS = {"onnx": _write_onnx, "torchscript": _write_torchscript, "torch_export": _write_torch_export}
_LOADERS = {"onnx": _load_onnx, "torchscript": _load_torchscript, "torch_export": _load_torch_export}
