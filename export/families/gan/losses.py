"""The losses of the GAN, and the distance between samples and rows that selects its weights."""

import torch
from torch import Tensor
from torch.nn import functional

# Bandwidths of the MMD's kernels, relative to the median distance between training rows.
BANDWIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def discriminator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return softplus(-(D(x) - D(G(z)))) [B] for the logits of training and generated rows [B]."""
    return functional.softplus(generated - real)


def generator_loss(real: Tensor, generated: Tensor) -> Tensor:
    """Return softplus(-(D(G(z)) - D(x))) [B] for the logits of training and generated rows [B]."""
    return functional.softplus(real - generated)


def gradient_penalty(logits: Tensor, rows: Tensor) -> Tensor:
    """Return the squared norm [B] of each row's gradient, differentiable.

    Args:
        logits: D(x) [B], computed from `rows`.
        rows: x [B, *shape], which requires gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), rows, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def squared_mmd(a: Tensor, b: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Return the unbiased squared MMD between two sets of rows, as one term for each row [B].

    The mean of the terms is the squared MMD. The kernel is a mean of Gaussians with standard deviations
    BANDWIDTHS * scale. It is 0 between rows of different labels, so the MMD compares each class separately.

    Args:
        a: rows of the first set [B, D].
        b: rows of the second set [B, D], with the same labels.
        labels: int64 [B].
        scale: median distance between training rows, a scalar.
    """
    is_pair = (labels.unsqueeze(0) == labels.unsqueeze(1)).fill_diagonal_(False)
    within = _kernel(a, a, scale) + _kernel(b, b, scale)
    between = _kernel(a, b, scale) + _kernel(b, a, scale)
    return ((within - between) * is_pair).sum(1) / max(1, len(labels) - 1)


def _kernel(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    distances = torch.cdist(a, b) / scale
    return torch.stack([torch.exp(-0.5 * (distances / width).square()) for width in BANDWIDTHS]).mean(0)
