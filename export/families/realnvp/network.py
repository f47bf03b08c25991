"""The RealNVP network: invertible layers between rows and latents, and the loss.

Independent of programs and of the exporter.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.probability.batch_invariant_ops import batch_invariant_sum
from export.training.trainer import Network

HIDDEN_LAYERS = 2
# Bound on the absolute log-scale of one layer. A larger bound allows thin wedges of low density, into which
# held-out rows can fall.
MAX_LOG_SCALE = 1.0
# Distance of CDF values from 0 and 1, where the logit is steep.
CDF_MARGIN = 1e-3
# A standard logistic variable times this factor has variance 1.
LOGIT_SCALE = math.sqrt(3) / math.pi
# Smoothing of each pixel's histogram: PRIOR_ROWS pseudo-rows of the histogram of all pixels, and a uniform
# part.
PRIOR_ROWS, UNIFORM_WEIGHT = 20, 1e-3


class Bijection(nn.Module):
    """Invertible map of rows [..., D]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y = f(x) [..., D], and terms [..., D] that sum to log |det dy/dx|."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """Return the row x [..., D] with f(x) = y."""
        raise NotImplementedError


class EmpiricalCdf(Bijection):
    """Map of each dequantized pixel in [0, num_levels) to the scaled logit of its empirical CDF value.

    The CDF of a pixel is piecewise linear, with one piece for each integer level. The map makes the
    marginal distribution of every pixel nearly normal, so that the couplings only learn the dependence
    between pixels. It is the first iteration of Chen & Gopinath, "Gaussianization" (2000). For pixels that
    are almost always 0 the couplings alone lose a quarter of a bit.

    Args:
        rows: training rows, uint8 [N, *shape].
        num_levels: number of integer levels of a pixel.
    """

    mass_below: Tensor
    mass_above: Tensor
    mass: Tensor
    first_index: Tensor

    def __init__(self, rows: NDArray[np.uint8], num_levels: int) -> None:
        super().__init__()
        self.num_levels = num_levels
        mass = _smoothed_histograms(rows.reshape(len(rows), -1), num_levels)
        below = torch.cat([torch.zeros(len(mass), 1, dtype=mass.dtype), mass.cumsum(1)[:, :-1]], 1)
        above = torch.cat([mass.flip(1).cumsum(1).flip(1)[:, 1:], torch.zeros_like(mass[:, :1])], 1)
        self.register_buffer("mass_below", below.to(torch.float32).flatten())
        self.register_buffer("mass_above", above.to(torch.float32).flatten())
        self.register_buffer("mass", mass.to(torch.float32).flatten())
        self.register_buffer("first_index", torch.arange(len(mass)) * num_levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = x.floor().long().clamp(0, self.num_levels - 1)
        index, fraction = level + self.first_index, x - level
        # 1 - CDF has a table of its own: computed as a difference it would lose its digits near CDF = 1.
        log_cdf, log_survival = (
            (CDF_MARGIN + (1 - 2 * CDF_MARGIN) * (table[index] + self.mass[index] * part)).log()
            for table, part in ((self.mass_below, fraction), (self.mass_above, 1 - fraction))
        )
        log_slope = math.log(LOGIT_SCALE * (1 - 2 * CDF_MARGIN)) + self.mass[index].log()
        return LOGIT_SCALE * (log_cdf - log_survival), log_slope - log_cdf - log_survival

    def inverse(self, y: Tensor) -> Tensor:
        logit = y / LOGIT_SCALE
        cdf, survival = ((signed.sigmoid() - CDF_MARGIN) / (1 - 2 * CDF_MARGIN) for signed in (logit, -logit))
        is_low = logit < 0
        level = self._find_level(cdf, survival, is_low)
        index = level + self.first_index
        from_below = (cdf - self.mass_below[index]) / self.mass[index]
        from_above = 1 - (survival - self.mass_above[index]) / self.mass[index]
        return level + torch.where(is_low, from_below, from_above)

    def _find_level(self, cdf: Tensor, survival: Tensor, is_low: Tensor) -> Tensor:
        """Return the last level that begins at or below a CDF value, by bisection."""
        level = torch.zeros_like(is_low, dtype=torch.int64)
        for bit in reversed(range((self.num_levels - 1).bit_length())):
            candidate = (level + (1 << bit)).clamp(max=self.num_levels - 1)
            index = candidate + self.first_index
            # Logical operators, because ONNX Runtime has no Where for booleans.
            is_reached = (is_low & (cdf >= self.mass_below[index])) | (
                ~is_low & (survival <= self.mass_above[index - 1])
            )
            level = torch.where(is_reached, candidate, level)
        return level


def _smoothed_histograms(rows: NDArray[np.uint8], num_levels: int) -> Tensor:
    """Return the frequency of each level of each pixel, float64 [D, num_levels], smoothed."""
    counts = np.stack([np.bincount(pixel, minlength=num_levels) for pixel in rows.T])
    common = counts.sum(0) / counts.sum()
    smoothed = (counts + PRIOR_ROWS * common) / (len(rows) + PRIOR_ROWS)
    return torch.from_numpy((1 - UNIFORM_WEIGHT) * smoothed + UNIFORM_WEIGHT / num_levels)


class Affine(Bijection):
    """Elementwise scale and shift (Kingma & Dhariwal, "Glow", 2018), initialized to the identity."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dimensions))
        self.shift = nn.Parameter(torch.zeros(dimensions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = _bound_log_scale(self.scale)
        return x * log_scale.exp() + self.shift, log_scale.expand_as(x)

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-_bound_log_scale(self.scale)).exp()


class Coupling(Bijection):
    """Affine coupling: keeps the coordinates where the mask is 1; scales and shifts the others, given those.

    Args:
        mask: float32 [D] of 0 and 1.
        preset: width and dropout of the network that computes scale and shift.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, preset: Preset) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.network = _perceptron(len(mask), preset)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(x)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = self._log_scale_and_shift(y)
        return (y - shift) * (-log_scale).exp()

    def _log_scale_and_shift(self, row: Tensor) -> tuple[Tensor, Tensor]:
        transformed = 1 - self.mask
        scale, shift = self.network(row * self.mask).chunk(2, -1)
        return _bound_log_scale(scale) * transformed, shift * transformed


def _bound_log_scale(scale: Tensor) -> Tensor:
    return MAX_LOG_SCALE * torch.tanh(scale / MAX_LOG_SCALE)


def _perceptron(dimensions: int, preset: Preset) -> nn.Sequential:
    widths = [dimensions] + [preset.width] * HIDDEN_LAYERS
    hidden = [
        module
        for inputs, outputs in pairwise(widths)
        for module in (nn.Linear(inputs, outputs), nn.SiLU(), nn.Dropout(preset.dropout))
    ]
    last = nn.Linear(preset.width, 2 * dimensions)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*hidden, last)


def coupling_masks(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """Return the masks of `count` couplings over rows of this shape.

    The masks 2 i and 2 i + 1 are complementary, so together they transform every coordinate. The pattern of
    a pair is the checkerboard over all axes, then alternating coordinates along each axis, and so on in a
    cycle.

    Returns:
        `count` tensors, float32 [D] of 0 and 1, where D is the product of `shape` and 1 means kept.
    """
    axes = np.indices(shape)
    patterns = [axes.sum(0)]
    if len(shape) > 1:
        patterns += [axis for axis in axes if len(np.unique(axis)) > 1]
    return [
        torch.from_numpy((patterns[number // 2 % len(patterns)] + number) % 2).flatten().to(torch.float32)
        for number in range(count)
    ]


class RealNVP(Network):
    """Flow from rows in coordinates [..., D] to latents: couplings, each followed by an affine map.

    The coordinates of a point are its values. The coordinates of an image are its dequantized pixels, in
    which the integer i stands for the interval [i, i + 1).
    """

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = math.prod(self.shape)
        layers: list[Bijection] = [EmpiricalCdf(data.train.rows, self.num_levels)] if self.num_levels else []
        for mask in coupling_masks(self.shape, preset.depth):
            layers += [Coupling(mask, preset), Affine(self.dimensions)]
        self.layers = nn.ModuleList(layers)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents [..., D] of rows [..., D], and terms [..., D] that sum to log |det df/dx|."""
        log_det_terms = torch.zeros_like(x)
        for layer in self._bijections():
            x, terms = layer(x)
            log_det_terms = log_det_terms + terms
        return x, log_det_terms

    def decode(self, latent: Tensor) -> Tensor:
        """Return the rows [..., D] that `encode` maps to the latents [..., D]."""
        for layer in reversed(list(self._bijections())):
            latent = layer.inverse(latent)
        return latent

    def log_density(self, x: Tensor) -> Tensor:
        """Return log p(x) in nats [...] of rows [..., D]."""
        latent, log_det_terms = self.encode(x)
        terms = log_det_terms - 0.5 * latent.square() - 0.5 * math.log(2 * math.pi)
        return batch_invariant_sum(terms)

    def to_rows(self, x: Tensor) -> Tensor:
        """Convert coordinates [B, D] to rows [B, *shape]; pixels are rounded down to uint8 levels."""
        if self.num_levels:
            x = x.floor().clamp(0, self.num_levels - 1).to(torch.uint8)
        return x.reshape(-1, *self.shape)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-density in nats per dimension [B], with one uniform draw for each pixel."""
        x = rows.flatten(1).to(torch.float32)
        if self.num_levels:
            x = x + torch.rand_like(x)
        return -self.log_density(x) / self.dimensions

    def _bijections(self) -> Iterator[Bijection]:
        for layer in self.layers:
            assert isinstance(layer, Bijection)
            yield layer
