"""Interface of a runtime: open a graph file, then call the graph with tensors."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from server.core.spec import GraphSpec

Tensors = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Device:
    """Device that runs graphs.

    Attributes:
        name: "cpu", "cuda" or "cuda:<index>".
        threads: CPU threads of one graph call.
        cuda_graphs: whether steps on a GPU are captured once and replayed as CUDA graphs.
        max_memory_bytes: memory of a GPU that torch, and each ONNX graph, may take; 0 for all of it.
    """

    name: str = "cpu"
    threads: int = 1
    cuda_graphs: bool = False
    max_memory_bytes: int = 0

    @property
    def torch(self) -> torch.device:
        return torch.device(self.name)

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")


@cache
def device_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of a GPU on which every runtime launches its kernels, in the order of the calls."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def device_context(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which a GPU and its stream are the current ones of this thread.

    Graphs, tables and transfers of a GPU are used in this context only: work on another stream would not wait
    for them.
    """
    return torch.cuda.stream(device_stream(device)) if device.type == "cuda" else nullcontext()


# Settings of the process that are never undone.
_settings = ExitStack()


def set_deterministic(device: Device) -> None:
    """Make torch choose kernels deterministically, and compute float32 without TF32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.is_cuda:
        # The fuser compiles a kernel for the first batch sizes only, whose bits differ from other kernels'.
        _settings.enter_context(torch.jit.fuser("none"))  # type: ignore[attr-defined]


def limit_memory(device: Device) -> None:
    """Limit the memory that torch takes on a GPU; ONNX Runtime has a limit of its own for each graph."""
    if device.is_cuda and device.max_memory_bytes:
        total = torch.cuda.get_device_properties(device.torch).total_memory
        share = min(1.0, device.max_memory_bytes / total)
        torch.cuda.set_per_process_memory_fraction(share, device.torch)


def summarize_error(error: BaseException) -> str:
    """Return an error's message in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class Graph(Protocol):
    """A pure function over rows: tensors [B, *row shape] in and out, in the order of its specification.

    On a GPU a call returns before its kernels have run; it is called in the `device_context`.
    """

    def __call__(self, inputs: Tensors) -> Tensors:
        """Return new tensors, none of which is a view of an input."""
        ...


@runtime_checkable
class Bindable(Protocol):
    """A graph with a faster way of repeated calls on the same tensors."""

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]: ...


def bind_graph(graph: Graph, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
    """Return a call that reads and writes these contiguous tensors in place."""
    if isinstance(graph, Bindable):
        return graph.bind(inputs, outputs)
    return bind_by_copy(graph, inputs, outputs)


def bind_by_copy(graph: Graph, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
    """Return a call of the graph that copies its results to `outputs`."""

    def call() -> None:
        for output, result in zip(outputs, graph(inputs), strict=True):
            output.copy_(result)

    return call


def detach_outputs(result: torch.Tensor | Tensors, inputs: Tensors) -> Tensors:
    """Return outputs without autograd history, cloned where the graph returned an input."""
    outputs = (result,) if isinstance(result, torch.Tensor) else result
    input_addresses = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    return [
        output.detach().clone() if output.untyped_storage().data_ptr() in input_addresses else output.detach()
        for output in outputs
    ]


class OpenGraph(Protocol):
    """Opens a graph file; raises InvalidArtifact if the file does not match the specification."""

    def __call__(self, path: Path, spec: GraphSpec, device: Device) -> Graph: ...


_OUT_OF_MEMORY = (
    "out of memory",
    "failed to allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a graph ran out of memory, by the messages of all runtimes."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error).lower() for words in _OUT_OF_MEMORY)


# CUDA errors after which every further call of this process fails as well.
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
    """Return whether an error makes the device unusable for this process."""
    text = str(error).lower()
    return "cuda" in text and any(words in text for words in _DEVICE_LOST)
