"""Mixtures of normal distributions in closed form, with densities, gradients and draws as graphs.

A component is a probabilistic principal component analysis (Tipping & Bishop, "Mixtures of
probabilistic principal component analyzers", 1999): covariance F^T F + s^2 I with few rows of F,
so its inverse is (I - A^T A) / s^2 for as few rows of A. Its maximum likelihood, for rows that are
known to be its own, is one eigendecomposition. Knows no family.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.probability.batch_invariant_ops import PACKET, total

# The log-weight of a component that is only there to fill a SIMD packet.
_NEVER = -1e30


class Mixture(nn.Module):
    """Weights [K], means [K, D], isotropic standard deviations [K], orthogonal factors [K, R, D]."""

    log_weights: Tensor
    reached: Tensor
    means: Tensor
    stds: Tensor
    factors: Tensor
    directions: Tensor
    offsets: Tensor

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor, factors: Tensor) -> None:
        super().__init__()
        components, rank, dimensions = factors.shape
        self.rank, self.dimensions = rank, dimensions
        self.slots = -(-components // PACKET) * PACKET
        variances = factors.square().sum(2) + stds.square().unsqueeze(1)
        log_determinants = variances.log().sum(1) + 2 * (dimensions - rank) * stds.log()
        log_peaks = weights.log() - 0.5 * (log_determinants + dimensions * math.log(2 * math.pi))
        directions = factors / variances.sqrt().unsqueeze(2)

        self._register("log_weights", _filled(log_peaks, self.slots, _NEVER))
        self._register("reached", _filled(weights.cumsum(0)[:-1], self.slots - 1, 2.0))
        self._register("means", _filled(means, self.slots))
        self._register("stds", _filled(stds, self.slots, 1.0))
        self._register("factors", _filled(factors, self.slots).flatten(0, 1))
        self._register("directions", _filled(directions, self.slots).flatten(0, 1))
        self._register("offsets", _filled((directions * means.unsqueeze(1)).sum(2), self.slots).flatten())

    @classmethod
    def wide(cls, dimensions: int, std: float) -> "Mixture":
        """One component, N(0, std^2 I)."""
        return cls(
            torch.ones(1),
            torch.zeros(1, dimensions),
            torch.full((1,), std),
            torch.zeros(1, PACKET, dimensions),
        )

    @classmethod
    def of_classes(cls, rows: Tensor, labels: Tensor, rank: int, std: float) -> "Mixture":
        """A component for each label of rows [N, D], of the rows plus N(0, std^2 I)."""
        parts = [rows[labels == label].double() for label in torch.unique(labels)]
        weights = torch.tensor([len(part) / len(rows) for part in parts]).double()
        fits = [_principal(part, rank) for part in parts]
        means, variances, factors = (torch.stack(list(each)) for each in zip(*fits, strict=True))
        return cls(weights, means, (variances + std**2).sqrt(), factors)

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-density of x [B, D] in nats [B], and its gradient [B, D]."""
        projected = (x @ self.directions.T - self.offsets).reshape(-1, self.slots, self.rank)
        squares = total((x.unsqueeze(1) - self.means).square()) - total(projected.square())
        variances = self.stds.square()
        log_parts = self.log_weights - 0.5 * squares / variances
        largest = log_parts.amax(1, keepdim=True)
        parts = (log_parts - largest).exp()
        whole = parts.sum(1, keepdim=True)
        pulls = parts / whole / variances
        pulled = pulls.sum(1, keepdim=True) * x - pulls @ self.means
        along = (pulls.unsqueeze(2) * projected).flatten(1) @ self.directions
        return -(largest + whole.log()).squeeze(1), pulled - along

    def draw(self, component: Tensor, factor: Tensor, rest: Tensor) -> Tensor:
        """A draw [B, D] by one uniform number [B] and standard normal ones [B, R] and [B, D]."""
        index = (component.unsqueeze(1) >= self.reached).long().sum(1)
        chosen = functional.one_hot(index, self.slots).to(rest.dtype)
        along = (chosen.unsqueeze(2) * factor.unsqueeze(1)).flatten(1) @ self.factors
        return chosen @ self.means + along + (chosen @ self.stds.unsqueeze(1)) * rest

    def sample(self, count: int) -> Tensor:
        """Draws [count, D] by torch's own random numbers."""
        device = self.means.device
        return self.draw(
            torch.rand(count, device=device),
            torch.randn(count, self.rank, device=device),
            torch.randn(count, self.dimensions, device=device),
        )

    def _register(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.float())


def _filled(tensor: Tensor, count: int, value: float = 0.0) -> Tensor:
    filling = torch.full((count - len(tensor), *tensor.shape[1:]), value, dtype=tensor.dtype)
    return torch.cat([tensor, filling])


def _principal(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], isotropic variance and factors [R, D] of maximum likelihood; zeros fill up the rank."""
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    kept = min(rank, len(variances) - 1)
    rest = variances[:-kept].mean()
    lengths = (variances[-kept:] - rest).clamp(min=0).sqrt()
    factors = (axes[:, -kept:] * lengths).T
    return mean, rest, _filled(factors, rank)
