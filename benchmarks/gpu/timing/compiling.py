"""Jobs that take long, in a process of their own, while others measure.

A job is TASK:NAME. `artifact` exports the U-Net; `AOTInductor` compiles the step of a model to a file;
`torch.compile` compiles it to the cache of Inductor (TORCHINDUCTOR_CACHE_DIR), where another process finds
it. Each job has a time limit, and writes its outcome to a file.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Self

ARTIFACT, AOT_INDUCTOR, TORCH_COMPILE = "artifact", "AOTInductor", "torch.compile"
CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# Threads of torch, and processes of Inductor.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
_NONE: Mapping[str, str] = {}
_POLL_SECONDS = 0.1
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Job:
    """A task for a model of a directory of artifacts."""

    task: str
    name: str

    def __str__(self) -> str:
        return f"{self.task}:{self.name}"

    @property
    def file_name(self) -> str:
        return f"{self.task}-{self.name}"


@dataclass(frozen=True)
class Outcome:
    """How long a job took, and why it failed; "" if it did not."""

    seconds: float
    error: str = ""


class Compiler:
    """Processes that run jobs one after the other, each process a list of its own; closing it ends them.

    Attributes:
        directory: directory of compiled files, the cache and the outcomes; old outcomes are deleted.
        device: name of the device.
        job_seconds: time limit of a job.
        threads: threads of a process, and processes with which it compiles kernels.
    """

    def __init__(self, directory: Path, device: str, job_seconds: float, threads: int) -> None:
        self.directory, self.device = directory, device
        self.job_seconds, self.threads = job_seconds, threads
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.json"):
            path.unlink()
        self._processes: dict[Job, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in set(self._processes.values()):
            with _ignore_ended():
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    @property
    def cache(self) -> Path:
        """The directory of Inductor's cache."""
        return self.directory / "inductor"

    def package(self, name: str) -> Path:
        """Return the path of what AOTInductor compiles of a model."""
        return self.directory / f"{name}.pt2"

    def start(self, models: Path, jobs: Sequence[Job], variables: Mapping[str, str] = _NONE) -> None:
        """Start a process for some jobs.

        Args:
            models: directory of the artifacts that the jobs read or write.
            jobs: what to do, in order.
            variables: further environment variables.
        """
        command = [sys.executable, "-m", "benchmarks.gpu.timing.compiling", "--device", self.device]
        command += ["--models", str(models), "--out", str(self.directory)]
        command += ["--seconds", str(self.job_seconds), *map(str, jobs)]
        compiling = {CACHE_VARIABLE: str(self.cache), **dict.fromkeys(_THREAD_VARIABLES, str(self.threads))}
        log = (self.directory / f"{jobs[0].file_name}.log").open("wb")
        with log:
            # In a session of its own, so that the processes that it starts end with it.
            process = subprocess.Popen(
                command,
                env={**os.environ, **compiling, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes.update(dict.fromkeys(jobs, process))

    def outcome(self, job: Job) -> Outcome | None:
        """Return the outcome of a job; None while it waits or runs."""
        path = self.directory / f"{job.file_name}.json"
        if job not in self._processes:
            return Outcome(0.0, "it was not started")
        has_ended = self._processes[job].poll() is not None
        if path.exists():
            return Outcome(**json.loads(path.read_text()))
        return Outcome(0.0, "its process ended without it") if has_ended else None

    def wait(self, job: Job, seconds: float) -> Outcome | None:
        """Return the outcome of a job; None if it is not there after some seconds."""
        end = time.monotonic() + seconds
        while (outcome := self.outcome(job)) is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the jobs of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timing.compiling")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("jobs", nargs="+", metavar="TASK:NAME")
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    for text in options.jobs:
        job, start, error = Job(*text.split(":")), time.monotonic(), ""
        try:
            with time_limit(options.seconds):
                _run(job, options)
        except Exception as failure:  # compilers raise exceptions of any type
            error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:_ERROR_CHARACTERS]}"
        outcome = Outcome(time.monotonic() - start, error)
        print(f"{job} {outcome}", flush=True)
        _write(options.out / f"{job.file_name}.json", json.dumps(asdict(outcome)))
    return 0


def _run(job: Job, options: argparse.Namespace) -> None:
    if job.task == ARTIFACT:
        _export_unet(options.models)
        return
    from benchmarks.gpu.timing import graphs
    from server.runtime import Device, device_context, set_deterministic

    device = Device(options.device)
    set_deterministic(device)
    step_graph = graphs.read(options.models, graphs.CASES[job.name])
    with device_context(device.torch):
        if job.task == AOT_INDUCTOR:
            path = options.out / f"{job.name}.pt2"
            graphs.compile_package(step_graph, device.torch, path, len(options.jobs) == 1)
        else:
            graphs.open_compiled(step_graph, device.torch)


def _export_unet(models: Path) -> None:
    from benchmarks.gpu.timing.graphs import UNET, UNET_FILE
    from export import custom_model
    from server.runtime.onnx import has_cuda_provider

    formats = ("torchscript", "torch_export", *(("onnx",) if has_cuda_provider() else ()))
    shutil.rmtree(models / UNET.model, ignore_errors=True)
    custom_model.write(UNET_FILE, models, UNET.model, formats)


def _end_with_parent(parent: int) -> None:
    """Kill this process and those that it started when its parent has ended, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Return a context that raises TimeoutError after some seconds; for the main thread."""

    def stop(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _ignore_ended() -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        return


def _write(path: Path, text: str) -> None:
    """Write a file; a reader never sees half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
