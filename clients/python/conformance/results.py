"""The table that exercises fill, a line for each as it is done. Knows no calls."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import samovar

_LINE = "{:<17}{:<18}{:<42}{:>5}{:>8}  {:<13}{:<18}{:>8}  {}"


@dataclass(frozen=True)
class Found:
    """What came of an exercise: the shape of the answer, what it was found to be, what is wrong with it."""

    shape: tuple[int, ...]
    rightly: str
    wrong: tuple[str, ...] = ()
    steps: str = ""
    kind: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Exercise:
    """One cell of what a model can do; `what` tells it from the others of the operation."""

    model: str
    operation: str
    what: str
    rows: int
    do: Callable[[], Found]


def head() -> None:
    """Print what the columns are."""
    _print("MODEL", "OPERATION", "", "ROWS", "STEPS", "SCORE", "SHAPE", "MS", "SAME ROWS")


def perform(exercise: Exercise) -> bool:
    """Do it and print its line; whether all was right."""
    begun = time.perf_counter()
    try:
        found = exercise.do()
    except samovar.SamovarError as error:
        found = Found((), "", (str(error),))
    seconds = time.perf_counter() - begun if found.seconds is None else found.seconds
    verdict = f"FAILED: {'; '.join(found.wrong)}" if found.wrong else found.rightly
    where = (exercise.model, exercise.operation, exercise.what, exercise.rows)
    _print(*where, found.steps, found.kind, list(found.shape), f"{1000 * seconds:.0f}", verdict)
    return not found.wrong


def _print(*columns: object) -> None:
    print(_LINE.format(*map(str, columns)), flush=True)
