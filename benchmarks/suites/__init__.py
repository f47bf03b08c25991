"""The benchmarks, by name. One is imported when it is run."""

import importlib

from benchmarks.suites.base import Bench, Benchmark, chosen

NAMES = ("scheduling", "efficiency", "calls", "scale", "determinism", "device")


def load(name: str) -> Benchmark:
    """A benchmark's `run`."""
    run: Benchmark = importlib.import_module(f"benchmarks.suites.{name}").run
    return run


__all__ = ["NAMES", "Bench", "Benchmark", "chosen", "load"]
