"""Class-conditional diffusion model, for points and for images of integers.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2022): a network
denoises rows at every noise level sigma, and walks between sigma 80 and 0 are samples, edits, latents and
densities. Each step of a walk is one call of a graph.
"""

from export.families.diffusion.family import FAMILY

__all__ = ["FAMILY"]
