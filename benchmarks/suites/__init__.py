"""Benchmarks, several implementations of `Benchmark`. Each is imported when it runs."""

import importlib

from benchmarks.suites.base import Bench, Benchmark, select

NAMES = ("scheduling", "efficiency", "calls", "scale", "determinism")


def load(name: str) -> Benchmark:
    """Return the function `run` of a benchmark."""
    run: Benchmark = importlib.import_module(f"benchmarks.suites.{name}").run
    return run


__all__ = ["NAMES", "Bench", "Benchmark", "load", "select"]
