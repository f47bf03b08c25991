"""Profiler of step graphs: the kernels of a step, and the share of the time in which the GPU is busy.

It is a process of its own, because the profiler slows down later launches, and may end its process. It prints
one line of JSON for each measurement. The duration of a step is measured before the profiler starts.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu.timing import clocks, graphs
from benchmarks.gpu.timing.clocks import Call
from server.runtime import Device, device_context, set_deterministic, summarize_error

RUNTIME = "TorchScript"
KERNELS, REPLAY = "kernels", "CUDA graph"
# Seconds in which the duration of a call is measured.
SECONDS = 0.1


@dataclass(frozen=True)
class Profile:
    """Measurement of a step graph, or the error that prevented it.

    Attributes:
        model: name of the model.
        launch: KERNELS or REPLAY.
        rows: rows of a step.
        kernels: kernels, copies and fills of a step.
        kernel_seconds: their durations together.
        step_seconds: duration of a step in a row of steps, without the profiler.
        error: why there are no figures.
    """

    model: str
    launch: str
    rows: int
    kernels: float = 0.0
    kernel_seconds: float = 0.0
    step_seconds: float = 0.0
    error: str = ""

    @property
    def busy(self) -> float:
        """Share of the time in which a kernel runs."""
        return self.kernel_seconds / self.step_seconds if self.step_seconds else float("nan")


@dataclass(frozen=True)
class _Loop:
    """A step to call again and again."""

    model: str
    launch: str
    rows: int
    call: Call

    def prepare(self) -> Call:
        """Return the call, or the replay of a CUDA graph that is captured now."""
        return clocks.capture(self.call) if self.launch == REPLAY else self.call


def command(device: str, models: Sequence[tuple[Path, int]], calls: int) -> list[str]:
    """Return the command that profiles calls of some models; each has the directory of its name, and rows."""
    items = [f"{path}={rows}" for path, rows in models]
    options = ["--device", device, "--calls", str(calls)]
    return [sys.executable, "-m", "benchmarks.gpu.timing.profiling", *options, *items]


def parse_output(output: str) -> list[Profile]:
    """Return the measurements that were printed, also by a process that did not come to its end."""
    return [Profile(**json.loads(line)) for line in output.splitlines() if line.startswith("{")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timing.profiling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("models", nargs="+", metavar="DIRECTORY/NAME=ROWS")
    options = parser.parse_args(arguments)
    # CUPTI, the library behind the profiler, fails with CUDA graphs if it is closed and opened again.
    os.environ["TEARDOWN_CUPTI"] = "0"
    device = Device(options.device)
    set_deterministic(device)
    with device_context(device.torch):
        _measure([_split(text) for text in options.models], device, options.calls)
    return 0


def _split(text: str) -> tuple[Path, int]:
    path, _, rows = text.rpartition("=")
    return Path(path), int(rows)


def _measure(models: Sequence[tuple[Path, int]], device: Device, calls: int) -> None:
    loops = [loop for path, rows in models for loop in _open(path, rows, device)]
    timed = [(loop, _step_seconds(loop, device)) for loop in loops]
    clocks.start_profiler(device.torch)
    for loop, step_seconds in timed:
        if step_seconds is not None:
            _profile(loop, step_seconds, device, calls)


def _open(path: Path, rows: int, device: Device) -> list[_Loop]:
    launches = (KERNELS, REPLAY) if device.is_cuda else (KERNELS,)
    try:
        step_graph = graphs.read(path.parent, graphs.CASES[path.name])
        graph = graphs.open_graph(step_graph, RUNTIME, device)
        call = step_graph.bind(graph, rows, device.torch)
    except Exception as error:  # others are measured
        _print_error(path.name, KERNELS, rows, error)
        return []
    return [_Loop(path.name, launch, rows, call) for launch in launches]


def _step_seconds(loop: _Loop, device: Device) -> float | None:
    try:
        return clocks.median_seconds(loop.prepare(), device.torch, SECONDS)
    except Exception as error:  # others are measured
        _print_error(loop.model, loop.launch, loop.rows, error)
        return None


def _profile(loop: _Loop, step_seconds: float, device: Device, calls: int) -> None:
    try:
        activity = clocks.profile_call(loop.prepare(), device.torch, calls)
    except Exception as error:  # others are measured
        _print_error(loop.model, loop.launch, loop.rows, error)
        return
    figures = (activity.kernels, activity.seconds, step_seconds)
    _print(Profile(loop.model, loop.launch, loop.rows, *figures))


def _print_error(model: str, launch: str, rows: int, error: Exception) -> None:
    _print(Profile(model, launch, rows, error=summarize_error(error)))


def _print(measurement: Profile) -> None:
    print(json.dumps(asdict(measurement)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
