"""Graphs: files compute the same as their modules in every batch, and invalid modules are rejected."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.graphs import graph
from export.graphs.formats import FORMATS
from export.graphs.program import TensorSpec


class Mix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, choice: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where((choice == 1).unsqueeze(1), self.layer(x), x), choice + 1


class Unused(nn.Module):
    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return 2 * x


X = TensorSpec("x", shape=(4,))
CHOICE = TensorSpec("choice", "int64")


def graph_of(module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> graph.Graph:
    return graph.Graph("mix", module, tuple(inputs), tuple(outputs))


@pytest.fixture(scope="module")
def mix() -> graph.Graph:
    torch.manual_seed(0)
    return graph_of(Mix().eval().requires_grad_(False), [X, CHOICE], [X, CHOICE])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("batch", [1, 7])
def test_graph_file_computes_same_as_module(
    mix: graph.Graph, format: str, batch: int, tmp_path: Path
) -> None:
    path = graph.write(mix, [format], tmp_path)[format]
    arrays: list[graph.Array] = [
        np.random.default_rng(0).normal(size=(batch, 4)).astype(np.float32),
        np.arange(batch) % 2,
    ]
    for actual, expected in zip(
        graph.load(path, format)(arrays), graph.eager_function(mix.module)(arrays), strict=True
    ):
        assert actual.dtype == expected.dtype
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_onnx_graph_is_one_file_with_names_of_specs(mix: graph.Graph, tmp_path: Path) -> None:
    model = onnx.load(graph.write(mix, ["onnx"], tmp_path)["onnx"])
    assert [entry.name for entry in model.graph.input] == ["x", "choice"]
    assert [entry.name for entry in model.graph.output] == ["x_out", "choice_out"]
    assert [path.name for path in tmp_path.iterdir()] == ["mix.onnx"]


def test_write_rejects_module_in_training_mode(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    with pytest.raises(graph.GraphError, match="training mode; call eval"):
        graph.write(graph_of(module, [X], [X]), ["torchscript"], tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_write_rejects_unused_argument(format: str, tmp_path: Path) -> None:
    unused = graph_of(Unused().eval(), [X, TensorSpec("unused")], [TensorSpec("y", shape=(4,))])
    with pytest.raises(graph.GraphError, match="takes 'unused' but does not use it; remove the argument"):
        graph.write(unused, [format], tmp_path)


class TwoResults(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.double()


def test_write_rejects_module_with_undeclared_results(tmp_path: Path) -> None:
    message = r"for 3 rows, expected float32\[3, 4\] as y, got float32\[3, 4\], float64\[3, 4\]"
    with pytest.raises(graph.GraphError, match=message):
        graph.write(graph_of(TwoResults().eval(), [X], [TensorSpec("y", shape=(4,))]), ["onnx"], tmp_path)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize("format", FORMATS)
def test_write_rejects_branch_on_data(format: str, tmp_path: Path) -> None:
    branch = graph_of(Branch().eval(), [X], [TensorSpec("y", shape=(4,))])
    with pytest.raises(graph.GraphError, match=f"Branch cannot be exported to {format}: "):
        graph.write(branch, [format], tmp_path)
