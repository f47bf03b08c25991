"""The program score: a variational lower bound on the log-likelihood of a row.

Kingma, Salimans, Poole & Ho, "Variational Diffusion Models" (2021): with z = x + sigma noise,

    -log p(x) <= E[-log p(x | z at the last level)] + KL(z at SIGMA_MAX || its normal distribution)
                 + 1/2 integral of E |x - D(z, sigma)|^2 over 1 / sigma^2,

in the limit of infinitely many steps of the reverse diffusion. The integral is an expectation over noise
levels. They are drawn with the density whose weight, 1 / sigma^2 + 1 / s^2, is that of EDM's loss, under
which all levels contribute about equally. Each of the K draws takes its level from one of K equal strata.
Given z, x is normal around D(z) with the standard deviation of the last level; for images of integers this
distribution is restricted to the levels of the pixels.
"""

import math

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.parameters import coordinate_space, known_label_input, row_input
from export.families.diffusion.solvers import SIGMA_MAX
from export.graphs.program import DataSpec, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum

# Last noise level: of points, and of images as a fraction of the distance between two scaled pixel levels.
POINT_SIGMA, PIXEL_SIGMA_FRACTION = 0.01, 1 / 3


class DecoderLikelihood(nn.Module):
    """log p(x | z) at the last noise level: normal around D(z) with standard deviation `sigma`."""

    scaled_levels: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.num_levels, self.dimensions = denoiser.num_levels, denoiser.dimensions
        spacing = 2 / (self.num_levels - 1) if self.num_levels else 0.0
        self.sigma = PIXEL_SIGMA_FRACTION * spacing if self.num_levels else POINT_SIGMA
        self.register_buffer("scaled_levels", torch.arange(self.num_levels) * spacing - 1)

    def forward(self, clean: Tensor, denoised: Tensor) -> Tensor:
        """Return log p(x | z) in nats [B] of clean rows [B, *shape], given D(z) [B, *shape]."""
        exponent = -batch_invariant_sum(((clean - denoised) / self.sigma).flatten(1).square()) / 2
        if not self.num_levels:
            return exponent - self.dimensions * math.log(self.sigma * math.sqrt(2 * math.pi))
        exponents = -((denoised.flatten(1).unsqueeze(2) - self.scaled_levels) / self.sigma).square() / 2
        largest = exponents.amax(2)
        return exponent - batch_invariant_sum(
            largest + batch_invariant_sum((exponents - largest.unsqueeze(2)).exp()).log()
        )


class _Init(nn.Module):
    """Initial state: the scaled row, and empty sums over the draws."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def initial_state(self, row: Tensor) -> tuple[Tensor, ...]:
        clean = self.scale(row).clone()
        zeros = torch.zeros_like(clean.flatten(1)[:, 0])
        return clean, zeros, zeros.clone(), zeros.clone()


class ImageInit(_Init):
    """Image -> initial state."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(image)


