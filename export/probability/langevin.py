"""Langevin chains, and the annealed importance sampling that they make possible.

For a density p(x) proportional to exp(-E(x)), a Langevin step of size eta is

    x' = x - eta grad E(x) + sqrt(2 eta) noise,

downhill, as in Roberts & Tweedie, "Exponential convergence of Langevin distributions"
(1996). Unadjusted, its stationary density is off by a term in eta: on N(0, 1) the
variance is 1 / (1 - eta / 2). The Metropolis-adjusted step (MALA) accepts x' with

    log a = E(x) - E(x') + log q(x | x') - log q(x' | x),
    q(b | a) = N(b; a - eta grad E(a), 2 eta I),

and is not off at all. A coordinate whose gradient and noise are zero stays where it is.

Annealed importance sampling (Neal 2001) walks from a density q that can be drawn from
to p on the path E_t = -log q + t f, and its weights average to the normaliser Z. Their
logarithm errs downwards; walking back from p errs upwards (Grosse, Ghahramani & Adams,
"Sandwiching the marginal likelihood", 2015). Knows no family.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from export.probability.batch_invariant_ops import batch_invariant_sum


class EnergyFunction(Protocol):
    """An energy with its gradient."""

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) in nats [B] of rows [B, D], and grad E(x) [B, D]."""


class ChainState(NamedTuple):
    """Where chains are: x [B, D], its energy [B] in nats, and the energy's gradient [B, D]."""

    x: Tensor
    energy: Tensor
    gradient: Tensor

    def where(self, chosen: Tensor, other: "ChainState") -> "ChainState":
        """These places for the chains [B] that are true, and the others for the rest."""
        whole = chosen.unsqueeze(1)
        return ChainState(
            torch.where(whole, self.x, other.x),
            torch.where(chosen, self.energy, other.energy),
            torch.where(whole, self.gradient, other.gradient),
        )


def propose(x: Tensor, gradient: Tensor, step_size: Tensor, noise: Tensor) -> Tensor:
    """An unadjusted step from x [B, D] with its step size [B] and standard normal noise [B, D]."""
    eta = step_size.unsqueeze(1)
    return x - eta * gradient + torch.sqrt(2 * eta) * noise


def log_acceptance(here: ChainState, there: ChainState, step_size: Tensor) -> Tensor:
    """Logarithm of the Metropolis-Hastings ratio [B] of a proposal; above 0 it is always accepted."""
    return (
        here.energy - there.energy + _log_step(there, here.x, step_size) - _log_step(here, there.x, step_size)
    )


def _log_step(start: ChainState, end: Tensor, step_size: Tensor) -> Tensor:
    """Log-density of the step to `end`, up to what every step of that size has in common."""
    eta = step_size.unsqueeze(1)
    return -batch_invariant_sum((end - start.x + eta * start.gradient).square()) / (4 * step_size)


def adjust(
    here: ChainState, there: ChainState, step_size: Tensor, uniform: Tensor
) -> tuple[ChainState, Tensor]:
    """Where chains are after a proposal, by uniform numbers [B], and whether they went there [B]."""
    accepted = uniform.log() < log_acceptance(here, there, step_size)
    return there.where(accepted, here), accepted


@dataclass(frozen=True)
class Path:
    """The densities exp(-E_t) between q at t = 0 and p at t = 1, with E_t = base + t tilt."""

    base: EnergyFunction
    tilt: EnergyFunction

    def walk(self, x: Tensor, times: Tensor, step_size: float, title: str) -> tuple[Tensor, Tensor]:
        """Chains from x [B, D] by a MALA step at each time [T] but the first; their ends and log-weights [B].

        From 0 to 1 the mean weight estimates Z, from 1 to 0 it estimates 1 / Z.
        """
        log_weights, eta = torch.zeros(len(x)), torch.full((len(x),), step_size)
        landscapes = self._landscapes(x)
        steps = list(pairwise(times.tolist()))
        for before, now in tqdm(steps, desc=title, unit="step", dynamic_ncols=True):
            log_weights = log_weights - (now - before) * landscapes.tilt.energy
            here = landscapes.at(now)
            there = self._landscapes(propose(here.x, here.gradient, eta, torch.randn_like(x)))
            _, accepted = adjust(here, there.at(now), eta, torch.rand(len(x)))
            landscapes = there.where(accepted, landscapes)
        return landscapes.base.x, log_weights

    def _landscapes(self, x: Tensor) -> "_Both":
        return _Both(ChainState(x, *self.base.energy(x)), ChainState(x, *self.tilt.energy(x)))


class _Both(NamedTuple):
    """Where chains are in both landscapes of a path."""

    base: ChainState
    tilt: ChainState

    def at(self, t: float) -> ChainState:
        """Where they are in the landscape of time t."""
        energy, gradient = (b + t * f for b, f in zip(self.base[1:], self.tilt[1:], strict=True))
        return ChainState(self.base.x, energy, gradient)

    def where(self, accepted: Tensor, other: "_Both") -> "_Both":
        """These places for the chains [B] that are true, and the others for the rest."""
        return _Both(self.base.where(accepted, other.base), self.tilt.where(accepted, other.tilt))


def log_mean(log_weights: Tensor) -> tuple[float, float]:
    """Logarithm of the mean weight, and its standard error by the delta method."""
    weights = (log_weights - log_weights.max()).double().exp()
    error = weights.std() / weights.mean() / math.sqrt(len(weights))
    return float(log_weights.max() + weights.mean().log()), float(error)
