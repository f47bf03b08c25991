"""Purity: what a graph must not hold, because its answer would depend on more than its own row.

Random numbers, dropout that drops and batch norm that measures the batch are found
where a module runs, and in files, whoever made them. Which operators of torch draw
random numbers is what torch itself says of them. Each finding is a phrase for a person.
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
_BATCH = "normalises by the batch that a row happens to be in: call eval(), and keep running statistics"
_DROPOUT_RATES = ("p", "dropout_p", "dropout")
_ONNX_RANDOM = ("Random", "Bernoulli", "Multinomial")


def run_and_detect(module: nn.Module, arguments: Sequence[Tensor]) -> tuple[Any, list[str]]:
    """What a module returns, and what it did that no graph may do."""
    with torch.no_grad(), ModuleTracker() as tracker, _ImpurityDetector(tracker, len(arguments[0])) as watch:
        results = module(*arguments)
    return results, list(dict.fromkeys(watch.found))


def onnx_impurities(model: onnx.ModelProto) -> Iterator[str]:
    """What the nodes of an ONNX model do that no graph may do, in subgraphs and functions too."""
    nodes = list(_onnx_nodes(model))
    constants = _onnx_constants(model, nodes)
    for node in nodes:
        impurity = _onnx_impurity(node, constants)
        if impurity:
            yield f"{node.op_type} {node.name!r}{_onnx_place(node)} {impurity}"


def torchscript_impurities(block: Any) -> Iterator[str]:
    """What the nodes of a TorchScript graph do that no graph may do, in inner blocks too."""
    for node in block.nodes():
        impurity = _impurity(_overload(node), _constants(node)) if node.kind().startswith("aten::") else None
        if impurity:
            yield f"{node.kind()}{_torchscript_place(node)} {impurity}"
        for inner in (*node.blocks(), *_attributes(node)):
            yield from torchscript_impurities(inner)


def exported_impurities(program: torch.export.ExportedProgram) -> Iterator[str]:
    """What the nodes of an exported program do that no graph may do, in inner graphs too."""
    for module in program.graph_module.modules():
        if not isinstance(module, torch.fx.GraphModule):
            continue
        for node in module.graph.nodes:
            impurity = _exported_impurity(node)
            if impurity:
                yield f"{node.target}{_exported_place(node)} {impurity}"


class _ImpurityDetector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the impure operators that run, and the module that runs them."""

    def __init__(self, tracker: ModuleTracker, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self._tracker, self._batch = tracker, batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = (argument.name for argument in func._schema.arguments)
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        impurity = _impurity(func, given)
        # Instance norm is batch norm of one row that holds the channels of all.
        if impurity and not (impurity is _BATCH and len(args[0]) < self._batch):
            place = max(self._tracker.parents - {"Global"}, key=len, default="")
            self.found.append(f"{place}: {func} {impurity}")
        return func(*args, **(kwargs or {}))


def _impurity(operator: Any, given: Mapping[str, object]) -> str | None:
    """What is wrong with a call of an operator of torch whose constant arguments are known."""
    if any(given.get(name) is False for name in ("train", "training")):
        return None
    if any(given.get(name) == 0.0 for name in _DROPOUT_RATES if isinstance(given.get(name), float)):
        return None
    if torch.Tag.nondeterministic_seeded in operator.tags:
        return _RANDOM
    takes_mode = any(argument.name == "training" for argument in operator._schema.arguments)
    measures = "batch_norm_with_update" in operator._schema.name
    return _BATCH if "batch_norm" in operator._schema.name and (takes_mode or measures) else None


def _overload(node: Any) -> Any:
    schema = torch._C.parse_schema(node.schema())
    packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
    return getattr(packet, schema.overload_name or "default")


def _constants(node: Any) -> dict[str, object]:
    names = (argument.name for argument in torch._C.parse_schema(node.schema()).arguments)
    return {name: value.toIValue() for name, value in zip(names, node.inputs(), strict=False)}


def _attributes(node: Any) -> Iterator[Any]:
    """Graphs that a node holds as attributes, such as what it forks."""
    for name in node.attributeNames():
        if node.kindOf(name) == "g":
            yield node.g(name)


def _torchscript_place(node: Any) -> str:
    """The line of the model's own code that a node comes from, where the file says so."""
    lines = [line for line in node.sourceRange().splitlines() if "): " in line and "/torch/" not in line]
    return f" ({lines[0].strip()})" if lines else ""


def _exported_impurity(node: torch.fx.Node) -> str | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    names = (argument.name for argument in node.target._schema.arguments)
    return _impurity(node.target, dict(zip(names, node.args, strict=False)) | node.kwargs)


def _exported_place(node: torch.fx.Node) -> str:
    """The path of the module that a node comes from, where the file says so."""
    scopes = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return f" of {scopes[-1]}" if scopes else ""


def _onnx_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    pending = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            pending += [*attribute.g.node, *(inner for graph in attribute.graphs for inner in graph.node)]


def _onnx_constants(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> dict[str, onnx.TensorProto]:
    given = {tensor.name: tensor for tensor in model.graph.initializer}
    made = {node.output[0]: node.attribute[0].t for node in nodes if node.op_type == "Constant"}
    return given | made


def _onnx_impurity(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> str | None:
    if node.op_type.startswith(_ONNX_RANDOM):
        return _RANDOM
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        mode = constants.get(node.input[2])
        return _RANDOM if mode is None or bool(onnx.numpy_helper.to_array(mode)) else None
    if node.op_type == "BatchNormalization":
        is_training = any(each.name == "training_mode" and each.i for each in node.attribute)
        return _BATCH if is_training or len(list(filter(None, node.output))) > 1 else None
    return None


def _onnx_place(node: onnx.NodeProto) -> str:
    """The path of the module that a node comes from, where the file says so."""
    scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes", "[]")
    path = ".".join(filter(None, ast.literal_eval(scopes)[:-1]))
    return f" of {path}" if path else ""
