"""Purity checks: operations that make a row depend on more than its own inputs.

A graph must not draw random numbers, apply dropout or normalize by the current batch. The checks run
on modules and on graph files of any origin. The random operators of torch are those that torch itself
tags as such. Each impurity is returned as a phrase for an error message.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

_RANDOM = "draws random numbers: take them as a noise argument, or call eval() if it is dropout"
_BATCH = "normalizes by the current batch: call eval(), and keep running statistics"
_DROPOUT_RATES = ("p", "dropout_p", "dropout")
_ONNX_RANDOM = ("Random", "Bernoulli", "Multinomial")


def run_and_detect(module: nn.Module, arguments: Sequence[Tensor]) -> tuple[Any, list[str]]:
    """Run a module and detect impure operators.

    Args:
        module: The module to run.
        arguments: Its positional arguments, tensors [B, ...].

    Returns:
        What the module returns, and one phrase for each impure operator.
    """
    batch_size = len(arguments[0])
    with torch.no_grad(), ModuleTracker() as tracker, _ImpurityDetector(tracker, batch_size) as detector:
        results = module(*arguments)
    return results, list(dict.fromkeys(detector.impurities))


def onnx_impurities(model: onnx.ModelProto) -> Iterator[str]:
    """Yield the impure nodes of an ONNX model, including its subgraphs and functions."""
    nodes = list(_onnx_nodes(model))
    constants = _onnx_constants(model, nodes)
    for node in nodes:
        impurity = _onnx_impurity(node, constants)
        if impurity:
            yield f"{node.op_type} {node.name!r}{_onnx_location(node)} {impurity}"


def torchscript_impurities(block: Any) -> Iterator[str]:
    """Yield the impure nodes of a TorchScript graph, including its inner blocks."""
    for node in block.nodes():
        is_aten = node.kind().startswith("aten::")
        impurity = _aten_impurity(_aten_overload(node), _aten_constants(node)) if is_aten else None
        if impurity:
            yield f"{node.kind()}{_torchscript_location(node)} {impurity}"
        for inner in (*node.blocks(), *_subgraphs(node)):
            yield from torchscript_impurities(inner)


def exported_impurities(program: torch.export.ExportedProgram) -> Iterator[str]:
    """Yield the impure nodes of an exported program, including its inner graphs."""
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            impurity = _exported_impurity(node)
            if impurity:
                yield f"{node.target}{_exported_location(node)} {impurity}"


class _ImpurityDetector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that records impure operators and the modules that call them."""

    def __init__(self, tracker: ModuleTracker, batch_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.impurities: list[str] = []
        self._tracker, self._batch_size = tracker, batch_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = (argument.name for argument in func._schema.arguments)
        arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
        impurity = _aten_impurity(func, arguments)
        # Torch runs instance norm as batch norm of one row that holds the channels of all rows.
        if impurity and not (impurity is _BATCH and len(args[0]) < self._batch_size):
            location = max(self._tracker.parents - {"Global"}, key=len, default="")
            self.impurities.append(f"{location}: {func} {impurity}")
        return func(*args, **(kwargs or {}))


def _aten_impurity(operator: Any, arguments: Mapping[str, object]) -> str | None:
    """Return why a call of a torch operator is impure; `arguments` holds the constant arguments by name."""
    if any(arguments.get(name) is False for name in ("train", "training")):
        return None
    rates = [arguments[name] for name in _DROPOUT_RATES if name in arguments]
    if any(isinstance(rate, float) and rate == 0.0 for rate in rates):
        return None
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return _RANDOM
    has_mode = any(argument.name == "training" for argument in operator._schema.arguments)
    updates_statistics = "batch_norm_with_update" in operator._schema.name
    return _BATCH if "batch_norm" in operator._schema.name and (has_mode or updates_statistics) else None


def _aten_overload(node: Any) -> Any:
    schema = torch._C.parse_schema(node.schema())
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
    return getattr(packet, schema.overload_name or "default")


def _aten_constants(node: Any) -> dict[str, object]:
    names = (argument.name for argument in torch._C.parse_schema(node.schema()).arguments)
    return {name: value.toIValue() for name, value in zip(names, node.inputs(), strict=False)}


def _subgraphs(node: Any) -> Iterator[Any]:
    """Yield the graphs that a node holds as attributes, for example the graph that it forks."""
    for name in node.attributeNames():
        if node.kindOf(name) == "g":
            yield node.g(name)


def _torchscript_location(node: Any) -> str:
    """Return the source line of the model that a node comes from, if the file records it."""
    lines = [line for line in node.sourceRange().splitlines() if "): " in line and "/torch/" not in line]
    return f" ({lines[0].strip()})" if lines else ""


def _exported_impurity(node: torch.fx.Node) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = (argument.name for argument in node.target._schema.arguments)
    return _aten_impurity(node.target, dict(zip(names, node.args, strict=False)) | node.kwargs)


def _exported_location(node: torch.fx.Node) -> str:
    """Return the path of the module that a node comes from, if the file records it."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return f" of {paths[-1]}" if paths else ""


def _onnx_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            pending += [*attribute.g.node, *(inner for graph in attribute.graphs for inner in graph.node)]


def _onnx_constants(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> dict[str, onnx.TensorProto]:
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
    return initializers | constants


def _onnx_impurity(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    if node.op_type.startswith(_ONNX_RANDOM):
        return _RANDOM
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        mode = constants.get(node.input[2])
        return _RANDOM if mode is None or bool(onnx.numpy_helper.to_array(mode)) else None
    if node.op_type == "BatchNormalization":
        is_training = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
        return _BATCH if is_training or len(list(filter(None, node.output))) > 1 else None
    return None


def _onnx_location(node: onnx.NodeProto) -> str:
    """Return the path of the module that a node comes from, if the file records it."""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    path = ".".join(filter(None, ast.literal_eval(scopes)[:-1]))
    return f" of {path}" if path else ""
