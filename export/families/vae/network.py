"""The VAE network: encoder, decoder and the loss."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from export.families.base import Preset
from export.probability.discretized_logistic import PixelMixture
from export.training.trainer import Network

LATENT_DIMENSIONS = 16
# Components of a pixel's mixture.
NUM_COMPONENTS = 3
# K of the bound that is the training loss.
TRAINING_DRAWS = 5


class VAE(Network):
    """Encoder and decoder: multilayer perceptrons with SiLU (Elfwing et al. 2018) and dropout.

    The encoder maps an image scaled to -1..1 to the mean and the log-std of q(z | x). The decoder maps a
    latent to the parameters of one PixelMixture for each pixel. Below, B is the batch size and Z the number
    of latent dimensions.
    """

    def __init__(
        self, shape: tuple[int, ...], num_levels: int, latent_dimensions: int, preset: Preset
    ) -> None:
        super().__init__()
        self.shape, self.num_levels, self.latent_dimensions = shape, num_levels, latent_dimensions
        self.dimensions = math.prod(shape)
        self.encoder = _perceptron(self.dimensions, 2 * latent_dimensions, preset)
        self.decoder = _perceptron(latent_dimensions, self.dimensions * NUM_COMPONENTS * 3, preset)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the standard deviation of q(z | x), each [B, Z], for images [B, *shape]."""
        scaled = image.flatten(1).to(torch.float32) * (2 / (self.num_levels - 1)) - 1
        mean, log_std = self.encoder(scaled).chunk(2, -1)
        return mean, log_std.clamp(-6, 3).exp()

    def decode(self, latent: Tensor) -> PixelMixture:
        """Return p(x | z) for latents [..., Z]: a mixture over pixels [..., *shape]."""
        parameters = self.decoder(latent).unflatten(-1, (*self.shape, 3 * NUM_COMPONENTS))
        return PixelMixture(parameters, self.num_levels)

    def log_weights(self, image: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x, z) - log q(z | x) in nats [B, K] at z = mean + std * noise.

        Args:
            image: x, integers [B, *shape].
            mean: mean of q(z | x) [B, Z].
            std: standard deviation of q(z | x) [B, Z].
            noise: standard normal draws [B, K, Z].
        """
        latent = mean.unsqueeze(1) + std.unsqueeze(1) * noise
        log_likelihood = self.decode(latent).log_mass(image.unsqueeze(1)).flatten(2).sum(-1)
        log_ratio = 0.5 * (noise.square() - latent.square()) + std.log().unsqueeze(1)
        return log_likelihood + log_ratio.sum(-1)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the negative bound with TRAINING_DRAWS draws, in nats per dimension [B]."""
        mean, std = self.encode(rows)
        noise = torch.randn((len(rows), TRAINING_DRAWS, self.latent_dimensions), device=mean.device)
        log_weights = self.log_weights(rows, mean, std, noise)
        return (math.log(TRAINING_DRAWS) - log_weights.logsumexp(1)) / self.dimensions


def _perceptron(inputs: int, outputs: int, preset: Preset) -> nn.Sequential:
    widths = [inputs] + [preset.width] * preset.depth
    hidden = [
        module
        for a, b in pairwise(widths)
        for module in (nn.Linear(a, b), nn.SiLU(), nn.Dropout(preset.dropout))
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], outputs))
