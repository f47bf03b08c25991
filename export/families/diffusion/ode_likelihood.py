"""The log-density of rows by the probability-flow ODE: an estimate, with a solver's errors.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021), section
4.3: the ODE dx/dsigma = (x - D) / sigma carries the density of rows to a normal one, and on the way

    d log p(x) / dsigma = -div (x - D) / sigma.

With y = x / sqrt(sigma^2 + s^2) and sigma = s tan(angle) it is dy/dangle = -F(y, sigma), F the network itself
(Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024), which changes
little on the long way through the noise. It is solved by the classical method of Runge and Kutta, with
shorter steps where there is little noise.

Of points the divergence is exact. Of images it is estimated along random directions (Hutchinson 1989), and
integers are spread by noise of the bound's last level z = x + sigma noise, whose density is added to:

    log p(x) >= E[log p(z) + log p(x | z) - log q(z | x)],   here by one draw.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling import given, open_label
from export.families.diffusion.solvers import SIGMA_MAX, SIGMA_MIN, per_row
from export.families.diffusion.variational_bound import DecoderLikelihood, space
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum

STAGES, MAX_STEPS = 4, 400
# Random directions of a step, and how far along them the slope is taken.
PROBES, REACH = 2, 5e-3


class InitOfPoint(nn.Module):
    """point -> where its walk begins, and the log-density that scaling it costs."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.variance = SIGMA_MIN**2 + denoiser.data_std**2

    def forward(self, point: Tensor) -> tuple[Tensor, ...]:
        y = point / math.sqrt(self.variance)
        cost = torch.full_like(point[:, 0], -0.5 * point.shape[1] * math.log(self.variance))
        return y, y.clone(), torch.zeros_like(y), cost


class InitOfImage(nn.Module):
    """image -> where the walk of a noisy draw of it begins, and what it tells of the image."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.last_level = denoiser, DecoderLikelihood(denoiser)
        self.norm = math.hypot(self.last_level.sigma, denoiser.data_std)
        # log q(z | x) + |noise|^2 / 2, and the scaling of z to y.
        spread = math.log(self.last_level.sigma * math.sqrt(2 * math.pi))
        self.cost = -denoiser.dimensions * (math.log(self.norm) - spread)

    def forward(self, image: Tensor, label: Tensor, last_noise: Tensor) -> tuple[Tensor, ...]:
        clean = self.denoiser.scale(image)
        sigma = torch.full_like(label, self.last_level.sigma, dtype=clean.dtype)
        z = clean + self.last_level.sigma * last_noise
        y, denoised = z / self.norm, self.denoiser(z, sigma, label)
        told = self.last_level(clean, denoised) + batch_invariant_sum(last_noise.flatten(1).square()) / 2
        return y, y.clone(), torch.zeros_like(y), told + self.cost, torch.zeros_like(told)


class _Step(nn.Module):
    """One of the four stages of a step of Runge and Kutta's method."""

    def __init__(self, denoiser: Denoiser, sigma: float) -> None:
        super().__init__()
        self.denoiser, self.spread = denoiser, denoiser.data_std
        self.first, self.last = (math.atan(level / self.spread) for level in (sigma, SIGMA_MAX))

    def stage(self, step_index: Tensor, num_steps: Tensor) -> "_Stage":
        """Where a stage is; evaluations that are left over go nowhere."""
        steps, step, stage = num_steps // STAGES, step_index // STAGES, step_index % STAGES
        start, end = (self._angle(torch.minimum(step + offset, steps) / steps) for offset in (0, 1))
        outer, inner = (stage == 0) | (stage == STAGES - 1), torch.full_like(start, 0.5)
        share = torch.where(outer, (stage > 0).to(start.dtype), inner)
        return _Stage(
            sigma=self.spread * batch_invariant_map(torch.tan, start + share * (end - start)),
            weight=(end - start) * torch.where(outer, inner / 3, 2 * inner / 3),
            lead=(end - start) * torch.where(stage == STAGES - 2, 2 * inner, inner),
            is_last=stage == STAGES - 1,
        )

    def _angle(self, share: Tensor) -> Tensor:
        return self.first + (self.last - self.first) * share.square()


