"""Pixels as networks take them, and what a network says of one: mixtures of discretised logistics.

Salimans et al., "PixelCNN++" (2017), with a trace of the uniform, so that no integer
is impossible. Knows no network: the free parameters come as a tensor.
"""

import torch
from torch import Tensor
from torch.nn import functional

_UNIFORM_SHARE = 1e-4


def scaled(rows: Tensor, levels: int) -> Tensor:
    """Values as networks take them: integers 0..levels-1 as -1..1; points, without levels, as they are."""
    numbers = rows.to(torch.float32)
    return numbers * (2 / (levels - 1)) - 1 if levels else numbers


def nearest(numbers: Tensor, levels: int) -> Tensor:
    """The reverse of scaled: the nearest integers, uint8; points as they are."""
    if not levels:
        return numbers
    return ((numbers + 1) * ((levels - 1) / 2)).round().clamp(0, levels - 1).to(torch.uint8)


class PixelMixture:
    """Independent mixtures of M discretised logistics on 0..levels-1, from free parameters [..., 3 * M]."""

    def __init__(self, parameters: Tensor, levels: int) -> None:
        weights, means, scales = parameters.reshape(*parameters.shape[:-1], -1, 3).unbind(-1)
        self._top = levels - 1
        self._weights = weights.softmax(-1)
        self._means = (means / 2 + 1) * self._top / 2
        self._scales = scales.clamp(-5, 5).exp() * levels / 16

    def log_mass(self, pixels: Tensor) -> Tensor:
        """Log-mass of integer pixels [...], in nats."""
        value = pixels.unsqueeze(-1).to(self._means.dtype)
        above = (value + 0.5 - self._means) / self._scales
        below = (value - 0.5 - self._means) / self._scales
        above = torch.where(value >= self._top, torch.full_like(above, 1e4), above)
        below = torch.where(value <= 0, torch.full_like(below, -1e4), below)
        # A difference of sigmoids is taken where they are small, which keeps its digits.
        mirrored = below > 0
        upper = torch.where(mirrored, -below, above).sigmoid()
        lower = torch.where(mirrored, -above, below).sigmoid()
        mass = (self._weights * (upper - lower)).sum(-1)
        return torch.log((1 - _UNIFORM_SHARE) * mass + _UNIFORM_SHARE / (self._top + 1))

    def mean(self) -> Tensor:
        """Mean of the pixels clipped to their range, in closed form: the integral of 1 - CDF."""
        spread = functional.softplus(self._means / self._scales) - functional.softplus(
            (self._means - self._top) / self._scales
        )
        return (self._weights * self._scales * spread).sum(-1)

    def draw(self, uniform: Tensor) -> Tensor:
        """Pixels by inversion of a uniform number each: it picks the component, its remainder the value."""
        flat = uniform / _UNIFORM_SHARE * (self._top + 1) - 0.5
        share = ((uniform - _UNIFORM_SHARE) / (1 - _UNIFORM_SHARE)).clamp(0, 1).unsqueeze(-1)
        reached = self._weights.cumsum(-1)
        index = (share >= reached[..., :-1]).long().sum(-1, keepdim=True)
        weight, end, mean, scale = (
            entries.gather(-1, index) for entries in (self._weights, reached, self._means, self._scales)
        )
        rest = ((share - (end - weight)) / weight).clamp(1e-6, 1 - 1e-6)
        drawn = (mean + scale * torch.log(rest / (1 - rest))).squeeze(-1)
        return torch.where(uniform < _UNIFORM_SHARE, flat, drawn)

    def quantise(self, pixels: Tensor) -> Tensor:
        """The nearest integers of the range, uint8."""
        return pixels.round().clamp(0, self._top).to(torch.uint8)
