"""Variational autoencoder for images of integers (Kingma & Welling 2013)."""

from export.families.vae.programs import (
    CHAINS,
    FAMILY,
    LATENT_DIMENSIONS,
    TRAINING_DRAWS,
    VAE,
    InpaintInit,
    InpaintStep,
)

__all__ = ["CHAINS", "FAMILY", "LATENT_DIMENSIONS", "TRAINING_DRAWS", "VAE", "InpaintInit", "InpaintStep"]
