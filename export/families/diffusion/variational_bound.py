"""A lower bound on the log-likelihood of rows: how much each noise level adds to it, in expectation.

Kingma, Salimans, Poole & Ho, "Variational Diffusion Models" (2021): with z = x + sigma noise,

    -log p(x) <= E[-log p(x | z at the last level)] + KL(z at SIGMA_MAX || its normal distribution)
                 + 1/2 integral of E |x - D(z, sigma)|^2 over 1 / sigma^2,

in the limit of infinitely many steps of the reverse diffusion. The integral is an expectation over noise
levels, drawn with the density whose weight, 1 / sigma^2 + 1 / s^2, is the one of EDM's loss: under it every
level tells about as much. Levels are drawn one from each of K equal strata. Given z, x is normal around
D(z) with the last level's spread; an image of integers is one of the levels that its pixels may have.
"""

import math

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling import given, open_label
from export.families.diffusion.solvers import SIGMA_MAX
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum

# The last noise level of points, and of images as a share of the distance between two levels of a pixel.
POINT_LEVEL, LEVEL_SHARE = 0.01, 1 / 3


class DecoderLikelihood(nn.Module):
    """What is left to tell at the last noise level: p(x | z), normal around D(z) with spread `sigma`."""

    grid: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.levels, self.dimensions = denoiser.levels, denoiser.dimensions
        gap = 2 / (self.levels - 1) if self.levels else 0.0
        self.sigma = LEVEL_SHARE * gap if self.levels else POINT_LEVEL
        self.register_buffer("grid", torch.arange(self.levels) * gap - 1)

    def forward(self, clean: Tensor, denoised: Tensor) -> Tensor:
        """log p(x | z) in nats [B] of clean rows, for D(z); both [B, *shape]."""
        exponent = -batch_invariant_sum(((clean - denoised) / self.sigma).flatten(1).square()) / 2
        if not self.levels:
            return exponent - self.dimensions * math.log(self.sigma * math.sqrt(2 * math.pi))
        others = -((denoised.flatten(1).unsqueeze(2) - self.grid) / self.sigma).square() / 2
        largest = others.amax(2)
        return exponent - batch_invariant_sum(
            largest + batch_invariant_sum((others - largest.unsqueeze(2)).exp()).log()
        )


class _Init(nn.Module):
    """A row, and sums without a draw."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def begin(self, row: Tensor) -> tuple[Tensor, ...]:
        clean = self.scale(row).clone()
        nothing = torch.zeros_like(clean.flatten(1)[:, 0])
        return clean, nothing, nothing.clone(), nothing.clone()


class InitOfImage(_Init):
    """image -> no draws."""

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return self.begin(image)


class InitOfPoint(_Init):
    """point -> no draws."""

    def forward(self, point: Tensor) -> tuple[Tensor, ...]:
        return self.begin(point)


class Step(nn.Module):
    """Add a draw of all three terms, and the square of its change from the draw before it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.last_level = denoiser, DecoderLikelihood(denoiser)
        self.variance = denoiser.data_std**2
        first, last = (1 / sigma**2 + 1 / self.variance for sigma in (SIGMA_MAX, self.last_level.sigma))
        self.first, self.depth = math.log(first), math.log(last / first)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        clean: Tensor,
        sum: Tensor,
        drawn: Tensor,
        squares: Tensor,
        label: Tensor,
        level_noise: Tensor,
        row_noise: Tensor,
        last_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        weight, sigma = self.level((step_index + level_noise) / num_steps)
        denoised, last = self.denoised(clean, sigma, torch.stack([row_noise, last_noise], 1), label)
        integral = self.depth * weight * batch_invariant_sum((clean - denoised).flatten(1).square()) / 2
        now = self.last_level(clean, last) - self.prior(clean) - integral
        change = torch.where(step_index > 0, now - drawn, torch.zeros_like(now))
        return clean.clone(), sum + now, now, squares + change.square()

    def level(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """1 / sigma^2 + 1 / s^2 and sigma [B] at a position [B] between the levels, from 0 to 1."""
        weight = batch_invariant_map(torch.exp, self.first + self.depth * position)
        return weight, (weight - 1 / self.variance).clamp(min=SIGMA_MAX**-2).rsqrt()

    def denoised(self, clean: Tensor, sigma: Tensor, noise: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """D [B, *shape] at levels sigma [B] and at the last one, of a row under noise [B, 2, *shape]."""
        sigmas = torch.stack([sigma, torch.full_like(sigma, self.last_level.sigma)], 1)
        noisy = clean.unsqueeze(1) + sigmas.reshape(-1, 2, *(1 for _ in clean.shape[1:])) * noise
        labels = torch.stack([label, label], 1)
        flat: Tensor = self.denoiser(noisy.flatten(0, 1), sigmas.flatten(), labels.flatten())
        return flat.reshape(noisy.shape).unbind(1)

    def prior(self, clean: Tensor) -> Tensor:
        """KL divergence [B] of what is left of a row at SIGMA_MAX from the model's normal distribution."""
        dimensions = self.denoiser.dimensions
        excess = batch_invariant_sum(clean.flatten(1).square()) - dimensions * self.variance
        spread = dimensions * math.log1p(self.variance / SIGMA_MAX**2)
        return (excess / (SIGMA_MAX**2 + self.variance) + spread) / 2


class Mean(nn.Module):
    """The mean of the draws, and its standard error by the differences between neighbouring strata."""

    def forward(self, sum: Tensor, squares: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        count = draws.to(torch.float32)
        return sum / count, torch.sqrt(squares / (2 * (count - 1).clamp(min=1) * count))


def program(denoiser: Denoiser, value: DataSpec) -> Program:
    """score."""
    shape, images = value.tensor.shape, bool(value.num_levels)
    name = "log_likelihood" if images else "log_density"
    return Program(
        operation="score",
        init=InitOfImage(denoiser) if images else InitOfPoint(denoiser),
        step=Step(denoiser),
        readout=Mean(),
        outputs=(
            TensorSpec(name, doc="variational bound on it, in nats, given the label if there is one"),
            TensorSpec(
                "standard_error", minimum=0, doc="of the mean over draws, in nats; 0, unknown, for one draw"
            ),
        ),
        doc="Variational lower bound on the log-likelihood of a row, given the label if there is one. The "
        "mean of draws is exactly as tight in expectation however many there are.",
        state=(
            TensorSpec("clean", shape=shape, doc="the row as the network takes it"),
            TensorSpec("sum", doc="sum of the draws, in nats"),
            TensorSpec("drawn", doc="the last draw, in nats"),
            TensorSpec("squares", doc="sum of the squared differences between neighbouring draws"),
        ),
        steps=Steps(parameter="draws"),
        parameters=(
            Parameter(
                "draws", "integer", 100, 1, 5000,
                doc="draws of a noise level and of noise; each is two evaluations of the network",
            ),
        ),
        inputs=(Input(given(value, "the row")), open_label(value)),
        noise=(
            Noise("level_noise", "uniform", (), 0, "where in its stratum a draw's noise level lies"),
            Noise("row_noise", "normal", shape, 1, "what covers the row at that level"),
            Noise("last_noise", "normal", shape, 2, "what covers the row at the last level"),
        ),
        score=Score(
            "lower_bound", denoiser.dimensions, space(value), name, "standard_error", "draws"
        ),
    )  # fmt: skip


def space(value: DataSpec) -> str:
    """What a score is a mass or density of."""
    return f"integers 0..{value.num_levels - 1}" if value.num_levels else value.tensor.doc
