"""Graphs on a device that they were not written on: `meta`, which computes nothing, stands in for a GPU."""

from pathlib import Path

import pytest
import torch

from export.graphs import graph
from export.graphs.program import TensorSpec as Declared
from server.core.spec import GraphSpec, TensorSpec
from server.models import artifact
from server.runtime import RUNTIMES, Device
from tests.support.datasets import PAIRS, Pair

ELSEWHERE = Device("meta")
USUAL = [pair for pair in PAIRS if pair.is_default]


class Ramp(torch.nn.Module):
    """Adds a number to each column that it makes itself."""

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        return row + torch.arange(row.shape[1], device=row.device)


def moved(path: Path, format_: str, spec: GraphSpec) -> set[str]:
    """Where a graph that was moved leaves its answers."""
    opened = RUNTIMES[format_](path, spec, ELSEWHERE)
    rows = [
        torch.zeros(4, *tensor.shape, dtype=getattr(torch, tensor.dtype), device="meta")
        for tensor in spec.inputs
    ]
    return {output.device.type for output in opened(rows)}


@pytest.mark.parametrize("format_", ["torchscript", "torch_export"])
def test_what_a_graph_makes_itself_moves_with_it(format_: str, tmp_path: Path) -> None:
    sides = [("row", Declared("row", "float32", (5,))), ("total", Declared("total", "float32", (5,)))]
    ramp = graph.Graph("ramp", Ramp().eval(), *((side,) for _, side in sides))
    path = graph.write(ramp, [format_], tmp_path)[format_]
    spec = GraphSpec("ramp", *((TensorSpec(name, "float32", (5,)),) for name, _ in sides))
    assert moved(path, format_, spec) == {"meta"}


@pytest.mark.parametrize("pair", USUAL, ids=str)
def test_every_exported_program_moves_as_a_whole(pair: Pair, models: Path) -> None:
    # The weights of TorchScript cannot be loaded without memory for them; torch.export's can.
    _, spec = artifact.read(models / pair.model / "1")
    for name, graph_spec in spec.graphs().items():
        assert moved(spec.files["torch_export"][name], "torch_export", graph_spec) == {"meta"}, name
