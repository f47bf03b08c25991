"""Smallest model: an MLP of 16 units from two floats to two floats."""

import torch
from torch import Tensor, nn

from export.custom_model import DataSpec, Input, Model, Program, TensorSpec

torch.manual_seed(0)
POINT = TensorSpec("point", shape=(2,))


class Perceptron(nn.Module):
    """point -> moved point."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)).requires_grad_(False)

    def forward(self, point: Tensor) -> Tensor:
        moved: Tensor = self.network(point)
        return moved


DECODE = Program("decode", Perceptron(), (POINT,), "Move a point.", inputs=(Input(POINT),))
MODEL = Model(DataSpec("vector", POINT), (DECODE,))
