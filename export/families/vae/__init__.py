"""Variational autoencoder for images of integers.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2013): a row x has a latent z ~ N(0, I), the decoder
gives p(x | z), the encoder gives q(z | x) = N(mean, diag(std^2)), and

    log p(x) >= E_q[log p(x | z)] - KL(q || N(0, I)).

Training and scores use the importance-weighted bound of Burda et al. (2015) with K draws, which becomes
tighter with K.

Given z, the pixels are independent. Inpainting is therefore a Markov chain over z and the missing pixels
(Rezende, Mohamed & Wierstra, 2014, appendix F): encode, decode, and set the known pixels again. This is Gibbs
sampling if q(z | x) is the exact posterior. With a Metropolis-Hastings test for z, the chain converges to the
model's conditional distribution for any q (Mattei & Frellsen, "Leveraging the Exact Likelihood of Deep Latent
Variable Models", 2018).
"""

from export.families.vae.family import FAMILY
from export.families.vae.network import LATENT_DIMENSIONS, TRAINING_DRAWS, VAE

__all__ = ["FAMILY", "LATENT_DIMENSIONS", "TRAINING_DRAWS", "VAE"]
