"""Samplers as coefficients: what one network evaluation does to a row, whichever its sampler.

A walk goes down the noise levels sigma, or up. One evaluation of the denoiser D moves a row by

    x' = a x + b D(x, sigma) + c memory + d noise,

with coefficients computed per row, so that rows of different ages, lengths and samplers share a call:

- ddim: Song et al., "Denoising Diffusion Implicit Models" (2020); eta 1 is ancestral;
- heun: Karras et al. (2022), Algorithm 1 without churn;
- dpmpp2m: Lu et al., "DPM-Solver++" (2022), multistep of second order.

Without eta all of them solve the probability-flow ODE, dx/dsigma = (x - D) / sigma, and go up as well
as down. Knows no network.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from export.probability.batch_invariant_ops import batch_invariant_map

SAMPLERS = ("ddim", "heun", "dpmpp2m")
DDIM, HEUN, DPMPP2M = range(3)
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7


def noise_level(position: Tensor) -> Tensor:
    """sigma at a position on the noise scale (Karras et al., Eq. 5): SIGMA_MIN at 0, SIGMA_MAX at 1."""
    least, most = SIGMA_MIN ** (1 / RHO), SIGMA_MAX ** (1 / RHO)
    root: Tensor = least + position * (most - least)
    # The power of RHO, by products: they are rounded alike in every slot.
    cube = root * root * root
    level: Tensor = cube * cube * root
    return level


@dataclass(frozen=True)
class Stretch:
    """The part of a walk in which an evaluation lies: noise levels [B] before it, at its start and end.

    `corrects` [B] is true for the second evaluation of Heun's method, which is at its end.
    """

    before: Tensor
    now: Tensor
    after: Tensor
    is_first: Tensor
    corrects: Tensor

    def where(self, chosen: Tensor, other: "Stretch") -> "Stretch":
        """This stretch for the rows [B] that are true, and the other for the rest."""
        return Stretch(
            torch.where(chosen, self.before, other.before),
            torch.where(chosen, self.now, other.now),
            torch.where(chosen, self.after, other.after),
            # ONNX Runtime chooses between numbers only.
            (chosen & self.is_first) | (~chosen & other.is_first),
            (chosen & self.corrects) | (~chosen & other.corrects),
        )


def descent(step_index: Tensor, num_steps: Tensor, sampler: Tensor, start: Tensor) -> Stretch:
    """Down from a position [B] on the noise scale to 0, and on to no noise; the rest int64 [B]."""
    # Heun's method evaluates once where there is no noise left. An even number leaves one over.
    count, index, corrects = _stretches(step_index, num_steps, sampler, spared=1)

    def level(number: Tensor) -> Tensor:
        sigma = noise_level(start * (1 - number / (count - 1).clamp(min=1)))
        return torch.where(number < count, sigma, torch.zeros_like(sigma))

    return Stretch(level(index - 1), level(index), level(index + 1), index == 0, corrects)


def ascent(step_index: Tensor, num_steps: Tensor, sampler: Tensor) -> Stretch:
    """Up from SIGMA_MIN to SIGMA_MAX; int64 [B]."""
    count, index, corrects = _stretches(step_index, num_steps, sampler, spared=0)
    before, now, after = (noise_level((index + offset) / count) for offset in (-1, 0, 1))
    return Stretch(before, now, after, index == 0, corrects)


def _stretches(
    step_index: Tensor, num_steps: Tensor, sampler: Tensor, spared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """How many stretches there are, which one this is, and whether it is there for the second time.

    Heun's method evaluates twice a stretch, but for those that are spared it; an evaluation that is
    left over makes the first stretch a plain Euler step.
    """
    heun = sampler == HEUN
    halves = (num_steps + spared + 1) // 2
    left_over = 2 * halves - spared - num_steps
    half_steps = step_index + left_over
    corrects = heun & (half_steps % 2 == 1) & (step_index > 0)
    count, index = torch.where(heun, halves, num_steps), torch.where(heun, half_steps // 2, step_index)
    return count.float(), index.float(), corrects


@dataclass(frozen=True)
class Tick:
    """One network evaluation, as coefficients [B].

    The network is evaluated at `sigma`; then x' = x_x x + x_d D + x_m memory + x_z noise
    and memory' = m_x x + m_d D. After it, x' has noise of level `reached`.
    """

    sigma: Tensor
    reached: Tensor
    x_x: Tensor
    x_d: Tensor
    x_m: Tensor
    x_z: Tensor
    m_x: Tensor
    m_d: Tensor

    def move(self, x: Tensor, memory: Tensor, denoised: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The row and the memory after it, both [B, *shape]."""
        x_x, x_d, x_m, x_z, m_x, m_d = (
            per_row(numbers, x) for numbers in (self.x_x, self.x_d, self.x_m, self.x_z, self.m_x, self.m_d)
        )
        moved = x_x * x + x_d * denoised + x_m * memory + x_z * noise
        return moved, m_x * x + m_d * denoised


