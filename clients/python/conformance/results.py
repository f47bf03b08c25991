"""Checks, their outcomes, and the table with one line per check."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import samovar

_LINE = "{:<16} {:<17} {:<41} {:>5} {:>7}  {:<12} {:<17} {:>8}  {}"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a check, which is passed if it has no problems.

    Attributes:
        shape: Shape of the answer.
        summary: Result of a passed check.
        problems: Differences from the expected answer.
        steps: Number of steps of a row; "" if the check has no single one.
        score_kind: Kind of the scores; "" for other operations.
        seconds: Duration of the request; None for the duration of the whole check.
    """

    shape: tuple[int, ...]
    summary: str
    problems: tuple[str, ...] = ()
    steps: str = ""
    score_kind: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Check:
    """One check of an operation; `name` is unique among the checks of the operation."""

    model: str
    operation: str
    name: str
    num_rows: int
    run: Callable[[], Outcome]


def print_header() -> None:
    """Print the names of the columns."""
    _print_line("MODEL", "OPERATION", "CHECK", "ROWS", "STEPS", "SCORE", "SHAPE", "MS", "RESULT")


def run_check(check: Check) -> bool:
    """Run a check, print its line, and return whether it passed."""
    start = time.perf_counter()
    try:
        outcome = check.run()
    except (samovar.SamovarError, ImportError) as error:  # The MIDI check needs mido.
        outcome = Outcome((), "", (str(error),))
    seconds = time.perf_counter() - start if outcome.seconds is None else outcome.seconds
    result = f"FAILED: {'; '.join(outcome.problems)}" if outcome.problems else outcome.summary
    _print_line(
        check.model,
        check.operation,
        check.name,
        check.num_rows,
        outcome.steps,
        outcome.score_kind,
        list(outcome.shape),
        f"{1000 * seconds:.0f}",
        result,
    )
    return not outcome.problems


def _print_line(*columns: object) -> None:
    print(_LINE.format(*map(str, columns)), flush=True)
