"""The program score:ode: an estimate of the log-density of a row by the probability-flow ODE.

Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021), section
4.3: the ODE dx/dsigma = (x - D) / sigma transports the density of rows to a normal density, and along it

    d log p(x) / dsigma = -div (x - D) / sigma.

With y = x / sqrt(sigma^2 + s^2) and sigma = s tan(angle) it becomes dy/dangle = -F(y, sigma), where F is the
network itself (Lu & Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", 2024). F
changes slowly at high noise levels. The solver is the classical fourth-order Runge-Kutta method, with shorter
steps at low noise levels. The result has the solver's error.

For points the divergence is exact. For images it is estimated along random directions (Hutchinson 1989).
Integers are made continuous by noise of the bound's last level, z = x + sigma noise, whose density is
accounted for:

    log p(x) >= E[log p(z) + log p(x | z) - log q(z | x)],   estimated from one draw.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.parameters import coordinate_space, known_label_input, row_input
from export.families.diffusion.solvers import SIGMA_MAX, SIGMA_MIN, broadcast_to_rows
from export.families.diffusion.variational_bound import DecoderLikelihood
from export.graphs.program import DataSpec, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum

# Stages of a Runge-Kutta step; each is one step of the program.
NUM_STAGES, MAX_STEPS = 4, 400
# Random directions of the divergence in each stage, and the step of the finite difference along them.
NUM_PROBES, PROBE_STEP = 2, 5e-3


class PointInit(nn.Module):
    """Point -> initial state: y at SIGMA_MIN, and the log-determinant of the scaling to y."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.variance = SIGMA_MIN**2 + denoiser.data_std**2

    def forward(self, point: Tensor) -> tuple[Tensor, ...]:
        y = point / math.sqrt(self.variance)
        log_determinant = torch.full_like(point[:, 0], -0.5 * point.shape[1] * math.log(self.variance))
        return y, y.clone(), torch.zeros_like(y), log_determinant


class ImageInit(nn.Module):
    """Image -> initial state: y of a noisy draw z of the image, and log p(x | z) - log q(z | x).

    The log-determinant of the scaling to y is included.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, self.decoder = denoiser, DecoderLikelihood(denoiser)
        self.norm = math.hypot(self.decoder.sigma, denoiser.data_std)
        # -log q(z | x) - |noise|^2 / 2, and the scaling of z to y.
        log_noise_scale = math.log(self.decoder.sigma * math.sqrt(2 * math.pi))
        self.constant = -denoiser.dimensions * (math.log(self.norm) - log_noise_scale)

    def forward(self, image: Tensor, label: Tensor, dequantization_noise: Tensor) -> tuple[Tensor, ...]:
        clean = self.denoiser.scale(image)
        sigma = torch.full_like(label, self.decoder.sigma, dtype=clean.dtype)
        z = clean + self.decoder.sigma * dequantization_noise
        y, denoised = z / self.norm, self.denoiser(z, sigma, label)
        squared_noise = batch_invariant_sum(dequantization_noise.flatten(1).square())
        log_ratio = self.decoder(clean, denoised) + squared_noise / 2
        return y, y.clone(), torch.zeros_like(y), log_ratio + self.constant, torch.zeros_like(log_ratio)


class _OdeStep(nn.Module):
    """One of the four stages of a Runge-Kutta step, from the noise level `sigma` to SIGMA_MAX."""

    def __init__(self, denoiser: Denoiser, sigma: float) -> None:
        super().__init__()
        self.denoiser, self.data_std = denoiser, denoiser.data_std
        self.first_angle, self.last_angle = (math.atan(level / self.data_std) for level in (sigma, SIGMA_MAX))

    def stage(self, step_index: Tensor, num_steps: Tensor) -> "_Stage":
        """Return the stage of a program step, both int64 [B].

        Steps beyond the last complete Runge-Kutta step have weight 0.
        """
        count, number, stage = num_steps // NUM_STAGES, step_index // NUM_STAGES, step_index % NUM_STAGES
        start, end = (self._angle(torch.minimum(number + offset, count) / count) for offset in (0, 1))
        is_outer, half = (stage == 0) | (stage == NUM_STAGES - 1), torch.full_like(start, 0.5)
        fraction = torch.where(is_outer, (stage > 0).to(start.dtype), half)
        return _Stage(
            sigma=self.data_std * batch_invariant_map(torch.tan, start + fraction * (end - start)),
            weight=(end - start) * torch.where(is_outer, half / 3, 2 * half / 3),
            next_offset=(end - start) * torch.where(stage == NUM_STAGES - 2, 2 * half, half),
            is_last=stage == NUM_STAGES - 1,
        )

    def _angle(self, fraction: Tensor) -> Tensor:
        return self.first_angle + (self.last_angle - self.first_angle) * fraction.square()


@dataclass(frozen=True)
class _Stage:
    """Stage of a Runge-Kutta step; every field is [B].

    Attributes:
        sigma: noise level of the evaluation.
        weight: weight of the velocity in the step, times the step's length.
        next_offset: distance of the next evaluation from the start of the step.
        is_last: whether the stage completes the step.
    """

    sigma: Tensor
    weight: Tensor
    next_offset: Tensor
    is_last: Tensor

    def apply(
        self, step_start: Tensor, step_change: Tensor, velocity: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next y, the start of its step, and the change since that start."""
        weight, next_offset, is_last = (
            broadcast_to_rows(part, step_start) for part in (self.weight, self.next_offset, self.is_last)
        )
        step_change = step_change + weight * velocity
        y = step_start + torch.where(is_last, step_change, next_offset * velocity)
        return (
            y,
            torch.where(is_last, y, step_start),
            torch.where(is_last, torch.zeros_like(y), step_change),
        )


