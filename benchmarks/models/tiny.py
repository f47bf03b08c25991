"""The smallest model that is one: two floats in, an MLP of 16 units, two floats out."""

import torch
from torch import Tensor, nn

from export.custom_model import DataSpec, Input, Model, Program, TensorSpec

torch.manual_seed(0)
POINT = TensorSpec("point", shape=(2,))


class Perceptron(nn.Module):
    """Two layers, under the name of what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).requires_grad_(False)

    def forward(self, point: Tensor) -> Tensor:
        moved: Tensor = self.network(point)
        return moved


DECODE = Program("decode", Perceptron(), (POINT,), "Moves a point.", inputs=(Input(POINT),))
MODEL = Model(DataSpec("vector", POINT), (DECODE,))
