"""What repeats say: a median with its range, quotients of neighbours, percentiles. Pure numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PERCENTS = (50, 95, 99)
LATENCIES = tuple(f"p{percent} ms" for percent in PERCENTS)
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Spread:
    """The median of several repeats, and the least and the most of them, where these differ."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return short(self.median)
        return f"{short(self.median)} ({short(self.low)}–{short(self.high)})"


def spread(values: Sequence[float]) -> Spread:
    """The spread of some repeats; ValueError without any."""
    if not len(values):
        raise ValueError("expected at least one repeat, got none")
    return Spread(float(np.median(values)), float(np.min(values)), float(np.max(values)))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Quotients of figures that were measured one right after the other."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def percentile(seconds: Floats, percent: float) -> float:
    """A percentile in seconds, NaN of nothing."""
    return float(np.percentile(seconds, percent)) if len(seconds) else float("nan")


def of_each(repeats: Sequence[Floats], percent: float) -> list[float]:
    """A percentile of each repeat."""
    return [percentile(seconds, percent) for seconds in repeats]


def latencies(repeats: Sequence[Floats]) -> list[str]:
    """What stands under `LATENCIES`: percentiles in milliseconds, with the spread of the repeats."""
    return [str(spread([1000 * each for each in of_each(repeats, percent)])) for percent in PERCENTS]


def short(value: float) -> str:
    """Three digits that mean something."""
    if not np.isfinite(value):
        return "–"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.{2 if abs(value) < 10 else 1}f}"


def milliseconds(seconds: float) -> str:
    """A time as it is printed in tables."""
    return short(1000 * seconds)
