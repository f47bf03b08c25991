"""Calibration of a classifier: temperature scaling and the expected calibration error.

Temperature scaling (Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks", 2017) divides
all logits by one temperature, fitted on held-out rows. It does not change the predicted labels.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPERATURE_RANGE = (0.05, 20.0)
NUM_BINS = 15
_NUM_BISECTIONS = 60
_NUM_RESAMPLES = 1000

Floats = NDArray[np.floating[Any]]


def fit_temperature(logits: Floats, labels: NDArray[np.int64]) -> float:
    """Return the temperature in TEMPERATURE_RANGE that minimizes the cross-entropy.

    The targets are those of Platt (1999): the label has probability (N + 1) / (N + 2). With one-hot targets,
    the best temperature would be 0 if all rows are classified correctly.

    Args:
        logits: floats [N, C].
        labels: int64 [N], each in 0..C-1.
    """
    num_rows, num_classes = logits.shape
    targets = np.full((num_rows, num_classes), 1 / (num_rows + 2) / (num_classes - 1))
    targets[np.arange(num_rows), labels] = (num_rows + 1) / (num_rows + 2)
    logits = logits.astype(np.float64)
    low, high = (float(np.log(bound)) for bound in TEMPERATURE_RANGE)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        # The cross-entropy is convex in 1 / temperature; this is its derivative.
        slope = float(((softmax(logits / np.exp(middle)) - targets) * logits).sum())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Return the probabilities float64 [N, C] of logits [N, C]."""
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return probabilities


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error of a set of predictions.

    Attributes:
        error: the error with NUM_BINS equal bins.
        standard_error: bootstrap standard error of `error`.
        reference_value: the error of perfectly calibrated predictions on as many rows. It is above 0, because
            the accuracy of a bin is estimated from few rows.
    """

    error: float
    standard_error: float
    reference_value: float


def measure_calibration(confidence: Floats, is_correct: NDArray[np.bool_]) -> Calibration:
    """Measure the calibration of predicted labels.

    Args:
        confidence: probability of the predicted label [N].
        is_correct: whether the predicted label is right [N].

    Returns:
        The error, with its standard error over bootstrap samples of the rows. The reference value draws
        `is_correct` with the probabilities in `confidence`.
    """
    generator = np.random.default_rng(0)
    num_rows, confidence = len(is_correct), confidence.astype(np.float64)
    bootstrap = [
        calibration_error(confidence[rows], is_correct[rows])
        for rows in generator.integers(0, num_rows, (_NUM_RESAMPLES, num_rows))
    ]
    calibrated = [
        calibration_error(confidence, generator.random(num_rows) < confidence) for _ in range(_NUM_RESAMPLES)
    ]
    return Calibration(
        calibration_error(confidence, is_correct),
        float(np.std(bootstrap, ddof=1)),
        float(np.mean(calibrated)),
    )


def calibration_error(confidence: Floats, is_correct: NDArray[np.bool_]) -> float:
    """Return the expected calibration error (Naeini, Cooper & Hauskrecht 2015).

    It is the mean over rows of |accuracy - mean confidence| of the bin of the row.
    """
    gaps = np.bincount(bin_indices(confidence), weights=is_correct - confidence, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(is_correct))


def bin_indices(confidence: Floats) -> NDArray[np.int64]:
    """Return the bin of each probability [N]: NUM_BINS equal bins, closed at their upper edges."""
    return np.clip(np.ceil(confidence * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
