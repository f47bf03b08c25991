"""Importance-weighted bounds on a log-density, draw by draw, as part of a program.

For weights w whose expectation is p(x), and K independent draws of them,

    E[log (w_1 + ... + w_K) / K] <= log p(x),

tighter as K grows (Burda, Grosse & Salakhutdinov, "Importance Weighted
Autoencoders", 2015). A step takes DRAWS_PER_STEP draws, and a row keeps the
logarithms of two running sums. Knows no family: log-weights come as a tensor.
"""

import torch
from torch import Tensor, nn

from export.graphs.program import Parameter, Steps, TensorSpec

# Sums over rows of whole SIMD packets do not depend on where in memory, so in which slot, a row lies.
DRAWS_PER_STEP = 16
# The logarithm of a weight that counts for nothing, finite so that no row carries an infinity.
_NOTHING = -1e30

STATE = (
    TensorSpec("log_sum", doc="logarithm of the sum of the weights"),
    TensorSpec("log_sum_of_squares", doc="logarithm of the sum of their squares"),
)
STEPS = Steps(parameter="draws", units_per_step=DRAWS_PER_STEP)
STANDARD_ERROR = TensorSpec(
    "standard_error", minimum=0, doc="its standard error in nats; 0, unknown, for a single draw"
)


def draws(doc: str) -> Parameter:
    """The parameter K, by which STEPS counts."""
    return Parameter("draws", "integer", 100, 1, 5000, doc=doc)


def nothing(like: Tensor) -> tuple[Tensor, Tensor]:
    """Both sums before the first draw, each [B] like a tensor [B]."""
    empty = torch.zeros_like(like) + _NOTHING
    return empty, empty.clone()


def add(
    sums: tuple[Tensor, Tensor], log_weights: Tensor, draws: Tensor, step_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sums [B] with this step's log-weights [B, DRAWS_PER_STEP]; draws past the last count nothing."""
    remaining = (draws - step_index * DRAWS_PER_STEP).unsqueeze(1)
    counted = torch.arange(DRAWS_PER_STEP, device=draws.device).unsqueeze(0) < remaining
    log_weights = torch.where(counted, log_weights, torch.full_like(log_weights, _NOTHING))
    log_sum, log_sum_of_squares = sums
    return _add(log_sum, log_weights), _add(log_sum_of_squares, 2 * log_weights)


def _add(log_sum: Tensor, log_terms: Tensor) -> Tensor:
    largest = torch.maximum(log_sum, log_terms.amax(1))
    total = (log_terms - largest.unsqueeze(1)).exp().sum(1) + (log_sum - largest).exp()
    return largest + total.log()


class Bound(nn.Module):
    """Log of the mean weight, and its standard error by the delta method: std(w) / (mean(w) sqrt(K))."""

    def forward(self, log_sum: Tensor, log_sum_of_squares: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        count = draws.to(torch.float32)
        relative_variance = (log_sum_of_squares - 2 * log_sum).exp() - 1 / count
        error = torch.sqrt(relative_variance.clamp(min=0) * count / (count - 1).clamp(min=1))
        return log_sum - count.log(), error
