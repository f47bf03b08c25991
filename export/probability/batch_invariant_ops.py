"""Operators whose result for a row does not depend on the row's position in the batch.

Kernels process vectors of SIMD_WIDTH numbers and treat the remainder differently: they add a remainder in
another order, and compute its logarithms by another function. These operators pad to full vectors, which
leaves no remainder.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

SIMD_WIDTH = 16


def batch_invariant_sum(terms: Tensor) -> Tensor:
    """Return the sum over the last axis."""
    return functional.pad(terms, (0, -terms.shape[-1] % SIMD_WIDTH)).sum(-1)


def batch_invariant_map(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Return an elementwise transcendental function of values [B].

    Each value is repeated to a full vector of its own.
    """
    return function(values.unsqueeze(1).expand(-1, SIMD_WIDTH))[:, 0]
