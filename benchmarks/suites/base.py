"""What a benchmark is given, and what it must be."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from benchmarks import artifacts
from benchmarks.load import Callers
from benchmarks.report import Section


class OfModel(Protocol):
    """What is measured of one model."""

    @property
    def model(self) -> str: ...


M = TypeVar("M", bound=OfModel)


@dataclass(frozen=True)
class Bench:
    """Where artifacts are kept, who calls, and how thorough to be; `preset` is the networks' size."""

    directory: Path
    callers: Callers
    is_quick: bool = False
    preset: str = "starter"

    @property
    def repeats(self) -> int:
        """How often each side of a comparison is measured."""
        return 1 if self.is_quick else 5

    @property
    def few_repeats(self) -> int:
        """The same for what takes long, or has no target."""
        return 1 if self.is_quick else 3

    def either(self, quick: float, full: float) -> float:
        """A duration in seconds, or any other measure of thoroughness."""
        return quick if self.is_quick else full

    def enough(self, cases: Sequence[M]) -> list[M]:
        """All cases; when it is quick, those whose model is made in seconds."""
        return [case for case in cases if not self.is_quick or case.model in artifacts.QUICK]

    def models(self, *names: str, formats: Sequence[str] = ("onnx",)) -> Path:
        """A directory that shows these artifacts and no others."""
        made = self.directory / "-".join((self.preset, *formats))
        return artifacts.view(names, artifacts.make(names, made, self.preset, formats))


class Benchmark(Protocol):
    """One question about speed. It may take minutes, a few seconds when it is quick."""

    def __call__(self, bench: Bench) -> Section: ...


def per_second(call: Callable[[], object], seconds: float) -> float:
    """How often a call is done in a second: after one to warm up, for so long and once at least."""
    call()
    start, done = time.perf_counter(), 0
    while not done or time.perf_counter() < start + seconds:
        call()
        done += 1
    return done / (time.perf_counter() - start)


def chosen(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that were asked for, all when there are none; ValueError lists what there is."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(known)}")
    return [name for name in known if not names or name in names]
