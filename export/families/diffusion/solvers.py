"""Samplers as linear updates of a row, with coefficients that depend on the sampler.

A trajectory moves a row down or up the noise levels sigma. One evaluation of the denoiser D updates the row
by

    x' = a x + b D(x, sigma) + c memory + d noise.

The coefficients are computed for each row, so rows of different ages, lengths and samplers share a batch:

- ddim: Song et al., "Denoising Diffusion Implicit Models" (2020); eta = 1 is ancestral sampling;
- heun: Karras et al. (2022), Algorithm 1 without churn;
- dpmpp2m: Lu et al., "DPM-Solver++" (2022), second-order multistep.

With eta = 0 all of them solve the probability-flow ODE, dx/dsigma = (x - D) / sigma, in both directions.
Independent of the network.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.probability.batch_invariant_ops import batch_invariant_map

SAMPLERS = ("ddim", "heun", "dpmpp2m")
DDIM, HEUN, DPMPP2M = range(3)
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7


def noise_level(position: Tensor) -> Tensor:
    """Return sigma at a position from 0, SIGMA_MIN, to 1, SIGMA_MAX (Karras et al., Eq. 5)."""
    low, high = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    root: Tensor = low + position * (high - low)
    # The 7th power by multiplications, which are batch-invariant; pow is not.
    cube = root * root * root
    sigma: Tensor = cube * cube * root
    return sigma


@dataclass(frozen=True)
class Interval:
    """Interval between two noise levels in which an evaluation takes place; every field is [B].

    Attributes:
        previous: noise level at which the interval before this one starts.
        current: noise level at the start of this interval.
        next: noise level at the end of this interval.
        is_first: whether this is the first interval of the trajectory.
        is_corrector: whether this is the second evaluation of Heun's method, at the end of the interval.
    """

    previous: Tensor
    current: Tensor
    next: Tensor
    is_first: Tensor
    is_corrector: Tensor

    def where(self, condition: Tensor, other: "Interval") -> "Interval":
        """Return this interval for rows where the condition [B] is true, and the other one elsewhere."""
        return Interval(
            torch.where(condition, self.previous, other.previous),
            torch.where(condition, self.current, other.current),
            torch.where(condition, self.next, other.next),
            # Logical operators, because ONNX Runtime has no Where for booleans.
            (condition & self.is_first) | (~condition & other.is_first),
            (condition & self.is_corrector) | (~condition & other.is_corrector),
        )


def denoising_interval(step_index: Tensor, num_steps: Tensor, sampler: Tensor, start: Tensor) -> Interval:
    """Return the interval of a step on the way down from a noise level to sigma = 0.

    Args:
        step_index: index of the step, int64 [B].
        num_steps: number of steps of the trajectory, int64 [B].
        sampler: index in SAMPLERS, int64 [B].
        start: position on the noise scale where the trajectory starts, from 0 to 1, float32 [B].
    """
    # Heun's method needs one evaluation only in the last interval, which ends at sigma = 0.
    count, index, is_corrector = _locate_interval(step_index, num_steps, sampler, single_evaluations=1)

    def level(number: Tensor) -> Tensor:
        sigma = noise_level(start * (1 - number / (count - 1).clamp(min=1)))
        return torch.where(number < count, sigma, torch.zeros_like(sigma))

    return Interval(level(index - 1), level(index), level(index + 1), index == 0, is_corrector)


def encoding_interval(step_index: Tensor, num_steps: Tensor, sampler: Tensor) -> Interval:
    """Return the interval of a step on the way up from SIGMA_MIN to SIGMA_MAX; arguments are int64 [B]."""
    count, index, is_corrector = _locate_interval(step_index, num_steps, sampler, single_evaluations=0)
    previous, current, following = (noise_level((index + offset) / count) for offset in (-1, 0, 1))
    return Interval(previous, current, following, index == 0, is_corrector)


def _locate_interval(
    step_index: Tensor, num_steps: Tensor, sampler: Tensor, single_evaluations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the number of intervals, the index of the current one, and whether this step corrects it.

    Heun's method evaluates an interval twice, except for `single_evaluations` intervals at the end. If one
    evaluation is missing, the first interval is a plain Euler step.
    """
    is_heun = sampler == HEUN
    num_intervals = (num_steps + single_evaluations + 1) // 2
    num_missing = 2 * num_intervals - single_evaluations - num_steps
    half_steps = step_index + num_missing
    is_corrector = is_heun & (half_steps % 2 == 1) & (step_index > 0)
    count = torch.where(is_heun, num_intervals, num_steps)
    index = torch.where(is_heun, half_steps // 2, step_index)
    return count.float(), index.float(), is_corrector


@dataclass(frozen=True)
class Update:
    """Coefficients of one network evaluation; every field is [B].

    The network is evaluated at `sigma`. Then

        x' = x_from_x x + x_from_denoised D + x_from_memory memory + x_from_noise noise,
        memory' = memory_from_x x + memory_from_denoised D,

    and x' has noise of level `next_sigma`.
    """

    sigma: Tensor
    next_sigma: Tensor
    x_from_x: Tensor
    x_from_denoised: Tensor
    x_from_memory: Tensor
    x_from_noise: Tensor
    memory_from_x: Tensor
    memory_from_denoised: Tensor

    def apply(self, x: Tensor, memory: Tensor, denoised: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next row and the next memory, both [B, *shape] like the arguments."""
        x_from_x, x_from_denoised, x_from_memory, x_from_noise, memory_from_x, memory_from_denoised = (
            broadcast_to_rows(coefficient, x)
            for coefficient in (
                self.x_from_x,
                self.x_from_denoised,
                self.x_from_memory,
                self.x_from_noise,
                self.memory_from_x,
                self.memory_from_denoised,
            )
        )
        next_x = x_from_x * x + x_from_denoised * denoised + x_from_memory * memory + x_from_noise * noise
        return next_x, memory_from_x * x + memory_from_denoised * denoised


def build_update(interval: Interval, sampler: Tensor, eta: Tensor) -> Update:
    """Return the coefficients of a step, for samplers int64 [B] and eta float32 [B]."""
    is_heun, is_multistep, is_corrector = sampler == HEUN, sampler == DPMPP2M, interval.is_corrector
    previous, current, following = interval.previous, interval.current, interval.next
    half_step = (following - current) / 2
    is_predictor = is_heun & ~is_corrector

    new_noise = (
        torch.where(sampler == DDIM, eta, torch.zeros_like(eta))
        * following
        * torch.sqrt((1 - (following / current).square()).clamp(min=0))
    )
    kept = torch.sqrt(following.square() - new_noise.square()) / current
    extrapolates = is_multistep & ~interval.is_first & (following > 0)
    extrapolation = torch.where(
        extrapolates, _extrapolation(previous, current, following), torch.zeros_like(current)
    )
    x_from_x = torch.where(is_corrector, half_step / following.clamp(min=SIGMA_MIN), kept)
    x_from_denoised = torch.where(is_corrector, -x_from_x, (1 - kept) * (1 + extrapolation))
    return Update(
        sigma=torch.where(is_corrector, following, current),
        next_sigma=following,
        x_from_x=x_from_x,
        x_from_denoised=x_from_denoised,
        x_from_memory=torch.where(is_corrector, torch.ones_like(current), -(1 - kept) * extrapolation),
        x_from_noise=new_noise,
        memory_from_x=torch.where(is_predictor, 1 + half_step / current, torch.zeros_like(current)),
        memory_from_denoised=torch.where(is_predictor, -half_step / current, torch.ones_like(current)),
    )


def _extrapolation(previous: Tensor, current: Tensor, following: Tensor) -> Tensor:
    """Return 1 / (2 r) of DPM-Solver++(2M), where r is the ratio of the previous log-step to this one."""
    log_step = batch_invariant_map(torch.log, current / following.clamp(min=SIGMA_MIN / 2))
    return log_step / (2 * batch_invariant_map(torch.log, previous / current))


def resampling_update(step_index: Tensor, num_steps: Tensor, rounds: Tensor) -> Update:
    """Return the coefficients of an ancestral step down that repeats each noise level `rounds` times.

    Each repetition except the last adds the removed noise back (Lugmayr et al., "RePaint", 2022). The
    remainder of num_steps / rounds is spent at the highest level. Arguments are int64 [B].
    """
    rounds = torch.minimum(rounds, num_steps).clamp(min=1)
    position = (step_index - num_steps % rounds).clamp(min=0)
    repeats = (position % rounds < rounds - 1) | (step_index < num_steps % rounds)
    ones = torch.ones_like(step_index).float()
    ddim = torch.full_like(step_index, DDIM)
    interval = denoising_interval(position // rounds, num_steps // rounds, ddim, ones)
    down = build_update(interval, ddim, ones)
    noise_back_up = torch.sqrt(
        down.x_from_noise.square() + interval.current.square() - interval.next.square()
    )
    return replace(
        down,
        next_sigma=torch.where(repeats, interval.current, interval.next),
        x_from_noise=torch.where(repeats, noise_back_up, down.x_from_noise),
    )


def broadcast_to_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Reshape values [B] to [B, 1, ...], so that they broadcast over rows [B, *shape]."""
    return values.reshape(-1, *(1 for _ in rows.shape[1:]))
