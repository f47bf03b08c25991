"""Langevin chains, and annealed importance sampling with them.

For a density p(x) proportional to exp(-E(x)), a Langevin step of size eta is

    x' = x - eta grad E(x) + sqrt(2 eta) noise

(Roberts & Tweedie, "Exponential convergence of Langevin distributions", 1996). Without adjustment its
stationary density is biased by a term in eta: on N(0, 1) the variance is 1 / (1 - eta / 2). The
Metropolis-adjusted step (MALA) accepts x' with

    log a = E(x) - E(x') + log q(x | x') - log q(x' | x),
    q(b | a) = N(b; a - eta grad E(a), 2 eta I),

and has no bias. A coordinate with zero gradient and zero noise does not change.

Annealed importance sampling (Neal 2001) moves draws from a density q to p along E_t = -log q + t f, and the
mean of the weights estimates the normalizer Z. The logarithm of that mean is too small on average. In the
reverse direction, from p to q, it is too large on average (Grosse, Ghahramani & Adams, "Sandwiching the
marginal likelihood", 2015). Independent of the families.
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
    """Energy with its gradient."""

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return E(x) in nats [B] of rows [B, D], and grad E(x) [B, D]."""


class ChainState(NamedTuple):
    """States of B chains.

    Attributes:
        x: positions [B, D].
        energy: energies in nats [B].
        gradient: gradients of the energy [B, D].
    """

    x: Tensor
    energy: Tensor
    gradient: Tensor

    def where(self, condition: Tensor, other: "ChainState") -> "ChainState":
        """Return these states for chains where the condition [B] is true, and the other ones elsewhere."""
        column = condition.unsqueeze(1)
        return ChainState(
            torch.where(column, self.x, other.x),
            torch.where(condition, self.energy, other.energy),
            torch.where(column, self.gradient, other.gradient),
        )


def propose(x: Tensor, gradient: Tensor, step_size: Tensor, noise: Tensor) -> Tensor:
    """Return an unadjusted Langevin step from x [B, D].

    Args:
        x: positions [B, D].
        gradient: gradients of the energy [B, D].
        step_size: eta of each chain [B].
        noise: standard normal noise [B, D].
    """
    eta = step_size.unsqueeze(1)
    return x - eta * gradient + torch.sqrt(2 * eta) * noise


def log_acceptance(current: ChainState, proposal: ChainState, step_size: Tensor) -> Tensor:
    """Return the logarithm of the Metropolis-Hastings ratio [B]; proposals above 0 are always accepted."""
    return (
        current.energy
        - proposal.energy
        + _log_transition(proposal, current.x, step_size)
        - _log_transition(current, proposal.x, step_size)
    )


def _log_transition(start: ChainState, end: Tensor, step_size: Tensor) -> Tensor:
    """Return the log-density [B] of a step to `end`, without terms that depend only on the step size."""
    eta = step_size.unsqueeze(1)
    return -batch_invariant_sum((end - start.x + eta * start.gradient).square()) / (4 * step_size)


def accept_or_reject(
    current: ChainState, proposal: ChainState, step_size: Tensor, uniform: Tensor
) -> tuple[ChainState, Tensor]:
    """Return the next states, and whether each proposal was accepted [B].

    Args:
        current: states before the step.
        proposal: proposed states. One with a non-finite energy is rejected.
        step_size: eta of each chain [B].
        uniform: uniform numbers [B].
    """
    is_accepted = uniform.log() < log_acceptance(current, proposal, step_size)
    return proposal.where(is_accepted, current), is_accepted


@dataclass(frozen=True)
class AnnealingPath:
    """Densities exp(-E_t) from q at t = 0 to p at t = 1, with E_t = base + t tilt."""

    base: EnergyFunction
    tilt: EnergyFunction

    def anneal(self, x: Tensor, times: Tensor, step_size: float, title: str) -> tuple[Tensor, Tensor]:
        """Run chains with one MALA step at each time after the first.

        Args:
            x: first states [B, D], draws from the density at the first time.
            times: t of each density [T].
            step_size: eta of all steps.
            title: label of the progress bar.

        Returns:
            The last states [B, D] and the log-weights [B]. The mean weight estimates Z for times from 0 to 1,
            and 1 / Z for times from 1 to 0.
        """
        log_weights, eta = torch.zeros(len(x)), torch.full((len(x),), step_size)
        state = self._evaluate(x)
        intervals = list(pairwise(times.tolist()))
        for previous_time, time in tqdm(intervals, desc=title, unit="step", dynamic_ncols=True):
            log_weights = log_weights - (time - previous_time) * state.tilt.energy
            current = state.at(time)
            proposal = self._evaluate(propose(current.x, current.gradient, eta, torch.randn_like(x)))
            _, is_accepted = accept_or_reject(current, proposal.at(time), eta, torch.rand(len(x)))
            state = proposal.where(is_accepted, state)
        return state.base.x, log_weights

    def _evaluate(self, x: Tensor) -> "_PathState":
        return _PathState(ChainState(x, *self.base.energy(x)), ChainState(x, *self.tilt.energy(x)))


class _PathState(NamedTuple):
    """States of chains under the base energy and under the tilt, at the same positions."""

    base: ChainState
    tilt: ChainState

    def at(self, time: float) -> ChainState:
        """Return the states under E_t at a time t."""
        energy, gradient = (
            base + time * tilt for base, tilt in zip(self.base[1:], self.tilt[1:], strict=True)
        )
        return ChainState(self.base.x, energy, gradient)

    def where(self, condition: Tensor, other: "_PathState") -> "_PathState":
        """Return these states for chains where the condition [B] is true, and the other ones elsewhere."""
        return _PathState(self.base.where(condition, other.base), self.tilt.where(condition, other.tilt))


def log_mean_weight(log_weights: Tensor) -> tuple[float, float]:
    """Return the logarithm of the mean weight, and its standard error by the delta method."""
    weights = (log_weights - log_weights.max()).double().exp()
    error = weights.std() / weights.mean() / math.sqrt(len(weights))
    return float(log_weights.max() + weights.mean().log()), float(error)
