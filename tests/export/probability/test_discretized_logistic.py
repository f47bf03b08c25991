"""Tests of the pixel mixtures: normalized mass, draws that follow it, and its mean."""

import pytest
import torch

from export.probability.discretized_logistic import PixelMixture

NUM_LEVELS = 17


def log_masses(parameters: torch.Tensor) -> torch.Tensor:
    """Return the log-mass of each level under mixtures with parameters [B, 3 * M], [NUM_LEVELS, B]."""
    mixture, count = PixelMixture(parameters, NUM_LEVELS), len(parameters)
    return torch.stack([mixture.log_mass(torch.full((count,), level)) for level in range(NUM_LEVELS)])


def test_pixel_mixture_masses_sum_to_one() -> None:
    torch.manual_seed(0)
    masses = log_masses((4 * torch.randn(50, 15)).double()).exp()
    torch.testing.assert_close(masses.sum(0), torch.ones(50).double())


@pytest.mark.parametrize("num_levels", [17, 256])
def test_pixel_mixture_draws_follow_the_masses(num_levels: int) -> None:
    """Inversion of an even grid of uniform numbers gives each level its mass."""
    torch.manual_seed(1)
    count = 400_000
    uniform = (torch.arange(count).double() + 0.5) / count
    for parameters in torch.randn(4, 9).double():
        mixture = PixelMixture(parameters.expand(count, -1), num_levels)
        drawn = mixture.quantize(mixture.sample_by_inversion(uniform))
        levels = PixelMixture(parameters.expand(num_levels, -1), num_levels)
        masses = levels.log_mass(torch.arange(num_levels)).exp()
        frequencies = drawn.long().bincount(minlength=num_levels) / count
        torch.testing.assert_close(frequencies, masses.float(), atol=2e-4, rtol=0)


def test_pixel_mixture_mean_is_the_mean_of_the_masses() -> None:
    """The closed form is for the clipped continuous mixture, so they agree to a fraction of a level."""
    torch.manual_seed(2)
    parameters = torch.randn(50, 9)
    exact = (log_masses(parameters).exp() * torch.arange(NUM_LEVELS).unsqueeze(1)).sum(0)
    torch.testing.assert_close(PixelMixture(parameters, NUM_LEVELS).mean(), exact, atol=0.25, rtol=0)
