"""Graphs in TorchScript, on the CPU or a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.errors import ArtifactRefused
from server.runtime.base import Device, Tensors, copying
from server.spec import GraphSpec


class TorchScriptGraph:
    """A frozen TorchScript function, called positionally."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._replays = device.is_cuda and device.cuda_graphs
        try:
            self._module: Any = torch.jit.load(str(path), map_location=device.torch)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise ArtifactRefused(f"{path.name} is not a TorchScript file: {_first_line(error)}") from None
        arguments = [argument.name for argument in self._module.forward.schema.arguments][1:]
        expected = [tensor.name for tensor in spec.inputs]
        if arguments != expected:
            raise ArtifactRefused(f"{path.name} takes {arguments}, its manifest says {expected}")

    def __call__(self, inputs: Tensors) -> Tensors:
        # Neither no_grad nor inference_mode: a graph may differentiate inside (energies do).
        result = self._module(*inputs)
        outputs = (result,) if isinstance(result, torch.Tensor) else result
        # A graph may hand an input back; the caller writes its inputs in place.
        given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        return [
            output.detach().clone() if output.untyped_storage().data_ptr() in given else output.detach()
            for output in outputs
        ]

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A call on these very tensors; on CUDA one that replays a graph of its kernels, when asked to."""
        call = copying(self, inputs, outputs)
        return captured(call) if self._replays else call


def captured(call: Callable[[], None], warm_up_calls: int = 3) -> Callable[[], None]:
    """Capture the kernels of a call as a CUDA graph, which is launched as one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up_calls):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
