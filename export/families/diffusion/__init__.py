"""Class-conditional diffusion model for points and for images of integers.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, 2022): a network
denoises rows at every noise level sigma. Trajectories between sigma 80 and 0 give samples, edits, latents
and densities. Each step of a trajectory is one call of a graph.
"""

from export.families.diffusion.family import FAMILY

__all__ = ["FAMILY"]
