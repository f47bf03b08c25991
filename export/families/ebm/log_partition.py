"""log Z of a trained model: by quadrature in two dimensions, by annealed importance sampling in more.

Neal, "Annealed Importance Sampling" (2001), on the path from the base density to the model, and back again
from where it ended (Grosse, Ghahramani & Adams, "Sandwiching the marginal likelihood", 2015).
"""

import math
from dataclasses import dataclass

import torch

from export.families.ebm.energy import EnergyModel
from export.probability import langevin
from export.probability.langevin import Path

TEMPERATURES = 300
# The square over which a density of points is integrated, -LIMIT..LIMIT, and its cells on each side.
GRID_LIMIT, GRID_CELLS = 6.0, 400


@dataclass(frozen=True)
class Normaliser:
    """Estimates of log Z in nats that err to either side, each with its standard error."""

    log_z: float
    standard_error: float
    reverse: float
    reverse_standard_error: float


def normaliser(model: EnergyModel) -> Normaliser:
    """log Z of a trained model: by quadrature in two dimensions, by annealed importance sampling in more."""
    if model.dimensions == 2:
        return _quadrature(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _annealed(model)


@torch.no_grad()
def _quadrature(model: EnergyModel) -> Normaliser:
    """Midpoint sums over a square; their error is taken from a grid of half as many lines."""
    fine, coarse = (_log_sum(model, cells) for cells in (GRID_CELLS, GRID_CELLS // 2))
    error = abs(fine - coarse)
    return Normaliser(fine, error, fine, error)


def _log_sum(model: EnergyModel, cells: int) -> float:
    axis = ((torch.arange(cells) + 0.5) / cells * 2 - 1) * GRID_LIMIT
    lines = torch.cartesian_prod(axis, axis).reshape(cells, cells, 2)
    energies = torch.cat([model.energy(line)[0] for line in lines]).double()
    return float((-energies).logsumexp(0) + 2 * math.log(2 * GRID_LIMIT / cells))


def _annealed(model: EnergyModel) -> Normaliser:
    """Chains from the base to the model, and, from where they would be likely to end, back again."""
    path = Path(model.base, model.tilt)
    times, eta = torch.linspace(0, 1, TEMPERATURES + 1), model.step_size
    ends, log_weights = path.walk(model.base.sample(model.chains), times, eta, "  annealing: forwards")
    log_z, standard_error = langevin.log_mean(log_weights)
    shares = (log_weights - log_weights.max()).exp()
    likely = ends[torch.multinomial(shares, model.chains, replacement=True)]
    settled, _ = path.walk(likely, torch.ones(TEMPERATURES + 1), eta, "  annealing: settling")
    _, back = path.walk(settled, times.flip(0), eta, "  annealing: backwards")
    log_inverse, reverse_standard_error = langevin.log_mean(back)
    return Normaliser(log_z, standard_error, -log_inverse, reverse_standard_error)