def tick(stretch: Stretch, sampler: Tensor, eta: Tensor) -> Tick:
    """The coefficients of each row's evaluation; samplers int64 [B], eta float32 [B]."""
    heun, multistep, corrects = sampler == HEUN, sampler == DPMPP2M, stretch.corrects
    before, now, after = stretch.before, stretch.now, stretch.after
    slope = (after - now) / 2
    predicts = heun & ~corrects

    fresh = torch.where(sampler == DDIM, eta, torch.zeros_like(eta)) * after * _sine(after, now)
    kept = torch.sqrt(after.square() - fresh.square()) / now
    bends = multistep & ~stretch.is_first & (after > 0)
    bent = torch.where(bends, _bend(before, now, after), torch.zeros_like(now))
    x_x = torch.where(corrects, slope / after.clamp(min=SIGMA_MIN), kept)
    x_d = torch.where(corrects, -x_x, (1 - kept) * (1 + bent))
    return Tick(
        sigma=torch.where(corrects, after, now),
        reached=after,
        x_x=x_x,
        x_d=x_d,
        x_m=torch.where(corrects, torch.ones_like(now), -(1 - kept) * bent),
        x_z=fresh,
        m_x=torch.where(predicts, 1 + slope / now, torch.zeros_like(now)),
        m_d=torch.where(predicts, -slope / now, torch.ones_like(now)),
    )


def resampled(step_index: Tensor, num_steps: Tensor, rounds: Tensor) -> Tick:
    """A step of an ancestral walk down that takes every noise level so many times; all int64 [B].

    But for the last of them, what a step took away is put back as noise (Lugmayr et al., "RePaint", 2022).
    Steps that are left over are at the highest level.
    """
    rounds = torch.minimum(rounds, num_steps).clamp(min=1)
    walked = (step_index - num_steps % rounds).clamp(min=0)
    again = (walked % rounds < rounds - 1) | (step_index < num_steps % rounds)
    whole = torch.ones_like(step_index).float()
    ddim = torch.full_like(step_index, DDIM)
    stretch = descent(walked // rounds, num_steps // rounds, ddim, whole)
    down = tick(stretch, ddim, whole)
    back = torch.sqrt(down.x_z.square() + stretch.now.square() - stretch.after.square())
    return replace(
        down,
        reached=torch.where(again, stretch.now, stretch.after),
        x_z=torch.where(again, back, down.x_z),
    )


def _sine(after: Tensor, now: Tensor) -> Tensor:
    return torch.sqrt((1 - (after / now).square()).clamp(min=0))


def _bend(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """1 / (2 r) of DPM-Solver++(2M), with r the ratio of the last log-step to this one."""
    step = batch_invariant_map(torch.log, now / after.clamp(min=SIGMA_MIN / 2))
    return step / (2 * batch_invariant_map(torch.log, before / now))


def per_row(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [B] in the shape [B, 1, ...] that multiplies rows like [B, *shape]."""
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))
