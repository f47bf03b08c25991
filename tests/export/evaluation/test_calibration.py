"""Calibration: the temperature that was, errors by hand, and what chance alone would give."""

import numpy as np
import pytest

from export.evaluation.calibration import (
    TEMPERATURES,
    calibration,
    calibration_error,
    fit_temperature,
    softmax,
)


def drawn(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels drawn by the probabilities."""
    uniform = np.random.default_rng(seed).random((len(logits), 1))
    labels: np.ndarray = (softmax(logits).cumsum(1) < uniform).sum(1)
    return labels


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_the_temperature_that_made_the_labels_is_found(temperature: float) -> None:
    logits = 3 * np.random.default_rng(1).standard_normal((20_000, 5))
    found = fit_temperature(logits, drawn(logits / temperature))
    assert found == pytest.approx(temperature, rel=0.05)


def test_rows_that_are_all_right_do_not_ask_for_certainty() -> None:
    """With every margin 10, Platt's target (N + 1) / (N + 2) is met in closed form."""
    labels = np.arange(50) % 4
    logits = 10 * np.eye(4)[labels]
    assert fit_temperature(logits, labels) == pytest.approx(10 / np.log(3 * 51), rel=1e-6)


def test_the_temperature_keeps_its_bounds() -> None:
    labels = np.zeros(50, np.int64)
    wrong, tiny = 10 * np.eye(4)[labels + 1], 1e-3 * np.eye(4)[labels]
    assert fit_temperature(wrong, labels) == pytest.approx(TEMPERATURES[1])
    assert fit_temperature(tiny, labels) == pytest.approx(TEMPERATURES[0])


def test_the_error_by_hand() -> None:
    """Three rows of 0.9 with one hit are 0.567 off, one of 0.4 with a hit is 0.6 off."""
    confidence, hits = np.array([0.9, 0.9, 0.9, 0.4]), np.array([True, False, False, True])
    assert calibration_error(confidence, hits) == pytest.approx((3 * (0.9 - 1 / 3) + 0.6) / 4)


def test_full_confidence_has_a_bin() -> None:
    assert calibration_error(np.ones(4), np.array([True, True, True, False])) == pytest.approx(0.25)


def test_perfect_probabilities_score_the_floor() -> None:
    generator = np.random.default_rng(2)
    confidence = generator.uniform(0.5, 1, 400)
    found = [calibration(confidence, generator.random(400) < confidence) for _ in range(5)]
    assert np.mean([each.error for each in found]) == pytest.approx(found[0].floor, abs=0.015)


def test_overconfidence_stands_out_from_the_floor() -> None:
    generator = np.random.default_rng(3)
    confidence = np.full(400, 0.95)
    found = calibration(confidence, generator.random(400) < 0.7)
    assert found.error == pytest.approx(0.25, abs=3 * found.standard_error)
    assert found.error > found.floor + 5 * found.standard_error
