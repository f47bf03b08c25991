"""A VAE's decoder of the usual small kind, with random weights: a latent of 32 to one 32x32 image."""

import torch
from torch import Tensor, nn

from export.custom_model import DataSpec, Input, Model, Program, TensorSpec

torch.manual_seed(0)
IMAGE = TensorSpec("image", shape=(1, 32, 32), minimum=0, maximum=1)
LATENT = TensorSpec("latent", shape=(32,))
NETWORK = nn.Sequential(
    nn.Linear(32, 1024),
    nn.Unflatten(1, (64, 4, 4)),
    nn.ReLU(),
    nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
    nn.ReLU(),
    nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1),
    nn.ReLU(),
    nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    nn.Sigmoid(),
).requires_grad_(False)


class Decoder(nn.Module):
    """The network, under the name of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.network = NETWORK

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.network(latent)
        return image


DECODE = Program("decode", Decoder(), (IMAGE,), "The image of a latent.", inputs=(Input(LATENT),))
MODEL = Model(DataSpec("image", IMAGE), (DECODE,))
