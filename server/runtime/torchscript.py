"""Graphs in TorchScript, on the CPU or a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.core.errors import InvalidArtifact
from server.core.spec import GraphSpec
from server.runtime.base import Device, Tensors, bind_with_capture, detach_outputs


class TorchScriptGraph:
    """A frozen TorchScript function, called positionally."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._device = device
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device.torch)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise InvalidArtifact(f"{path.name} is not a TorchScript file: {_first_line(error)}") from None
        arguments = [argument.name for argument in self._module.forward.schema.arguments][1:]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise InvalidArtifact(f"{path.name} takes {arguments}, its manifest says {expected}")
        _move_constants(self._module.graph, device)

    def __call__(self, inputs: Tensors) -> Tensors:
        # Neither no_grad nor inference_mode: a graph may differentiate inside (energies do).
        return detach_outputs(self._module(*inputs), inputs)

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A call on these very tensors."""
        return bind_with_capture(self, inputs, outputs, self._device)


def _move_constants(graph: Any, device: Device) -> None:
    """What a graph makes itself, such as a range, it makes where it was traced until it is told otherwise."""
    for node in graph.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "DeviceObjType":
            node.s_("value", device.name)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
