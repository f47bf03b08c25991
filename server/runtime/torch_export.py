"""Runtime for torch.export programs, PyTorch's successor of TorchScript, on the CPU or a GPU.

Operators are called one by one from Python, so that the other runtimes are faster on the CPU. On CUDA a
captured CUDA graph runs without Python.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from server.core.errors import InvalidArtifact
from server.core.spec import GraphSpec
from server.runtime.base import Device, Tensors, detach_outputs, summarize_error


class TorchExportGraph:
    """An exported program, called with positional arguments."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        program = _load(path)
        arguments = [str(name) for name in program.graph_signature.user_inputs]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise InvalidArtifact(
                f"{path.name} has inputs {arguments}, expected {expected} as in the manifest"
            )
        if device.name != "cpu":  # moves the constants inside the graph as well
            program = move_to_device_pass(program, device.torch)
        self._module: Any = program.module()

    def __call__(self, inputs: Tensors) -> Tensors:
        with torch.no_grad():
            return detach_outputs(self._module(*inputs), inputs)


def _load(path: Path) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            # Before 2.13 torch wraps the file's read-only bytes; weights are never written.
            warnings.filterwarnings("ignore", r"The given buffer is not writable")
            return torch.export.load(path)
    except Exception as error:  # a file of another format may raise anything
        raise InvalidArtifact(
            f"{path.name} is not a torch.export program: {summarize_error(error)}"
        ) from error