class PointStep(_OdeStep):
    """Stage with the exact divergence."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, SIGMA_MIN)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        y: Tensor,
        step_start: Tensor,
        step_change: Tensor,
        log_density: Tensor,
        label: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        stage = self.stage(step_index, num_steps)
        output, divergence = self.denoiser.raw_output_with_divergence(y, stage.sigma, label)
        return *stage.apply(step_start, step_change, -output), log_density - stage.weight * divergence


class ImageStep(_OdeStep):
    """Stage with the divergence estimated by finite differences along random directions."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser, DecoderLikelihood(denoiser).sigma)

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        y: Tensor,
        step_start: Tensor,
        step_change: Tensor,
        log_density: Tensor,
        variance: Tensor,
        label: Tensor,
        probe_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        stage = self.stage(step_index, num_steps)
        probes = torch.where(probe_noise < 0.5, -torch.ones_like(probe_noise), torch.ones_like(probe_noise))
        offsets, center = PROBE_STEP * probes, y.unsqueeze(1)
        points = torch.stack([center + offsets, center - offsets], 1)
        sigma, labels = (part.unsqueeze(1).expand(-1, 2 * NUM_PROBES) for part in (stage.sigma, label))
        outputs = self.denoiser.raw_output(
            points.reshape(-1, *y.shape[1:]), sigma.reshape(-1), labels.reshape(-1)
        )
        forward, backward = outputs.reshape(points.shape).unbind(1)
        slopes = batch_invariant_sum(((forward - backward) * probes).flatten(2)) / (2 * PROBE_STEP)
        first_slope, second_slope = slopes.unbind(1)
        first_output, second_output = (forward + backward).unbind(1)
        return (
            *stage.apply(step_start, step_change, -(first_output + second_output) / 4),
            log_density - stage.weight * (first_slope + second_slope) / 2,
            variance + (stage.weight * (first_slope - second_slope) / 2).square(),
        )


class PointReadout(nn.Module):
    """State at SIGMA_MAX -> log-density of the point."""

    def forward(self, y: Tensor, log_density: Tensor) -> Tensor:
        return log_density + _normal_log_density(y)


