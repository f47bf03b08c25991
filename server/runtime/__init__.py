"""One graph, many ways to execute it: a runtime per file format."""

from server.runtime.base import (
    Device,
    Graph,
    OpenGraph,
    Tensors,
    bound,
    current,
    is_device_lost,
    is_out_of_memory,
    prefer_same_bits,
)
from server.runtime.onnx import OnnxGraph
from server.runtime.torch_export import TorchExportGraph
from server.runtime.torchscript import TorchScriptGraph

RUNTIMES: dict[str, OpenGraph] = {
    "onnx": OnnxGraph,
    "torchscript": TorchScriptGraph,
    "torch_export": TorchExportGraph,
}

__all__ = [
    "RUNTIMES",
    "Device",
    "Graph",
    "OnnxGraph",
    "OpenGraph",
    "Tensors",
    "bound",
    "current",
    "is_device_lost",
    "is_out_of_memory",
    "prefer_same_bits",
]