class PointInit(_Init):
    """Point -> initial state."""

    def forward(self, point: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(point)


class BoundStep(nn.Module):
    """Addition of one draw of the bound, and of its squared difference from the previous draw."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.decoder = denoiser, DecoderLikelihood(denoiser)
        self.variance = denoiser.data_std**2
        first, last = (1 / sigma**2 + 1 / self.variance for sigma in (SIGMA_MAX, self.decoder.sigma))
        self.log_first_weight, self.log_weight_range = math.log(first), math.log(last / first)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        clean: Tensor,
        draw_sum: Tensor,
        last_draw: Tensor,
        squared_differences: Tensor,
        label: Tensor,
        level_noise: Tensor,
        row_noise: Tensor,
        decoder_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        weight, sigma = self.sample_level((step_index + level_noise) / num_steps)
        noise = torch.stack([row_noise, decoder_noise], 1)
        denoised, denoised_last = self.denoise(clean, sigma, noise, label)
        error = batch_invariant_sum((clean - denoised).flatten(1).square())
        integral = self.log_weight_range * weight * error / 2
        draw = self.decoder(clean, denoised_last) - self.prior_divergence(clean) - integral
        difference = torch.where(step_index > 0, draw - last_draw, torch.zeros_like(draw))
        return clean.clone(), draw_sum + draw, draw, squared_differences + difference.square()

    def sample_level(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / sigma^2 + 1 / s^2 and sigma, both [B].

        Args:
            position: 0 (SIGMA_MAX) to 1 (last level), uniform in the logarithm of the weight, [B].
        """
        weight = batch_invariant_map(torch.exp, self.log_first_weight + self.log_weight_range * position)
        return weight, (weight - 1 / self.variance).clamp(min=SIGMA_MAX**-2).rsqrt()

    def denoise(self, clean: Tensor, sigma: Tensor, noise: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Return D at level `sigma` [B] and at the last level, both [B, *shape].

        Args:
            clean: rows [B, *shape].
            sigma: noise levels [B].
            noise: standard normal noise for both levels [B, 2, *shape].
            label: int64 [B].
        """
        sigmas = torch.stack([sigma, torch.full_like(sigma, self.decoder.sigma)], 1)
        noisy = clean.unsqueeze(1) + sigmas.reshape(-1, 2, *(1 for _ in clean.shape[1:])) * noise
        labels = torch.stack([label, label], 1)
        denoised: Tensor = self.denoiser(noisy.flatten(0, 1), sigmas.flatten(), labels.flatten())
        return denoised.reshape(noisy.shape).unbind(1)

    def prior_divergence(self, clean: Tensor) -> Tensor:
        """Return the KL divergence [B] of a row's distribution at SIGMA_MAX from the model's normal one."""
        dimensions = self.denoiser.dimensions
        excess = batch_invariant_sum(clean.flatten(1).square()) - dimensions * self.variance
        log_spread = dimensions * math.log1p(self.variance / SIGMA_MAX**2)
        return (excess / (SIGMA_MAX**2 + self.variance) + log_spread) / 2


class BoundReadout(nn.Module):
    """Mean of the draws, and its standard error from the differences between neighboring strata."""

    def forward(self, draw_sum: Tensor, squared_differences: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        count = draws.to(torch.float32)
        standard_error = torch.sqrt(squared_differences / (2 * (count - 1).clamp(min=1) * count))
        return draw_sum / count, standard_error


def build_program(denoiser: Denoiser, data_spec: DataSpec) -> Program:
    """Return the program score."""
    shape, is_image = data_spec.tensor.shape, bool(data_spec.num_levels)
    name = "log_likelihood" if is_image else "log_density"
    return Program(
        operation="score",
        init=ImageInit(denoiser) if is_image else PointInit(denoiser),
        step=BoundStep(denoiser),
        readout=BoundReadout(),
        outputs=(
            TensorSpec(name, doc=f"variational lower bound on the {name.replace('_', '-')}, in nats"),
            TensorSpec(
                "standard_error",
                minimum=0,
                doc="standard error of the mean over the draws, in nats; 0 (unknown) for a single draw",
            ),
        ),
        doc="Compute a variational lower bound on the log-likelihood of a row, given the label if there is "
        "one. More draws reduce the standard error; the expected value does not depend on their number.",
        state=(
            TensorSpec("clean", shape=shape, doc="row, scaled for the network"),
            TensorSpec("draw_sum", doc="sum of the draws, in nats"),
            TensorSpec("last_draw", doc="last draw, in nats"),
            TensorSpec("squared_differences", doc="sum of the squared differences between neighboring draws"),
        ),
        steps=Steps(parameter="draws"),
        parameters=(
            Parameter(
                "draws", "integer", 100, 1, 5000,
                doc="number of draws of a noise level and of noise; each takes two evaluations of the "
                "network",
            ),
        ),
        inputs=(row_input(data_spec, "row to score"), known_label_input(data_spec)),
        noise=(
            Noise("level_noise", "uniform", (), 0, "position of a draw's noise level in its stratum"),
            Noise("row_noise", "normal", shape, 1, "noise added to the row at that level"),
            Noise("decoder_noise", "normal", shape, 2, "noise added to the row at the last level"),
        ),
        score=Score(
            "lower_bound", denoiser.dimensions, coordinate_space(data_spec), name, "standard_error", "draws"
        ),
    )  # fmt: skip