class ImageReadout(nn.Module):
    """State at SIGMA_MAX -> log-probability of the image, and the standard error of the divergence."""

    def forward(self, y: Tensor, log_density: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        return log_density + _normal_log_density(y), variance.sqrt()


def _normal_log_density(y: Tensor) -> Tensor:
    flat = y.flatten(1)
    return -batch_invariant_sum(flat.square()) / 2 - flat.shape[1] * math.log(2 * math.pi) / 2


def build_program(denoiser: Denoiser, data_spec: DataSpec) -> Program:
    """Return the program score:ode."""
    return (
        _image_program(denoiser, data_spec) if data_spec.num_levels else _point_program(denoiser, data_spec)
    )


def _point_program(denoiser: Denoiser, data_spec: DataSpec) -> Program:
    return Program(
        operation="score",
        variant="ode",
        init=PointInit(denoiser),
        step=PointStep(denoiser),
        readout=PointReadout(),
        outputs=(TensorSpec("log_density", doc="log-density of the point, in nats"),),
        doc=f"Estimate the log-density of a point with noise of standard deviation {SIGMA_MIN:g}, given the "
        "label if there is one, by the probability-flow ODE with its exact divergence. The error is that "
        "of the solver; more steps reduce it.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(_steps_parameter(80),),
        inputs=(row_input(data_spec, "point to score"), known_label_input(data_spec)),
        score=Score("estimate", denoiser.dimensions, coordinate_space(data_spec), "log_density"),
    )


def _image_program(denoiser: Denoiser, data_spec: DataSpec) -> Program:
    shape = data_spec.tensor.shape
    return Program(
        operation="score",
        variant="ode",
        init=ImageInit(denoiser),
        step=ImageStep(denoiser),
        readout=ImageReadout(),
        outputs=(
            TensorSpec("log_likelihood", doc="log-probability of the image, in nats"),
            TensorSpec(
                "divergence_error",
                minimum=0,
                doc="standard error of the divergence along the trajectory, in nats; the error of the "
                "noise draw is not included",
            ),
        ),
        doc="Estimate the log-probability of an image, given the label if there is one, by the "
        "probability-flow ODE. One draw of noise makes the integers continuous; its standard deviation is "
        f"{DecoderLikelihood(denoiser).sigma:.4f}, for pixels scaled to -1..1. The estimate has the error "
        "of the solver and of the divergence along random directions, and the noise lowers its expectation "
        "below the log-probability. There is no standard error for a single draw of the noise.",
        state=(
            *_state(data_spec),
            TensorSpec(
                "variance", doc="variance of the log-density due to the random directions, in squared nats"
            ),
        ),
        steps=Steps(parameter="steps"),
        parameters=(_steps_parameter(40),),
        inputs=(row_input(data_spec, "image to score"), known_label_input(data_spec)),
        noise=(
            Noise("dequantization_noise", "normal", shape, 0, "noise that makes the integers continuous"),
            Noise(
                "probe_noise",
                "uniform",
                (NUM_PROBES, *shape),
                1,
                "uniform numbers; below 0.5 a component of the direction is -1, else +1",
            ),
        ),
        score=Score("estimate", denoiser.dimensions, coordinate_space(data_spec), "log_likelihood"),
    )


def _state(data_spec: DataSpec) -> tuple[TensorSpec, ...]:
    shape = data_spec.tensor.shape
    return (
        TensorSpec("y", shape=shape, doc="row at the current noise level, divided by its standard deviation"),
        TensorSpec("step_start", shape=shape, doc="y at the start of the Runge-Kutta step"),
        TensorSpec("step_change", shape=shape, doc="weighted sum of the velocities of the step so far"),
        TensorSpec("log_density", doc="log-density accumulated so far, in nats"),
    )


def _steps_parameter(default: int) -> Parameter:
    return Parameter(
        "steps", "integer", default, NUM_STAGES, MAX_STEPS,
        doc="number of evaluations of the velocity and its divergence; a Runge-Kutta step takes "
        f"{NUM_STAGES}, and an incomplete one is not used",
    )  # fmt: skip
