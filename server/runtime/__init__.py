"""Runtimes: one graph interface, one implementation for each file format."""

from server.runtime.base import (
    Device,
    Graph,
    OpenGraph,
    Tensors,
    bind_graph,
    device_context,
    is_device_lost,
    is_out_of_memory,
    limit_memory,
    set_deterministic,
    summarize_error,
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
    "bind_graph",
    "device_context",
    "is_device_lost",
    "is_out_of_memory",
    "limit_memory",
    "set_deterministic",
    "summarize_error",
]
