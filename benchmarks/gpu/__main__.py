"""python -m benchmarks.gpu: run the parts of the GPU check, each in a process of its own."""

import argparse
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.base import Check
from benchmarks.gpu.parts import PARTS, PartEntry
from benchmarks.gpu.results import PartResult

PAGE = "gpu.md"
_ERROR_CHARACTERS = 2000

EPILOG = "parts, in this order:\n" + "\n".join(
    f"  {part.name:10} {part.seconds:4.0f} s  {part.purpose}" for part in PARTS
)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Prove and measure the server on a GPU. Results are written after each finding, so that "
        "a run that is stopped keeps what it has.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run (default: all)")
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu for a rehearsal (default: %(default)s)"
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("build/gpu/artifacts"),
        metavar="DIR",
        help="artifacts that `make gpu-bundle` made (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/gpu/results"),
        metavar="DIR",
        help="directory of the results (default: %(default)s)",
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.parts if name not in names]:
        parser.error(f"unknown part {unknown[0]!r}; expected some of: {', '.join(names)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return 0 if all are green, 1 if not."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    selected = [part for part in PARTS if not options.parts or part.name in options.parts]
    if options.child:
        return run_here(selected[0], options)
    start = time.monotonic()
    outcomes = [run_in_process(part, options) for part in selected]
    purposes = {part.name: part.purpose for part in PARTS}
    found = [result for part in PARTS if (result := results.load(part.name, options.out))]
    (options.out / PAGE).write_text(results.page(found, purposes))
    print(f"\n{time.monotonic() - start:.0f} s in all; results are in {options.out}", flush=True)
    for result in outcomes:
        print(f"  {result.name:10} {result.outcome:10} {result.seconds:5.0f} s", flush=True)
    return 0 if all(result.is_green for result in outcomes) else 1


def run_in_process(part: PartEntry, options: argparse.Namespace) -> PartResult:
    """Run a part in a process of its own, and stop its process group at its time limit."""
    print(f"\n== {part.name}: {part.purpose} At most {part.seconds:.0f} s.", flush=True)
    results.save(PartResult(part.name, options.device), options.out)
    command = [sys.executable, "-m", "benchmarks.gpu", part.name, "--child", "--device", options.device]
    command += ["--artifacts", str(options.artifacts), "--out", str(options.out)]
    start = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, env=_environment(options.device))
    try:
        status = process.wait(part.seconds)
        outcome = "done" if status == 0 else "failed"
    except subprocess.TimeoutExpired:
        outcome = "timed out"
    finally:
        # Servers and loaders of the part are in its process group.
        _kill_group(process.pid)
        process.wait()
    result = results.load(part.name, options.out)
    assert result is not None, "the file of a part vanished. This is a bug."
    result.outcome, result.seconds = outcome, time.monotonic() - start
    if outcome == "failed" and not result.error:
        result.error = f"the process ended with status {status}"
    results.save(result, options.out)
    return result


def run_here(part: PartEntry, options: argparse.Namespace) -> int:
    """Run a part in this process, and write its results after each finding; return 0, or 1 if it fails."""
    result = PartResult(part.name, device_name(options.device))
    check = Check(
        options.device, options.artifacts, options.out / "files" / part.name, options.device == "cpu"
    )
    check.directory.mkdir(parents=True, exist_ok=True)
    try:
        for finding in part.load()(check):
            result.findings.append(finding)
            results.save(result, options.out)
            print(results.plain(finding), flush=True)
    except Exception:  # the page must say why a part failed
        traceback.print_exc()
        result.error = traceback.format_exc()[-_ERROR_CHARACTERS:]
        results.save(result, options.out)
        return 1
    return 0


def device_name(device: str) -> str:
    """Return the name of the device that figures belong to."""
    from benchmarks.report import describe_machine

    if device == "cpu":
        return f"a rehearsal on the CPU ({describe_machine()[0]})"
    import torch

    return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def _environment(device: str) -> dict[str, str]:
    """Return the environment of a part: on few cores, threads that wait for each other cost time."""
    one_thread = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return {**os.environ, **(one_thread if device == "cpu" else {})}


def _kill_group(process_group: int) -> None:
    try:
        os.killpg(process_group, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(main())
