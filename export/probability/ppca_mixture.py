"""Mixtures of normal distributions in closed form: densities, gradients and draws as graphs.

A component is a probabilistic principal component analysis (PPCA; Tipping & Bishop, "Mixtures of
probabilistic principal component analyzers", 1999). Its covariance is F^T F + s^2 I with factors F [R, D],
so its inverse is (I - A^T A) / s^2 with A [R, D]. If the component of every row is known, the
maximum-likelihood estimate needs one eigendecomposition for each component.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.probability.batch_invariant_ops import SIMD_WIDTH, batch_invariant_sum

# Log-weight of the components that pad the mixture to a multiple of SIMD_WIDTH. It is finite.
_LOG_ZERO = -1e30


class PpcaMixture(nn.Module):
    """Mixture of K normal distributions with low-rank covariances, padded to K' components.

        p(x) = sum_k weight_k N(x; mean_k, F_k^T F_k + std_k^2 I)

    K' is K rounded up to a multiple of SIMD_WIDTH.
    """

    log_weights: Tensor
    cumulative_weights: Tensor
    means: Tensor
    stds: Tensor
    factors: Tensor
    directions: Tensor
    offsets: Tensor

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor, factors: Tensor) -> None:
        """Read weights [K], means [K, D], isotropic stds [K] and factors [K, R, D] with orthogonal rows."""
        super().__init__()
        components, rank, dimensions = factors.shape
        self.rank, self.dimensions = rank, dimensions
        self.num_padded = -(-components // SIMD_WIDTH) * SIMD_WIDTH
        variances = factors.square().sum(2) + stds.square().unsqueeze(1)
        log_determinants = variances.log().sum(1) + 2 * (dimensions - rank) * stds.log()
        log_peaks = weights.log() - 0.5 * (log_determinants + dimensions * math.log(2 * math.pi))
        directions = factors / variances.sqrt().unsqueeze(2)
        offsets = (directions * means.unsqueeze(1)).sum(2)

        self._register("log_weights", _pad(log_peaks, self.num_padded, _LOG_ZERO))
        self._register("cumulative_weights", _pad(weights.cumsum(0)[:-1], self.num_padded - 1, 2.0))
        self._register("means", _pad(means, self.num_padded))
        self._register("stds", _pad(stds, self.num_padded, 1.0))
        self._register("factors", _pad(factors, self.num_padded).flatten(0, 1))
        self._register("directions", _pad(directions, self.num_padded).flatten(0, 1))
        self._register("offsets", _pad(offsets, self.num_padded).flatten())

    @classmethod
    def isotropic(cls, dimensions: int, std: float) -> "PpcaMixture":
        """Return the mixture of one component N(0, std^2 I) over `dimensions` dimensions."""
        return cls(
            torch.ones(1),
            torch.zeros(1, dimensions),
            torch.full((1,), std),
            torch.zeros(1, SIMD_WIDTH, dimensions),
        )

    @classmethod
    def fit(cls, rows: Tensor, labels: Tensor, rank: int, std: float) -> "PpcaMixture":
        """Fit one component to the rows of each label, by maximum likelihood, and add noise.

        Args:
            rows: [N, D].
            labels: [N].
            rank: R, the number of factors of a component.
            std: standard deviation of the normal noise; N(0, std^2 I) is added to every component.
        """
        groups = [rows[labels == label].double() for label in torch.unique(labels)]
        weights = torch.tensor([len(group) / len(rows) for group in groups]).double()
        components = [_fit_component(group, rank) for group in groups]
        means, variances, factors = (torch.stack(list(values)) for values in zip(*components, strict=True))
        return cls(weights, means, (variances + std**2).sqrt(), factors)

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the energy -log p(x) of points x [B, D] in nats [B], and its gradient [B, D]."""
        projected = (x @ self.directions.T - self.offsets).reshape(-1, self.num_padded, self.rank)
        squared_distances = batch_invariant_sum((x.unsqueeze(1) - self.means).square())
        squares = squared_distances - batch_invariant_sum(projected.square())
        variances = self.stds.square()
        log_densities = self.log_weights - 0.5 * squares / variances
        largest = log_densities.amax(1, keepdim=True)
        densities = (log_densities - largest).exp()
        density = densities.sum(1, keepdim=True)
        responsibilities = densities / density
        precisions = responsibilities / variances
        isotropic = precisions.sum(1, keepdim=True) * x - precisions @ self.means
        low_rank = (precisions.unsqueeze(2) * projected).flatten(1) @ self.directions
        return -(largest + density.log()).squeeze(1), isotropic - low_rank

    def transform(self, uniform: Tensor, factor_noise: Tensor, noise: Tensor) -> Tensor:
        """Return draws [B, D] from random numbers.

        Args:
            uniform: [B], selects the component by inversion.
            factor_noise: standard normal [B, R], multiplies the component's factors.
            noise: standard normal [B, D], multiplies the component's isotropic standard deviation.
        """
        component = (uniform.unsqueeze(1) >= self.cumulative_weights).long().sum(1)
        selected = functional.one_hot(component, self.num_padded).to(noise.dtype)
        low_rank = (selected.unsqueeze(2) * factor_noise.unsqueeze(1)).flatten(1) @ self.factors
        return selected @ self.means + low_rank + (selected @ self.stds.unsqueeze(1)) * noise

    def sample(self, count: int) -> Tensor:
        """Return draws [count, D] from torch's random generator."""
        device = self.means.device
        return self.transform(
            torch.rand(count, device=device),
            torch.randn(count, self.rank, device=device),
            torch.randn(count, self.dimensions, device=device),
        )

    def _register(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor.float())


def _pad(tensor: Tensor, count: int, value: float = 0.0) -> Tensor:
    padding = torch.full((count - len(tensor), *tensor.shape[1:]), value, dtype=tensor.dtype)
    return torch.cat([tensor, padding])


def _fit_component(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the maximum-likelihood mean [D], isotropic variance [] and factors [R, D] of rows [N, D].

    If the rows have fewer dimensions than factors, the remaining factors are 0.
    """
    mean = rows.mean(0)
    variances, axes = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    kept = min(rank, len(variances) - 1)
    isotropic = variances[:-kept].mean()
    lengths = (variances[-kept:] - isotropic).clamp(min=0).sqrt()
    factors = (axes[:, -kept:] * lengths).T
    return mean, isotropic, _pad(factors, rank)
