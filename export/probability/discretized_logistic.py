"""Mixtures of discretized logistic distributions over pixel values, and the scaling of pixels.

Salimans et al., "PixelCNN++" (2017). A small weight of the uniform distribution is added, so
that every level has a positive mass. The parameters of the mixtures come as a tensor, from any network.
"""

import torch
from torch import Tensor
from torch.nn import functional

# Weight of the uniform distribution in every mixture.
_UNIFORM_WEIGHT = 1e-4


def scale_rows(rows: Tensor, num_levels: int) -> Tensor:
    """Return rows in the range that networks read.

    Args:
        rows: [B, ...], integers 0..num_levels-1, or real values if `num_levels` is 0.
        num_levels: number of levels of a pixel; 0 for data without levels.

    Returns:
        float32 of the same shape: pixels scaled to -1..1, real values unchanged.
    """
    values = rows.to(torch.float32)
    return values * (2 / (num_levels - 1)) - 1 if num_levels else values


def unscale_rows(values: Tensor, num_levels: int) -> Tensor:
    """Return the inverse of `scale_rows`: the nearest levels as uint8, or real values unchanged."""
    if not num_levels:
        return values
    return ((values + 1) * ((num_levels - 1) / 2)).round().clamp(0, num_levels - 1).to(torch.uint8)


class PixelMixture:
    """Independent mixtures of M discretized logistic distributions on the levels 0..num_levels-1.

    With u = 1e-4, the weight of the uniform distribution, and the logistic CDF F((x - mean_m) / scale_m),
    which is 0 below the first level and 1 above the last,

        p(x) = (1 - u) sum_m weight_m (F_m(x + 1/2) - F_m(x - 1/2)) + u / num_levels.
    """

    def __init__(self, parameters: Tensor, num_levels: int) -> None:
        """Read the parameters [..., 3 * M]: unconstrained weight, mean and scale of each component."""
        weights, means, scales = parameters.reshape(*parameters.shape[:-1], -1, 3).unbind(-1)
        self._max_level = num_levels - 1
        self._weights = weights.softmax(-1)
        self._means = (means / 2 + 1) * self._max_level / 2
        self._scales = scales.clamp(-5, 5).exp() * num_levels / 16

    def log_mass(self, pixels: Tensor) -> Tensor:
        """Return the log-mass of integer pixels [...], in nats [...]."""
        level = pixels.unsqueeze(-1).to(self._means.dtype)
        upper_edge = (level + 0.5 - self._means) / self._scales
        lower_edge = (level - 0.5 - self._means) / self._scales
        upper_edge = torch.where(level >= self._max_level, torch.full_like(upper_edge, 1e4), upper_edge)
        lower_edge = torch.where(level <= 0, torch.full_like(lower_edge, -1e4), lower_edge)
        # Right of the mean, both sigmoids are near 1 and their difference loses digits. There, use
        # sigmoid(a) - sigmoid(b) = sigmoid(-b) - sigmoid(-a).
        is_mirrored = lower_edge > 0
        upper = torch.where(is_mirrored, -lower_edge, upper_edge).sigmoid()
        lower = torch.where(is_mirrored, -upper_edge, lower_edge).sigmoid()
        mass = (self._weights * (upper - lower)).sum(-1)
        return torch.log((1 - _UNIFORM_WEIGHT) * mass + _UNIFORM_WEIGHT / (self._max_level + 1))

    def mean(self) -> Tensor:
        """Return the mean [...] of the continuous mixture clipped to 0..num_levels-1.

        It is the integral of 1 - CDF over this range, in closed form.
        """
        spread = functional.softplus(self._means / self._scales) - functional.softplus(
            (self._means - self._max_level) / self._scales
        )
        return (self._weights * self._scales * spread).sum(-1)

    def sample_by_inversion(self, uniform: Tensor) -> Tensor:
        """Return real-valued draws [...] by inversion of one uniform number [...] for each pixel.

        The number selects a component by the cumulative weights. The rest of the number is uniform again
        and selects the value within the component.
        """
        flat = uniform / _UNIFORM_WEIGHT * (self._max_level + 1) - 0.5
        position = ((uniform - _UNIFORM_WEIGHT) / (1 - _UNIFORM_WEIGHT)).clamp(0, 1).unsqueeze(-1)
        cumulative = self._weights.cumsum(-1)
        component = (position >= cumulative[..., :-1]).long().sum(-1, keepdim=True)
        weight, end, mean, scale = (
            entries.gather(-1, component)
            for entries in (self._weights, cumulative, self._means, self._scales)
        )
        rest = ((position - (end - weight)) / weight).clamp(1e-6, 1 - 1e-6)
        logistic = (mean + scale * torch.log(rest / (1 - rest))).squeeze(-1)
        return torch.where(uniform < _UNIFORM_WEIGHT, flat, logistic)

    def quantize(self, pixels: Tensor) -> Tensor:
        """Return the nearest levels of real-valued pixels [...], as uint8."""
        return pixels.round().clamp(0, self._max_level).to(torch.uint8)
