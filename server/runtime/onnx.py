"""Runtime for ONNX graphs: ONNX Runtime, on the CPU or on CUDA."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from server.core.errors import InvalidArtifact, RuntimeUnavailable
from server.core.spec import GraphSpec, TensorSpec
from server.runtime.base import Device, Tensors, device_stream, summarize_error

onnxruntime.disable_telemetry_events()

_ELEMENT_TYPES = {
    "bool": "tensor(bool)",
    "uint8": "tensor(uint8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
}


# Deterministic choice of convolution kernels, and float32 without TF32.
_DETERMINISTIC_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


class OnnxGraph:
    """An ONNX Runtime session, called with arrays or bound to memory.

    On a GPU it launches its kernels on the stream that torch uses, and waits for nothing.
    """

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._spec = spec
        self._device = device
        self._is_cuda = device.is_cuda
        providers = _providers(device)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _session_options(device), providers=providers
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise InvalidArtifact(f"{path.name} is not an ONNX graph: {summarize_error(error)}") from error
        if device.is_cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeUnavailable(
                "onnxruntime cannot load its CUDA provider; its log says why, or serve with --device cpu"
            )
        _check_types(path, "inputs", self._session.get_inputs(), spec.inputs)
        # Outputs are positional: a step's outputs have the names of its inputs, which ONNX forbids.
        _check_types(path, "outputs", self._session.get_outputs(), spec.outputs)
        _check_names(path, self._session.get_inputs(), spec.inputs)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Tensors) -> Tensors:
        if self._is_cuda:
            return self._call_bound(inputs)
        feed = {tensor.name: array.numpy() for tensor, array in zip(self._spec.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self._session.run(self._outputs, feed)]

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """Return a call that reads and writes the memory of these contiguous tensors."""
        binding, run = self._session.io_binding(), self._session.run_with_iobinding
        options = _run_options()
        for tensor, array in zip(self._spec.inputs, inputs, strict=True):
            binding.bind_input(tensor.name, *self._place(array, tensor.dtype))
        for name, tensor, array in zip(self._outputs, self._spec.outputs, outputs, strict=True):
            binding.bind_output(name, *self._place(array, tensor.dtype))

        # A binding holds addresses only: the default argument keeps the memory alive as long as the call.
        def call(kept: Any = (inputs, outputs)) -> None:
            run(binding, options)

        return call

    def _call_bound(self, inputs: Tensors) -> Tensors:
        """Run on tensors in GPU memory, and return new ones there."""
        batch = inputs[0].shape[0]
        outputs = [
            torch.empty((batch, *tensor.shape), dtype=getattr(torch, tensor.dtype), device=self._device.torch)
            for tensor in self._spec.outputs
        ]
        self.bind([array.contiguous() for array in inputs], outputs)()
        return outputs

    def _place(self, array: torch.Tensor, dtype: str) -> tuple[Any, ...]:
        kind, index = ("cuda", self._device.torch.index or 0) if self._device.is_cuda else ("cpu", 0)
        return kind, index, np.dtype(dtype), tuple(array.shape), array.data_ptr()


def _session_options(device: Device) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _run_options() -> onnxruntime.RunOptions:
    options = onnxruntime.RunOptions()
    # Without it a run on a GPU waits for its kernels at the end. On a CPU it has no effect.
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return options


def has_cuda_provider() -> bool:
    """Return whether this ONNX Runtime was built for CUDA."""
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _providers(device: Device) -> list[Any]:
    if not device.is_cuda:
        return ["CPUExecutionProvider"]
    if not has_cuda_provider():
        raise RuntimeUnavailable(
            "this onnxruntime has no CUDA provider: install onnxruntime-gpu, or serve with --device cpu"
        )
    onnxruntime.preload_dlls()  # CUDA's libraries are in torch's wheels, where the loader does not search
    options = {
        **_DETERMINISTIC_OPTIONS,
        "device_id": str(device.torch.index or 0),
        "user_compute_stream": str(device_stream(device.torch).cuda_stream),
        # The arena grows by what a graph needs, not to the next power of two.
        "arena_extend_strategy": "kSameAsRequested",
    }
    if device.max_memory_bytes:
        options["gpu_mem_limit"] = str(device.max_memory_bytes)
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def _check_types(path: Path, side: str, nodes: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    actual = [(node.type, list(node.shape[1:])) for node in nodes]
    expected = [(_ELEMENT_TYPES[tensor.dtype], list(tensor.shape)) for tensor in specs]
    if actual != expected:
        raise InvalidArtifact(f"{path.name} has {side} {actual}, expected {expected} as in the manifest")


def _check_names(path: Path, nodes: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    actual, expected = [node.name for node in nodes], [tensor.name for tensor in specs]
    if actual != expected:
        raise InvalidArtifact(f"{path.name} has inputs {actual}, expected {expected} as in the manifest")
