"""Energy-based model for points and for images of integers.

A base density q is reweighted by exp(-f), where f is a network (exponential tilting):

    p(x) = exp(-E(x)) / Z,   E(x) = -log q(x) + f(x).

f is trained by noise-contrastive estimation (Gutmann & Hyvarinen 2012) with draws from q as the noise. The
base for points is a wide normal distribution. Images are scaled to -1..1, and the model is of images with
normal noise of standard deviation SMOOTHING_STD on each pixel: a smooth density, on which Markov chains
mix. Their base is a mixture of one normal distribution for each class. No score is a probability of
integers.
"""

from export.families.ebm.family import FAMILY

__all__ = ["FAMILY"]
