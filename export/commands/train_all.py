"""python -m export all: train all artifacts that are missing, several at a time."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands import jobs
from export.commands.jobs import Job
from export.commands.options import add_command, add_training, positive_integer
from export.commands.process_pool import Result, run_commands

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Train all artifacts that are missing and need no download, or the named ones, for example digits-vae.
python -m export list shows the families and their datasets.

Each training runs in its own process with one thread; the longest start first. The output of each is in
MODELS/.logs/NAME.log. If one fails, the others continue, and the exit status is 1 at the end.

Ctrl-C stops all of them and keeps their checkpoints; repeat the command to resume."""

LOG_DIRECTORY = ".logs"


def add(commands: "Commands") -> None:
    """Add the command `all`."""
    parser = add_command(commands, "all", "train all artifacts that are missing, in parallel", _DESCRIPTION)
    parser.add_argument("names", nargs="*", metavar="NAME", help="artifacts to train (default: all)")
    add_training(parser)
    add_parallel_jobs(parser)
    parser.set_defaults(command=train_missing)


def add_parallel_jobs(parser: argparse.ArgumentParser) -> None:
    """Add --jobs."""
    parser.add_argument(
        "--jobs",
        type=positive_integer,
        default=os.cpu_count() or 1,
        metavar="N",
        help="trainings that run at the same time, with one thread each (default: one per core, %(default)s)",
    )


def train_missing(options: argparse.Namespace) -> int:
    """Train the artifacts of `options.names` that are missing; return the exit status."""
    start = time.monotonic()
    missing = select_missing(jobs.select_jobs(options.names), options.models)
    if not missing:
        return 0
    size = min(options.jobs, len(missing))
    logs = options.models / LOG_DIRECTORY
    print(f"Training {len(missing)} artifact(s), {size} at a time; logs are in {logs}.", flush=True)
    commands = {job.name: _train_command(job, options) for job in missing}
    results = run_commands(commands, size, logs)
    _print_results(results, options.models)
    failed = [result.name for result in results if result.status]
    minutes = (time.monotonic() - start) / 60
    print(f"{len(results) - len(failed)} of {len(results)} artifact(s) trained in {minutes:.1f} minutes.")
    if failed:
        names = " ".join(failed)
        print(f"FAILED: {names}. To retry: python -m export all {names}", file=sys.stderr)
    return 1 if failed else 0


def select_missing(jobs: Sequence[Job], models: Path) -> list[Job]:
    """Return the jobs without an artifact whose data is available; print why the others are skipped."""
    missing = []
    for job in jobs:
        if job.has_artifact(models):
            print(f"{models / job.name} exists.")
        elif job.missing_package:
            print(
                f"{job.name} is skipped: its dataset needs the package {job.missing_package}, "
                f"which is not installed; install it with: pip install {job.missing_package}"
            )
        else:
            missing.append(job)
    return missing


def _train_command(job: Job, options: argparse.Namespace) -> list[str]:
    settings = {
        "data": job.dataset,
        "name": job.name,
        "models": options.models,
        "preset": options.preset,
        "format": options.format,
        "seed": options.seed,
        "device": options.device,
        "threads": 1,
    }
    arguments = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    if not options.resume:
        arguments.append("--no-resume")
    return [sys.executable, "-m", "export", "train", job.family, *arguments]


def _print_results(results: Sequence[Result], models: Path) -> None:
    print(f"\n{'artifact':<18} {'seconds':>7}  first quality figure, on test rows")
    for result in results:
        print(f"{result.name:<18} {result.seconds:7.0f}  {_first_figure(result, models)}".rstrip())


def _first_figure(result: Result, models: Path) -> str:
    if result.status:
        return "FAILED"
    from export.artifacts import reader
    from export.evaluation import formatting

    directory = models / result.name
    manifest = reader.read(directory / str(max(reader.versions(directory))))
    return formatting.format_quality(manifest.quality[0]) if manifest.quality else ""
