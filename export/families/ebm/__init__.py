"""Energy-based model, for points and for images of integers.

A base density q is tilted by a network f (exponential tilting):

    p(x) = exp(-E(x)) / Z,   E(x) = -log q(x) + f(x).

f is learned by noise-contrastive estimation (Gutmann & Hyvarinen 2012) with q as the noise. Points have the
wide normal distribution as base. Images are scaled to -1..1, and their density is that of images with normal
noise of standard deviation SMOOTHING on every pixel: a smooth one, which chains can walk on. Their base is a
mixture of one normal distribution for each class. No score is of the integers themselves.
"""

from export.families.ebm.family import FAMILY

__all__ = ["FAMILY"]
