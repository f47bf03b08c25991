"""Calibration: fitted temperature, error on worked examples, and the reference value."""

import numpy as np
import pytest

from export.evaluation.calibration import (
    TEMPERATURE_RANGE,
    calibration_error,
    fit_temperature,
    measure_calibration,
    softmax,
)


def draw_labels(logits: np.ndarray, seed: int = 0) -> np.ndarray:
    """Draw a label for each row from its predicted probabilities."""
    uniform = np.random.default_rng(seed).random((len(logits), 1))
    labels: np.ndarray = (softmax(logits).cumsum(1) < uniform).sum(1)
    return labels


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_fit_temperature_recovers_temperature_of_labels(temperature: float) -> None:
    logits = 3 * np.random.default_rng(1).standard_normal((20_000, 5))
    fitted = fit_temperature(logits, draw_labels(logits / temperature))
    assert fitted == pytest.approx(temperature, rel=0.05)


def test_fit_temperature_stays_finite_when_all_rows_are_correct() -> None:
    """With every margin 10, the target (N + 1) / (N + 2) has a solution in closed form."""
    labels = np.arange(50) % 4
    logits = 10 * np.eye(4)[labels]
    assert fit_temperature(logits, labels) == pytest.approx(10 / np.log(3 * 51), rel=1e-6)


def test_fit_temperature_stays_in_range() -> None:
    labels = np.zeros(50, np.int64)
    wrong, tiny = 10 * np.eye(4)[labels + 1], 1e-3 * np.eye(4)[labels]
    assert fit_temperature(wrong, labels) == pytest.approx(TEMPERATURE_RANGE[1])
    assert fit_temperature(tiny, labels) == pytest.approx(TEMPERATURE_RANGE[0])


def test_calibration_error_matches_worked_example() -> None:
    """Three rows at 0.9 with one hit are 0.567 off; one row at 0.4 with a hit is 0.6 off."""
    confidence, is_correct = np.array([0.9, 0.9, 0.9, 0.4]), np.array([True, False, False, True])
    assert calibration_error(confidence, is_correct) == pytest.approx((3 * (0.9 - 1 / 3) + 0.6) / 4)


def test_calibration_error_bins_confidence_one() -> None:
    assert calibration_error(np.ones(4), np.array([True, True, True, False])) == pytest.approx(0.25)


def test_calibration_of_exact_probabilities_equals_reference_value() -> None:
    generator = np.random.default_rng(2)
    confidence = generator.uniform(0.5, 1, 400)
    results = [measure_calibration(confidence, generator.random(400) < confidence) for _ in range(5)]
    assert np.mean([result.error for result in results]) == pytest.approx(
        results[0].reference_value, abs=0.015
    )


def test_calibration_of_overconfident_model_exceeds_reference_value() -> None:
    generator = np.random.default_rng(3)
    confidence = np.full(400, 0.95)
    result = measure_calibration(confidence, generator.random(400) < 0.7)
    assert result.error == pytest.approx(0.25, abs=3 * result.standard_error)
    assert result.error > result.reference_value + 5 * result.standard_error
