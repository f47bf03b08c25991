"""Runtime for TorchScript graphs, on the CPU or a GPU."""

from pathlib import Path
from typing import Any

import torch

from server.core.errors import InvalidArtifact
from server.core.spec import GraphSpec
from server.runtime.base import Device, Tensors, detach_outputs, summarize_error


class TorchScriptGraph:
    """A frozen TorchScript function, called with positional arguments."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device.torch)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise InvalidArtifact(
                f"{path.name} is not a TorchScript file: {summarize_error(error)}"
            ) from error
        arguments = [argument.name for argument in self._module.forward.schema.arguments][1:]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise InvalidArtifact(
                f"{path.name} has inputs {arguments}, expected {expected} as in the manifest"
            )
        _move_constants(self._module.graph, device)

    def __call__(self, inputs: Tensors) -> Tensors:
        # Neither no_grad nor inference_mode: a graph may differentiate (energies do).
        return detach_outputs(self._module(*inputs), inputs)


def _move_constants(graph: Any, device: Device) -> None:
    """Set the device of tensors that the graph creates, such as ranges; tracing recorded another one."""
    for node in graph.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "DeviceObjType":
            node.s_("value", device.name)
