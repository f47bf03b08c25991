"""Prometheus metrics of the memory of a GPU, read when they are scraped."""

from collections.abc import Iterator

import torch
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.runtime import Device


class DeviceMemoryCollector(Collector):
    """Memory of the server's GPU: of the whole card, and of PyTorch's allocator in this process."""

    def __init__(self, device: Device) -> None:
        self._device = device.torch

    def collect(self) -> Iterator[Metric]:
        """Yield the current values."""
        free, total = torch.cuda.mem_get_info(self._device)
        yield GaugeMetricFamily(
            "samovar_gpu_memory_total_bytes", "Memory of the GPU that serves the models.", total
        )
        yield GaugeMetricFamily(
            "samovar_gpu_memory_used_bytes", "Memory of the GPU in use, by any process.", total - free
        )
        torch_memory = GaugeMetricFamily(
            "samovar_torch_memory_bytes",
            "GPU memory of PyTorch: allocated to tensors, and reserved from the driver.",
            labels=["state"],
        )
        torch_memory.add_metric(["allocated"], torch.cuda.memory_allocated(self._device))
        torch_memory.add_metric(["reserved"], torch.cuda.memory_reserved(self._device))
        yield torch_memory
