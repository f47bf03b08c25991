"""Class-conditional generative adversarial network, for points and for images of integers.

Goodfellow et al., "Generative Adversarial Nets" (2014): a generator G maps latents z ~ N(0, I) to rows, and a
discriminator D learns to separate generated rows from training rows. Here, D compares a training row x with a
generated row of the same class:

    D minimizes  softplus(-(D(x) - D(G(z)))) + gamma / 2 (|dD/dx|^2 + |dD/dG(z)|^2)
    G minimizes  softplus(-(D(G(z)) - D(x)))

This is the loss of Huang et al., "The GAN is dead; long live the GAN!" (R3GAN, 2024). The gradient penalty on
both kinds of rows is by Mescheder et al., "Which Training Methods for GANs do actually Converge?" (2018);
without it training may not converge. D reads the class by projection (Miyato & Koyama 2018). There is no
batch norm: its statistics would not fit the moving average of the weights, which is what is kept.

G rounds images to the levels of the data, and its gradient ignores the rounding. D therefore sees the rows
that are served, and cannot recognize training rows by their integers.

A GAN has no likelihood: D's output is not a density, and no program returns a score. The weights to keep are
selected by the squared MMD (Gretton et al., "A Kernel Two-Sample Test", 2012) between held-out rows and
samples of the same classes.
"""

from export.families.gan.family import FAMILY
from export.families.gan.network import GAN, LATENT_DIMENSIONS

__all__ = ["FAMILY", "GAN", "LATENT_DIMENSIONS"]
