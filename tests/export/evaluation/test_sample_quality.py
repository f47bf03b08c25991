"""Measures: known answers, and the floor of equal distributions."""

import numpy as np
import pytest

from export.evaluation import sample_quality


def test_frechet_distance_of_shifted_normals_is_the_squared_shift() -> None:
    a = np.random.default_rng(0).normal(size=(500, 5))
    assert sample_quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert sample_quality.frechet_distance(a, a + 2) == pytest.approx(5 * 4)


def test_frechet_distance_of_scaled_normals_is_that_of_their_spreads() -> None:
    """With C = k^2 I scaled by s: tr(C + s^2 C - 2 s C) = (1 - s)^2 tr(C)."""
    a = np.random.default_rng(0).normal(size=(500, 4))
    a -= a.mean(0)
    assert sample_quality.frechet_distance(a, 3 * a) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))


def test_two_samples_of_one_distribution_cannot_be_told_apart() -> None:
    rows = np.random.default_rng(0).integers(0, 17, (800, 4), np.uint8)
    assert sample_quality.two_sample_accuracy(rows[:400], rows[400:]) == pytest.approx((0.5, 0.5), abs=0.08)


def test_two_distributions_can_be_told_apart() -> None:
    rows = np.random.default_rng(0).integers(0, 9, (800, 4), np.uint8)
    assert sample_quality.two_sample_accuracy(rows[:400], rows[400:] + 20) == (1.0, 1.0)


def test_a_clump_that_is_everyone_s_neighbour_shows_in_the_halves() -> None:
    spread = np.random.default_rng(0).integers(0, 255, (200, 64), np.uint8)
    clump = np.random.default_rng(1).integers(126, 129, (200, 64), np.uint8)
    assert sample_quality.two_sample_accuracy(clump, spread) == (1.0, 0.0)


def test_copies_are_noticed() -> None:
    rows = np.random.default_rng(0).integers(0, 255, (400, 8), np.uint8)
    assert max(sample_quality.two_sample_accuracy(rows, rows)) < 0.35


def test_bits_per_dimension_of_uniform_integers() -> None:
    nats = np.full(10, -64 * np.log(17))
    quality = sample_quality.bits_per_dimension(nats, 64, 500)
    assert quality.value == pytest.approx(np.log2(17))
    assert quality.unit == "bits/dim"
    assert quality.standard_error == pytest.approx(0)


def test_coverage_of_one_distribution_is_the_documented_number() -> None:
    generator = np.random.default_rng(0)
    drawn = [sample_quality.coverage(*generator.normal(size=(2, 500, 4))) for _ in range(10)]
    expected = 1 - np.prod([(500 - i) / (1000 - i) for i in range(1, 6)])
    assert np.mean(drawn) == pytest.approx(expected, abs=0.01)


def test_coverage_counts_the_modes_that_are_there() -> None:
    """A quarter of the rows is far from the samples, which lie on the others."""
    real = np.random.default_rng(0).normal(size=(400, 2))
    made = real[100:] + 1e-9
    real[:100] += 1000
    assert sample_quality.coverage(made, real) == pytest.approx(0.75)