@dataclass(frozen=True)
class _Stage:
    """Of each row [B]: noise level, weight in the step, way to the next stage, whether it ends the step."""

    sigma: Tensor
    weight: Tensor
    lead: Tensor
    is_last: Tensor

    def move(self, base: Tensor, change: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next place to look at, where the step began, and the change since then."""
        weight, lead, is_last = (per_row(part, base) for part in (self.weight, self.lead, self.is_last))
        change = change + weight * velocity
        y = base + torch.where(is_last, change, lead * velocity)
        return y, torch.where(is_last, y, base), torch.where(is_last, torch.zeros_like(y), change)


class StepOfPoint(_Step):
    """A stage with the exact divergence."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, SIGMA_MIN)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        y: Tensor,
        base: Tensor,
        change: Tensor,
        log_density: Tensor,
        label: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        stage = self.stage(step_index, num_steps)
        estimate, divergence = self.denoiser.divergence(y, stage.sigma, label)
        return *stage.move(base, change, -estimate), log_density - stage.weight * divergence


class StepOfImage(_Step):
    """A stage with the divergence along random directions, by differences."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, DecoderLikelihood(denoiser).sigma)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        y: Tensor,
        base: Tensor,
        change: Tensor,
        log_density: Tensor,
        variance: Tensor,
        label: Tensor,
        probe_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        stage = self.stage(step_index, num_steps)
        probes = torch.where(probe_noise < 0.5, -torch.ones_like(probe_noise), torch.ones_like(probe_noise))
        reach, middle = REACH * probes, y.unsqueeze(1)
        places = torch.stack([middle + reach, middle - reach], 1)
        sigma, labels = (part.unsqueeze(1).expand(-1, 2 * PROBES) for part in (stage.sigma, label))
        estimates = self.denoiser.estimate(
            places.reshape(-1, *y.shape[1:]), sigma.reshape(-1), labels.reshape(-1)
        )
        ahead, behind = estimates.reshape(places.shape).unbind(1)
        slopes = batch_invariant_sum(((ahead - behind) * probes).flatten(2)) / (2 * REACH)
        one, other = slopes.unbind(1)
        first, second = (ahead + behind).unbind(1)
        return (
            *stage.move(base, change, -(first + second) / 4),
            log_density - stage.weight * (one + other) / 2,
            variance + (stage.weight * (one - other) / 2).square(),
        )


class ReadoutOfPoint(nn.Module):
    """The end of a walk -> the log-density of its beginning."""

    def forward(self, y: Tensor, log_density: Tensor) -> Tensor:
        return log_density + _normal(y)


class ReadoutOfImage(nn.Module):
    """The end of a walk -> the log-mass of its beginning, and the standard error of its divergence."""

    def forward(self, y: Tensor, log_density: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return log_density + _normal(y), variance.sqrt()


def _normal(y: Tensor) -> Tensor:
    """Log-density [B] of the standard normal distribution."""
    flat = y.flatten(1)
    return -batch_invariant_sum(flat.square()) / 2 - flat.shape[1] * math.log(2 * math.pi) / 2


def program(denoiser: Denoiser, value: DataSpec) -> Program:
    """score:ode."""
    return _of_image(denoiser, value) if value.num_levels else _of_point(denoiser, value)


def _of_point(denoiser: Denoiser, value: DataSpec) -> Program:
    return Program(
        operation="score",
        variant="ode",
        init=InitOfPoint(denoiser),
        step=StepOfPoint(denoiser),
        readout=ReadoutOfPoint(),
        outputs=(TensorSpec("log_density", doc="of the point, in nats, given the label if there is one"),),
        doc=f"Log-density of a point, under noise of level {SIGMA_MIN:g}, by the probability-flow ODE with "
        "its exact divergence. An estimate, right up to the solver's error, which more steps make small.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(_steps(80),),
        inputs=(Input(given(value, "the point")), open_label(value)),
        score=Score("estimate", denoiser.dimensions, space(value), "log_density"),
    )


def _of_image(denoiser: Denoiser, value: DataSpec) -> Program:
    shape = value.tensor.shape
    return Program(
        operation="score",
        variant="ode",
        init=InitOfImage(denoiser),
        step=StepOfImage(denoiser),
        readout=ReadoutOfImage(),
        outputs=(
            TensorSpec("log_likelihood", doc="of the image, in nats, given the label if there is one"),
            TensorSpec(
                "divergence_error",
                minimum=0,
                doc="standard error of the divergence along the way, in nats; the noise's own is not in it",
            ),
        ),
        doc="Log-mass of an image by the probability-flow ODE, from one draw of noise of the level "
        f"{DecoderLikelihood(denoiser).sigma:.4f} (of pixels scaled to -1..1) that makes integers continuous. An "
        "estimate: the solver errs, the divergence is estimated along random directions, and a draw of the "
        "noise is in expectation below the log-mass. Of one draw no standard error can be told.",
        state=(
            *_state(value),
            TensorSpec("variance", doc="of the divergence's share of it, by pairs of directions"),
        ),
        steps=Steps(parameter="steps"),
        parameters=(_steps(40),),
        inputs=(Input(given(value, "the image")), open_label(value)),
        noise=(
            Noise("last_noise", "normal", shape, 0, "makes the integers continuous"),
            Noise("probe_noise", "uniform", (PROBES, *shape), 1, "signs: the directions of the divergence"),
        ),
        score=Score("estimate", denoiser.dimensions, space(value), "log_likelihood"),
    )


def _state(value: DataSpec) -> tuple[TensorSpec, ...]:
    shape = value.tensor.shape
    return (
        TensorSpec("y", shape=shape, doc="the row on its way, scaled to the spread of the data"),
        TensorSpec("base", shape=shape, doc="where the solver's step began"),
        TensorSpec("change", shape=shape, doc="the step so far"),
        TensorSpec("log_density", doc="what the way has added to the log-density so far, in nats"),
    )


def _steps(default: int) -> Parameter:
    return Parameter(
        "steps", "integer", default, STAGES, MAX_STEPS,
        doc=f"evaluations of the velocity and its divergence, {STAGES} for a step of Runge and Kutta's "
        "method; what is left over goes nowhere",
    )  # fmt: skip
