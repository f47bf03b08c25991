"""Class-conditional generative adversarial network (Goodfellow et al. 2014)."""

from export.families.gan.network import (
    BANDWIDTHS,
    DRAWN,
    FAMILY,
    GAN,
    LATENT_DIMENSIONS,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    squared_mmd,
)

__all__ = [
    "BANDWIDTHS",
    "DRAWN",
    "FAMILY",
    "GAN",
    "LATENT_DIMENSIONS",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "squared_mmd",
]
