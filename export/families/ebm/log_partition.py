"""Estimates of log Z of a trained model: by quadrature in two dimensions, by annealing in more.

Neal, "Annealed Importance Sampling" (2001), along the path from the base density to the model, and back
(Grosse, Ghahramani & Adams, "Sandwiching the marginal likelihood", 2015).
"""

import math
from dataclasses import dataclass

import torch

from export.families.ebm.energy import EnergyModel
from export.probability.langevin import AnnealingPath, log_mean_weight

NUM_TEMPERATURES = 300
# The density of points is integrated over the square from -GRID_LIMIT to GRID_LIMIT, GRID_CELLS x GRID_CELLS.
GRID_LIMIT, GRID_CELLS = 6.0, 400


@dataclass(frozen=True)
class LogPartition:
    """Two estimates of log Z in nats, with standard errors.

    Attributes:
        log_z: from the base to the model; its error is downwards on average.
        standard_error: of `log_z`.
        reverse_log_z: from the model to the base; its error is upwards on average.
        reverse_standard_error: of `reverse_log_z`.
    """

    log_z: float
    standard_error: float
    reverse_log_z: float
    reverse_standard_error: float


def estimate_log_partition(model: EnergyModel) -> LogPartition:
    """Return log Z of a trained model. The result is deterministic."""
    if model.dimensions == 2:
        return _quadrature(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _annealing(model)


@torch.no_grad()
def _quadrature(model: EnergyModel) -> LogPartition:
    """Integrate by midpoint sums. The error is the difference from a grid with half as many cells."""
    fine, coarse = (_log_midpoint_sum(model, cells) for cells in (GRID_CELLS, GRID_CELLS // 2))
    error = abs(fine - coarse)
    return LogPartition(fine, error, fine, error)


def _log_midpoint_sum(model: EnergyModel, cells: int) -> float:
    axis = ((torch.arange(cells) + 0.5) / cells * 2 - 1) * GRID_LIMIT
    lines = torch.cartesian_prod(axis, axis).reshape(cells, cells, 2)
    energies = torch.cat([model.energy(line)[0] for line in lines]).double()
    return float((-energies).logsumexp(0) + 2 * math.log(2 * GRID_LIMIT / cells))


def _annealing(model: EnergyModel) -> LogPartition:
    """Run chains from the base to the model, and from approximate samples of the model back to the base."""
    path = AnnealingPath(model.base, model.tilt)
    times, step_size = torch.linspace(0, 1, NUM_TEMPERATURES + 1), model.step_size
    ends, log_weights = path.anneal(
        model.base.sample(model.num_chains), times, step_size, "  annealing: forwards"
    )
    log_z, standard_error = log_mean_weight(log_weights)
    weights = (log_weights - log_weights.max()).exp()
    resampled = ends[torch.multinomial(weights, model.num_chains, replacement=True)]
    equilibrated, _ = path.anneal(
        resampled, torch.ones(NUM_TEMPERATURES + 1), step_size, "  annealing: equilibration"
    )
    _, reverse_log_weights = path.anneal(equilibrated, times.flip(0), step_size, "  annealing: backwards")
    log_inverse_z, reverse_standard_error = log_mean_weight(reverse_log_weights)
    return LogPartition(log_z, standard_error, -log_inverse_z, reverse_standard_error)
