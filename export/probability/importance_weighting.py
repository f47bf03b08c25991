"""Importance-weighted lower bounds on a log-density, computed by the steps of a program.

For weights w with expectation p(x), and K independent draws of them,

    E[log (w_1 + ... + w_K) / K] <= log p(x),

and the bound becomes tighter with K (Burda, Grosse & Salakhutdinov, "Importance Weighted
Autoencoders", 2015). A step takes DRAWS_PER_STEP draws. The state of a row holds the logarithms of
sum w_k and of sum w_k^2. The log-weights come as a tensor, from any family.
"""

import torch
from torch import Tensor, nn

from export.graphs.program import Parameter, Steps, TensorSpec

# A multiple of the SIMD width: sums over full vectors do not depend on the row's position in the batch.
DRAWS_PER_STEP = 16
# Logarithm of a weight of 0. It is finite, so that the state stays finite.
_LOG_ZERO = -1e30

STATE = (
    TensorSpec("log_sum", doc="logarithm of the sum of the weights"),
    TensorSpec("log_sum_of_squares", doc="logarithm of the sum of the squared weights"),
)
STEPS = Steps(parameter="draws", units_per_step=DRAWS_PER_STEP)
STANDARD_ERROR = TensorSpec(
    "standard_error", minimum=0, doc="standard error of the bound in nats; 0 (unknown) for a single draw"
)


def draws_parameter(doc: str) -> Parameter:
    """Return the parameter `draws`, K of the bound, from which STEPS derives the number of steps."""
    return Parameter("draws", "integer", 100, 1, 5000, doc=doc)


def empty_sums(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return STATE before the first draw: two tensors [B] on the device of `like`, which is [B] too."""
    empty = torch.zeros_like(like) + _LOG_ZERO
    return empty, empty.clone()


def add_log_weights(
    sums: tuple[Tensor, Tensor], log_weights: Tensor, draws: Tensor, step_index: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the draws of one step to the sums.

    Args:
        sums: STATE, two tensors [B].
        log_weights: [B, DRAWS_PER_STEP], in nats.
        draws: total number of draws [B]; draws beyond it get weight 0.
        step_index: index of the step [B].

    Returns:
        The new STATE, two tensors [B].
    """
    remaining = (draws - step_index * DRAWS_PER_STEP).unsqueeze(1)
    is_counted = torch.arange(DRAWS_PER_STEP, device=draws.device).unsqueeze(0) < remaining
    log_weights = torch.where(is_counted, log_weights, torch.full_like(log_weights, _LOG_ZERO))
    log_sum, log_sum_of_squares = sums
    return _log_add(log_sum, log_weights), _log_add(log_sum_of_squares, 2 * log_weights)


def _log_add(log_sum: Tensor, log_terms: Tensor) -> Tensor:
    largest = torch.maximum(log_sum, log_terms.amax(1))
    relative_sum = (log_terms - largest.unsqueeze(1)).exp().sum(1) + (log_sum - largest).exp()
    return largest + relative_sum.log()


class ImportanceBound(nn.Module):
    """Readout: the logarithm of the mean weight [B] and its standard error [B], in nats.

    The standard error is std(w) / (mean(w) sqrt(K)), by the delta method.
    """

    def forward(self, log_sum: Tensor, log_sum_of_squares: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        count = draws.to(torch.float32)
        relative_variance = (log_sum_of_squares - 2 * log_sum).exp() - 1 / count
        error = torch.sqrt(relative_variance.clamp(min=0) * count / (count - 1).clamp(min=1))
        return log_sum - count.log(), error
