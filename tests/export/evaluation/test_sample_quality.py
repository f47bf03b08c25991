"""Sample quality metrics: known values, and values for two sets of one distribution."""

import numpy as np
import pytest

from export.evaluation import sample_quality


def test_frechet_distance_of_shifted_normals_is_the_squared_shift() -> None:
    a = np.random.default_rng(0).normal(size=(500, 5))
    assert sample_quality.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert sample_quality.frechet_distance(a, a + 2) == pytest.approx(5 * 4)


def test_frechet_distance_of_scaled_normals_depends_on_covariance() -> None:
    """With C = k^2 I scaled by s: tr(C + s^2 C - 2 s C) = (1 - s)^2 tr(C)."""
    a = np.random.default_rng(0).normal(size=(500, 4))
    a -= a.mean(0)
    assert sample_quality.frechet_distance(a, 3 * a) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))


def test_two_sample_accuracy_of_one_distribution_is_one_half() -> None:
    rows = np.random.default_rng(0).integers(0, 17, (800, 4), np.uint8)
    assert sample_quality.two_sample_accuracy(rows[:400], rows[400:]) == pytest.approx((0.5, 0.5), abs=0.08)


def test_two_sample_accuracy_of_disjoint_distributions_is_one() -> None:
    rows = np.random.default_rng(0).integers(0, 9, (800, 4), np.uint8)
    assert sample_quality.two_sample_accuracy(rows[:400], rows[400:] + 20) == (1.0, 1.0)


def test_two_sample_accuracy_shows_collapsed_samples_in_each_set() -> None:
    spread = np.random.default_rng(0).integers(0, 255, (200, 64), np.uint8)
    collapsed = np.random.default_rng(1).integers(126, 129, (200, 64), np.uint8)
    assert sample_quality.two_sample_accuracy(collapsed, spread) == (1.0, 0.0)


def test_two_sample_accuracy_of_copies_is_below_one_half() -> None:
    rows = np.random.default_rng(0).integers(0, 255, (400, 8), np.uint8)
    assert max(sample_quality.two_sample_accuracy(rows, rows)) < 0.35


def test_bits_per_dimension_of_uniform_integers_is_log2_of_levels() -> None:
    nats = np.full(10, -64 * np.log(17))
    quality = sample_quality.bits_per_dimension(nats, 64, 500)
    assert quality.value == pytest.approx(np.log2(17))
    assert quality.unit == "bits/dim"
    assert quality.standard_error == pytest.approx(0)


def test_coverage_of_one_distribution_is_documented_value() -> None:
    generator = np.random.default_rng(0)
    values = [sample_quality.coverage(*generator.normal(size=(2, 500, 4))) for _ in range(10)]
    expected = 1 - np.prod([(500 - i) / (1000 - i) for i in range(1, 6)])
    assert np.mean(values) == pytest.approx(expected, abs=0.01)


def test_coverage_counts_only_modes_with_samples() -> None:
    """A quarter of the real rows is far from all samples; each other real row has a sample next to it."""
    real = np.random.default_rng(0).normal(size=(400, 2))
    samples = real[100:] + 1e-9
    real[:100] += 1000
    assert sample_quality.coverage(samples, real) == pytest.approx(0.75)
