"""Graphs in TorchScript, on the CPU or a GPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from server.errors import ArtifactRefused
from server.runtime.base import Device
from server.spec import GraphSpec


class TorchScriptGraph:
    """A frozen TorchScript function, called positionally."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device.torch)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ArtifactRefused(f"{path.name} is not a TorchScript file: {_first_line(error)}") from None
        arguments = [argument.name for argument in self._module.forward.schema.arguments][1:]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise ArtifactRefused(f"{path.name} takes {arguments}, its manifest says {expected}")

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # Neither no_grad nor inference_mode: a graph may differentiate inside (energies do).
        result = self._module(*inputs)
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        # A graph may hand an input back; the caller writes its inputs in place.
        given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        return [
            output.detach().clone() if output.untyped_storage().data_ptr() in given else output.detach()
            for output in outputs
        ]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
