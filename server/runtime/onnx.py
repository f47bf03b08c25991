"""Graphs in ONNX, by ONNX Runtime on the CPU or on CUDA."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from server.core.errors import InvalidArtifact, RuntimeUnavailable
from server.core.spec import GraphSpec, TensorSpec
from server.runtime.base import Device, Tensors

# A server reports to its own operators, and to nobody else.
onnxruntime.disable_telemetry_events()

_ELEMENT_TYPES = {
    "bool": "tensor(bool)",
    "uint8": "tensor(uint8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
}


# Convolutions by what is computed, not by the clock; float32 as float32.
_SAME_BITS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


class OnnxGraph:
    """An ONNX Runtime session, fed by name or bound to memory."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._spec = spec
        self._device = device
        providers = _providers(device)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), _session_options(device), providers=providers
            )
        except Exception as error:  # ONNX Runtime's exceptions share no narrower base
            raise InvalidArtifact(f"{path.name} is not an ONNX graph: {str(error).splitlines()[0]}") from None
        if device.is_cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise RuntimeUnavailable("onnxruntime cannot load its CUDA provider")
        _check_types(path, "inputs", self._session.get_inputs(), spec.inputs)
        # Outputs are positional: a step's outputs bear the names of its inputs, which ONNX forbids.
        _check_types(path, "outputs", self._session.get_outputs(), spec.outputs)
        _check_names(path, self._session.get_inputs(), spec.inputs)
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Tensors) -> Tensors:
        if self._device.is_cuda:
            return self._call_bound(inputs)
        feed = {tensor.name: array.numpy() for tensor, array in zip(self._spec.inputs, inputs, strict=True)}
        return [torch.from_numpy(array) for array in self._session.run(self._outputs, feed)]

    def bind(self, inputs: Tensors, outputs: Tensors) -> Callable[[], None]:
        """A call that reads and writes these tensors' memory, which must be contiguous."""
        binding, run = self._session.io_binding(), self._session.run_with_iobinding
        is_cuda, device = self._device.is_cuda, self._device.torch
        for tensor, array in zip(self._spec.inputs, inputs, strict=True):
            binding.bind_input(tensor.name, *self._place(array, tensor.dtype))
        for name, tensor, array in zip(self._outputs, self._spec.outputs, outputs, strict=True):
            binding.bind_output(name, *self._place(array, tensor.dtype))

        # A binding holds addresses only: the default argument keeps the memory alive as long as the call.
        def call(kept: Any = (inputs, outputs)) -> None:
            if is_cuda:  # the two libraries have streams of their own
                torch.cuda.current_stream(device).synchronize()
            run(binding)
            if is_cuda:
                binding.synchronize_outputs()

        return call

    def _call_bound(self, inputs: Tensors) -> Tensors:
        """Run on tensors that are and stay in the GPU's memory."""
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


def _providers(device: Device) -> list[Any]:
    if not device.is_cuda:
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RuntimeUnavailable(
            "this onnxruntime has no CUDA provider: install onnxruntime-gpu, or serve with --device cpu"
        )
    onnxruntime.preload_dlls()  # CUDA's libraries come in torch's wheels, where nothing else looks
    options = {"device_id": device.torch.index or 0, **_SAME_BITS}
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


def _check_types(path: Path, side: str, given: Sequence[Any], expected: Sequence[TensorSpec]) -> None:
    actual = [(item.type, list(item.shape[1:])) for item in given]
    wanted = [(_ELEMENT_TYPES[tensor.dtype], list(tensor.shape)) for tensor in expected]
    if actual != wanted:
        raise InvalidArtifact(f"{path.name} has the {side} {actual}, its manifest says {wanted}")


def _check_names(path: Path, given: Sequence[Any], expected: Sequence[TensorSpec]) -> None:
    actual, wanted = [item.name for item in given], [tensor.name for tensor in expected]
    if actual != wanted:
        raise InvalidArtifact(f"{path.name} takes {actual}, its manifest says {wanted}")
