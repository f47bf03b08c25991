"""What the engine asks of a runtime: open a graph file, then call it with tensors."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from server.core.spec import GraphSpec

log = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Device:
    """Where graphs run, and on how many CPU threads each; CUDA graphs replay what was captured once."""

    name: str = "cpu"
    threads: int = 1
    cuda_graphs: bool = False

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


def device_context(device: torch.device) -> AbstractContextManager[Any]:
    """While it lasts, a GPU is the one that events, streams and captures belong to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def set_deterministic() -> None:
    """Have torch choose kernels by what is computed, not by the clock, and round float32 as float32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


class Graph(Protocol):
    """A pure function over rows: tensors [B, *row shape] in and out, in the order of its spec."""

    def __call__(self, inputs: Tensors) -> Tensors:
        """New tensors, none of them a view of an input."""
        ...


@runtime_checkable
class Bindable(Protocol):
    """A graph that has a quicker way to be called on the same tensors again and again."""

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]: ...


def bind_graph(graph: Graph, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
    """A call on these very, contiguous tensors, which writes the outputs in place."""
    return (
        graph.bind(inputs, outputs) if isinstance(graph, Bindable) else bind_by_copy(graph, inputs, outputs)
    )


def bind_by_copy(graph: Graph, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
    """The plain way: call, then copy the results."""

    def call() -> None:
        for output, result in zip(outputs, graph(inputs), strict=True):
            output.copy_(result)

    return call


def capture_cuda_graph(call: Callable[[], None], warm_up_calls: int = 3) -> Callable[[], None]:
    """Capture the kernels of a call as a CUDA graph, which is launched as one."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    # Around the capture as well: one that fails leaves its stream the current one.
    with torch.cuda.stream(stream):
        for _ in range(warm_up_calls):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=_pool(), stream=stream):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


@cache
def _pool() -> Any:
    """Captured graphs are replayed one after the other, and may use the same memory for it."""
    return torch.cuda.graph_pool_handle()


def bind_with_capture(graph: Graph, inputs: Tensors, outputs: Tensors, device: Device) -> Callable[[], None]:
    """The plain way; on CUDA one that replays a graph of its kernels, when asked to and where it can be."""
    call = bind_by_copy(graph, inputs, outputs)
    if not (device.is_cuda and device.cuda_graphs):
        return call
    try:
        return capture_cuda_graph(call)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        reason = str(error).partition("\n")[0]
        log.warning("a graph cannot be captured and is called kernel by kernel: %s", reason)
        return call


def detach_outputs(result: torch.Tensor | Tensors, inputs: Tensors) -> Tensors:
    """Outputs without history; a graph may hand an input back, which its caller then writes in place."""
    outputs = (result,) if isinstance(result, torch.Tensor) else result
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [
        output.detach().clone() if output.untyped_storage().data_ptr() in given else output.detach()
        for output in outputs
    ]


class OpenGraph(Protocol):
    """Loads a graph file; ArtifactRefused when the file is not what the spec says."""

    def __call__(self, path: Path, spec: GraphSpec, device: Device) -> Graph: ...


_OUT_OF_MEMORY = (
    "out of memory",
    "failed to allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a graph failed for want of memory, in the words of any runtime."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


# CUDA's errors that are there to stay: whatever this process asks of the device next fails as well.
_DEVICE_LOST = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "misaligned address",
    "device-side assert",
    "launch failure",
    "launch timed out",
    "hardware stack error",
    "uncorrectable ecc error",
)


def is_device_lost(error: Exception) -> bool:
    """Whether it is the device that failed, and not a graph on it."""
    text = str(error).lower()
    return "cuda" in text and any(words in text for words in _DEVICE_LOST)
