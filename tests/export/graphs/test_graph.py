"""Graphs: files compute what modules do in any batch, and impure ones are refused."""

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


class Idle(nn.Module):
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
def test_a_file_computes_what_its_module_does(
    mix: graph.Graph, format: str, batch: int, tmp_path: Path
) -> None:
    path = graph.write(mix, [format], tmp_path)[format]
    arrays: list[graph.Array] = [
        np.random.default_rng(0).normal(size=(batch, 4)).astype(np.float32),
        np.arange(batch) % 2,
    ]
    for got, expected in zip(
        graph.load(path, format)(arrays), graph.eager_function(mix.module)(arrays), strict=True
    ):
        assert got.dtype == expected.dtype
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_onnx_files_are_one_file_with_the_names_of_the_contract(mix: graph.Graph, tmp_path: Path) -> None:
    model = onnx.load(graph.write(mix, ["onnx"], tmp_path)["onnx"])
    assert [entry.name for entry in model.graph.input] == ["x", "choice"]
    assert [entry.name for entry in model.graph.output] == ["x_out", "choice_out"]
    assert [path.name for path in tmp_path.iterdir()] == ["mix.onnx"]


def test_a_module_in_training_mode_is_refused(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).train()
    with pytest.raises(graph.GraphError, match="training mode; call eval"):
        graph.write(graph_of(module, [X], [X]), ["torchscript"], tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_an_argument_that_is_not_used_is_refused(format: str, tmp_path: Path) -> None:
    idle = graph_of(Idle().eval(), [X, TensorSpec("unused")], [TensorSpec("y", shape=(4,))])
    with pytest.raises(graph.GraphError, match="takes 'unused' but does not use it"):
        graph.write(idle, [format], tmp_path)[format]


class TwoForOne(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.double()


def test_a_module_that_returns_what_it_does_not_declare_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        graph.GraphError, match=r"should return float32\[3, 4\] for y of 3 rows, and returns "
    ):
        graph.write(graph_of(TwoForOne().eval(), [X], [TensorSpec("y", shape=(4,))]), ["onnx"], tmp_path)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_branch_on_data_is_refused(format: str, tmp_path: Path) -> None:
    branch = graph_of(Branch().eval(), [X], [TensorSpec("y", shape=(4,))])
    with pytest.raises(graph.GraphError, match=f"Branch cannot be written as {format}: "):
        graph.write(branch, [format], tmp_path)[format]
