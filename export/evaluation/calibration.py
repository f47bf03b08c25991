"""How far a classifier's probabilities can be believed, and one number that makes them better.

Guo, Pleiss, Sun & Weinberger, "On Calibration of Modern Neural Networks" (2017):
dividing all logits by one temperature, fitted on rows that were held out, leaves
every decision as it is and mends most over- or underconfidence. Knows arrays only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEMPERATURES = (0.05, 20.0)
BINS = 15
_HALVINGS = 60
_DRAWS = 1000

Floats = NDArray[np.floating[Any]]


def fit_temperature(logits: Floats, labels: NDArray[np.int64]) -> float:
    """The temperature of least cross-entropy for logits [N, C] and labels [N], within TEMPERATURES.

    The targets are Platt's (1999): the label has probability (N + 1) / (N + 2). Rows
    that are all classified rightly would otherwise ask for temperature zero.
    """
    count, classes = logits.shape
    targets = np.full((count, classes), 1 / (count + 2) / (classes - 1))
    targets[np.arange(count), labels] = (count + 1) / (count + 2)
    wide = logits.astype(np.float64)
    low, high = (float(np.log(bound)) for bound in TEMPERATURES)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # The cross-entropy is convex in 1 / temperature; this is its slope there.
        slope = float(((softmax(wide / np.exp(middle)) - targets) * wide).sum())
        low, high = (middle, high) if slope > 0 else (low, middle)
    return float(np.exp((low + high) / 2))


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities [N, C] of logits [N, C]."""
    weights = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    probabilities: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
    return probabilities


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error with BINS equal bins, its standard error, and that of a perfect one.

    Few rows give even perfect probabilities an error above zero: the `floor`.
    """

    error: float
    standard_error: float
    floor: float


def calibration(confidence: Floats, hits: NDArray[np.bool_]) -> Calibration:
    """Of the top labels' probabilities [N], and whether those labels were right [N].

    The standard error is the bootstrap's; the floor redraws the hits by the
    confidences themselves.
    """
    generator = np.random.default_rng(0)
    count, sure = len(hits), confidence.astype(np.float64)
    drawn = generator.integers(0, count, (_DRAWS, count))
    again = [calibration_error(sure[rows], hits[rows]) for rows in drawn]
    perfect = [calibration_error(sure, generator.random(count) < sure) for _ in range(_DRAWS)]
    return Calibration(calibration_error(sure, hits), float(np.std(again, ddof=1)), float(np.mean(perfect)))


def calibration_error(confidence: Floats, hits: NDArray[np.bool_]) -> float:
    """Mean over rows of |accuracy - confidence| of the row's bin (Naeini, Cooper & Hauskrecht 2015)."""
    gaps = np.bincount(bins(confidence), weights=hits - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(hits))


def bins(confidence: Floats) -> NDArray[np.int64]:
    """Which of the BINS equal bins each probability [N] is in; the upper edge belongs to a bin."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
