"""Numbers that do not depend on the slot in which a row lies.

Kernels work in SIMD packets and treat what is left over at the end otherwise: its sums are added in another
order, its logarithms rounded by another function. Over whole packets there is nothing left over.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

PACKET = 16


def total(terms: Tensor) -> Tensor:
    """Sum over the last axis, the same in whichever slot a row lies."""
    return functional.pad(terms, (0, -terms.shape[-1] % PACKET)).sum(-1)


def by_packets(function: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
    """A transcendental function of numbers [B], each spread over a packet of its own."""
    return function(numbers.unsqueeze(1).expand(-1, PACKET))[:, 0]
