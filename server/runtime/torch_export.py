"""Graphs as torch.export programs, on the CPU or a GPU: what follows TorchScript upstream.

A program is run operator by operator, each called from Python; on the CPU the other
runtimes are quicker. On CUDA a captured graph of kernels leaves no Python to run.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export.passes import move_to_device_pass

from server.core.errors import InvalidArtifact
from server.core.spec import GraphSpec
from server.runtime.base import Device, Tensors, bind_with_capture, detach_outputs


class TorchExportGraph:
    """An exported program, called positionally."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._device = device
        program = _load(path)
        arguments = [str(name) for name in program.graph_signature.user_inputs]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise InvalidArtifact(f"{path.name} takes {arguments}, its manifest says {expected}")
        if device.name != "cpu":  # constants inside graphs have a device too
            program = move_to_device_pass(program, device.torch)
        self._module: Any = program.module()

    def __call__(self, inputs: Tensors) -> Tensors:
        with torch.no_grad():
            return detach_outputs(self._module(*inputs), inputs)

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A call on these very tensors."""
        return bind_with_capture(self, inputs, outputs, self._device)


def _load(path: Path) -> torch.export.ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            # Until 2.13 torch wraps the file's bytes; nobody writes to weights.
            warnings.filterwarnings("ignore", r"The given buffer is not writable")
            return torch.export.load(path)
    except Exception as error:  # a file that is none raises anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InvalidArtifact(f"{path.name} is not a torch.export program: {first}") from None
