"""python -m export all, and starter, its quick part: many artifacts, several at a time."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands import jobs, process_pool
from export.commands.jobs import Job
from export.commands.options import add_models, add_training, command, positive
from export.commands.process_pool import Result

if TYPE_CHECKING:
    from export.commands.options import Commands

_ALL = """\
Make every artifact that is missing of data that needs no download, or those that are named, such as
digits-vae (python -m export list shows the families and their data). Each training runs in a process with one
thread, the longest begin first. One that fails is reported at the end, after the others, with exit status 1.
Ctrl-C stops them all and keeps their checkpoints; the same command goes on."""

_STARTER = """\
The quick part of `all`, for a first look: make the starter models that are missing."""


def add(commands: "Commands") -> None:
    """The commands `all` and `starter`."""
    everything = command(commands, "all", "make every artifact that is missing, several at a time", _ALL)
    everything.add_argument("names", nargs="*", metavar="NAME", help="artifacts to make; all when left out")
    add_training(everything)
    _add_jobs(everything)
    everything.set_defaults(command=_make)
    starter = command(commands, "starter", "make the starter models that are missing", _STARTER)
    add_models(starter)
    _add_jobs(starter)
    starter.set_defaults(command=_make, names=jobs.STARTERS, **_STARTER_SETTINGS)


_STARTER_SETTINGS = {"preset": "starter", "format": "both", "seed": 0, "device": "cpu", "fresh": False}


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=positive,
        default=os.cpu_count() or 1,
        help="trainings at a time, one thread each; as many as there are cores when left out (%(default)s)",
    )


def _make(options: argparse.Namespace) -> int:
    started = time.monotonic()
    todo = missing(jobs.jobs(options.names), options.models)
    if not todo:
        return 0
    size = min(options.jobs, len(todo))
    print(f"Making {len(todo)} artifact(s), {size} at a time.", flush=True)
    crew = process_pool.ProcessPool(size, process_pool.display(size, len(todo)))
    results = crew.run({job.name: _command(job, options) for job in todo})
    _print_results(results, options.models)
    failed = [result.name for result in results if result.status]
    print(f"{len(results) - len(failed)} made in {(time.monotonic() - started) / 60:.1f} minutes.")
    if failed:
        names = " ".join(failed)
        print(f"FAILED: {names}. To try again: python -m export all {names}", file=sys.stderr)
    return 1 if failed else 0


def missing(jobs: Sequence[Job], models: Path) -> list[Job]:
    """The jobs that are not done and can be; of the others it is said why not."""
    for job in jobs:
        if job.is_made(models):
            print(f"{models / job.name} is there.")
        elif job.lack:
            print(
                f"{job.name} is left out: its data comes with the package {job.lack}, which is not installed."
            )
    return [job for job in jobs if not job.is_made(models) and not job.lack]


def _command(job: Job, options: argparse.Namespace) -> list[str]:
    settings = {
        "data": job.data,
        "name": job.name,
        "models": options.models,
        "preset": options.preset,
        "format": options.format,
        "seed": options.seed,
        "device": options.device,
        "threads": 1,
    }
    given = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return [
        sys.executable, "-m", "export", "train", job.family, *given, *(["--fresh"] if options.fresh else [])
    ]  # fmt: skip


def _print_results(results: Sequence[Result], models: Path) -> None:
    print(f"\n{'artifact':<18} {'seconds':>7}  headline figure, on test rows")
    for result in results:
        print(f"{result.name:<18} {result.seconds:7.0f}  {_headline(result, models)}".rstrip())


def _headline(result: Result, models: Path) -> str:
    if result.status:
        return "FAILED"
    from export.artifacts import reader
    from export.evaluation import formatting

    directory = models / result.name
    manifest = reader.read(directory / str(max(reader.versions(directory))))
    return formatting.line(manifest.quality[0]) if manifest.quality else ""
