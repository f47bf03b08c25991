"""Interface of a benchmark, and its settings."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks import artifacts
from benchmarks.load import Clients
from benchmarks.report import Section


class HasModel(Protocol):
    """Case that is measured with one model."""

    @property
    def model(self) -> str: ...


CaseT = TypeVar("CaseT", bound=HasModel)


@dataclass(frozen=True)
class Bench:
    """Settings of a run.

    Attributes:
        directory: directory of the artifacts.
        clients: process that runs load generators.
        is_quick: measure a part, once and briefly.
        preset: size of the networks.
    """

    directory: Path
    clients: Clients
    is_quick: bool = False
    preset: str = "starter"

    @property
    def repeats(self) -> int:
        """Repeats of a figure with a target."""
        return 1 if self.is_quick else 5

    @property
    def few_repeats(self) -> int:
        """Repeats of a figure that takes long or has no target."""
        return 1 if self.is_quick else 3

    def scale(self, quick: float, full: float) -> float:
        """Return the duration or count of a quick or of a full run."""
        return quick if self.is_quick else full

    def select_cases(self, cases: Sequence[CaseT]) -> list[CaseT]:
        """Return all cases, or in a quick run those whose model is made in seconds."""
        return [case for case in cases if not self.is_quick or case.model in artifacts.QUICK]

    def models(self, *names: str, formats: Sequence[str] = ("onnx",)) -> Path:
        """Return a directory with the artifacts of these models only; make those that are missing."""
        directory = self.directory / "-".join((self.preset, *formats))
        return artifacts.link(names, artifacts.make(names, directory, self.preset, formats))


class Benchmark(Protocol):
    """Function that measures one aspect of speed, in minutes or, in a quick run, in seconds."""

    def __call__(self, bench: Bench) -> Section: ...


def per_second(call: Callable[[], object], seconds: float) -> float:
    """Return the calls per second over at least `seconds` and at least one call, after one warm-up call."""
    call()
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() < start + seconds:
        call()
        count += 1
    return count / (time.perf_counter() - start)


def select(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the known names that are in `names`, or all if `names` is empty.

    Raises:
        ValueError: A name is not known.
    """
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"unknown benchmark {', '.join(unknown)}; expected some of: {', '.join(known)}")
    return [name for name in known if not names or name in names]
