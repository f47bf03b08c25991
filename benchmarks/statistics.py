"""Statistics of repeated measurements: median and range, ratios of adjacent measurements, percentiles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 95, 99)
LATENCY_COLUMNS = tuple(f"p{percent} ms" for percent in PERCENTILES)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of repeats."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return format_number(self.median)
        return f"{format_number(self.median)} ({format_number(self.low)}–{format_number(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of repeats.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("expected at least one repeat, got none")
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the spread of ratios of measurements; those with the same index were taken back to back."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def percentile(seconds: Floats, percent: float) -> float:
    """Return a percentile in seconds; NaN if there are no values."""
    return float(np.percentile(seconds, percent)) if len(seconds) else float("nan")


def percentile_of_each(repeats: Sequence[Floats], percent: float) -> list[float]:
    """Return a percentile of each repeat, in seconds."""
    return [percentile(seconds, percent) for seconds in repeats]


def latency_cells(repeats: Sequence[Floats]) -> list[str]:
    """Return the cells of LATENCY_COLUMNS: the spread of each percentile over repeats, in milliseconds."""
    return [
        str(spread([1000 * seconds for seconds in percentile_of_each(repeats, percent)]))
        for percent in PERCENTILES
    ]


def format_number(value: float) -> str:
    """Return a number with three significant digits; a dash for NaN and infinity."""
    if not np.isfinite(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.{2 if abs(value) < 10 else 1}f}"


def format_milliseconds(seconds: float) -> str:
    """Return seconds as a number of milliseconds."""
    return format_number(1000 * seconds)
