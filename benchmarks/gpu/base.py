"""Interface of a part of the GPU check, and what a part finds."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.report import Result, Table


@dataclass(frozen=True)
class Check:
    """Settings of a run.

    Attributes:
        device: device to check: cuda, or cpu for a rehearsal.
        artifacts: directory of the artifacts that the bundle carries (bundle.py).
        directory: directory for files that a part makes.
        is_rehearsal: measure little, because figures of a rehearsal are never published.
    """

    device: str
    artifacts: Path
    directory: Path
    is_rehearsal: bool


@dataclass(frozen=True)
class Verdict:
    """Outcome of a requirement that either holds or does not.

    Attributes:
        requirement: what must hold, with its tolerance.
        holds: whether it does.
        detail: the largest difference, the number of comparisons, or what failed.
    """

    requirement: str
    holds: bool
    detail: str = ""


@dataclass(frozen=True)
class Note:
    """A sentence that explains figures, or says what was skipped and why."""

    text: str


Finding = Verdict | Result | Table | Note


class Part(Protocol):
    """Function that yields what it finds, as soon as it finds it: it may be stopped at any time."""

    def __call__(self, check: Check) -> Iterator[Finding]: ...
