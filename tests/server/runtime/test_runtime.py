"""Graphs on another device: `meta`, which computes nothing, replaces a GPU."""

from pathlib import Path

import pytest
import torch

from export.graphs import graph
from export.graphs.program import TensorSpec as Declared
from server.core.spec import GraphSpec, TensorSpec
from server.models import artifact
from server.runtime import RUNTIMES, Device
from tests.support.datasets import PAIRS, Pair

META = Device("meta")
DEFAULT_PAIRS = [pair for pair in PAIRS if pair.is_default]


class Ramp(torch.nn.Module):
    """Adds a range that the graph creates."""

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return row + torch.arange(row.shape[1], device=row.device)


def output_devices(path: Path, format_: str, spec: GraphSpec) -> set[str]:
    """Return the devices of the outputs of a graph that is opened on `meta`."""
    opened = RUNTIMES[format_](path, spec, META)
    rows = [
        torch.zeros(4, *tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for tensor in spec.inputs
    ]
    return {output.device.type for output in opened(rows)}


@pytest.mark.parametrize("format_", ["torchscript", "torch_export"])
def test_tensors_created_by_a_graph_are_on_its_device(format_: str, tmp_path: Path) -> None:
    sides = [("row", Declared("row", "float32", (5,))), ("total", Declared("total", "float32", (5,)))]
    ramp = graph.Graph("ramp", Ramp().eval(), *((side,) for _, side in sides))
    path = graph.write(ramp, [format_], tmp_path)[format_]
    spec = GraphSpec("ramp", *((TensorSpec(name, "float32", (5,)),) for name, _ in sides))
    assert output_devices(path, format_, spec) == {"meta"}


@pytest.mark.parametrize("pair", DEFAULT_PAIRS, ids=str)
def test_exported_program_is_opened_on_another_device(pair: Pair, models: Path) -> None:
    # TorchScript cannot load weights on `meta`; torch.export can.
    _, spec = artifact.read(models / pair.model / "1")
    for name, graph_spec in spec.graphs().items():
        assert output_devices(spec.files["torch_export"][name], "torch_export", graph_spec) == {"meta"}, name
