"""Small convolutional decoder of a VAE with random weights: a latent [32] to an image [1, 32, 32]."""

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
    """latent -> image."""

    def __init__(self) -> None:
        super().__init__()
        self.network = NETWORK

    def forward(self, latent: Tensor) -> Tensor:
        image: Tensor = self.network(latent)
        return image


DECODE = Program("decode", Decoder(), (IMAGE,), "Decode a latent into an image.", inputs=(Input(LATENT),))
MODEL = Model(DataSpec("image", IMAGE), (DECODE,))
