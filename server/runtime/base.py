"""Interface of a runtime: open a graph file, then call the graph with tensors."""

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
    """Device that runs graphs.

    Attributes:
        name: "cpu", "cuda" or "cuda:<index>".
        threads: CPU threads of one graph call.
        cuda_graphs: whether steps on a GPU are captured once and replayed as CUDA graphs.
    """

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
    """Return a context in which a GPU is the current device of events, streams and captures."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def set_deterministic() -> None:
    """Make torch choose kernels deterministically, and compute float32 without TF32."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def summarize_error(error: BaseException) -> str:
    """Return an error's message in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


class Graph(Protocol):
    """A pure function over rows: tensors [B, *row shape] in and out, in the order of its specification."""

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


def capture_cuda_graph(call: Callable[[], None], warm_up_calls: int = 3) -> Callable[[], None]:
    """Capture the kernels of a call as a CUDA graph, and return its replay."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    # The context includes the capture: a failed capture leaves its stream the current one.
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
    """Return one memory pool for all captured graphs, which are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def bind_with_capture(graph: Graph, inputs: Tensors, outputs: Tensors, device: Device) -> Callable[[], None]:
    """Bind by copy; on CUDA with `cuda_graphs`, as the replay of a CUDA graph where capture succeeds."""
    call = bind_by_copy(graph, inputs, outputs)
    if not (device.is_cuda and device.cuda_graphs):
        return call
    try:
        return capture_cuda_graph(call)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        log.warning("cannot capture a CUDA graph; calling its kernels one by one: %s", summarize_error(error))
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
