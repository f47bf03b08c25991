"""python -m benchmarks: measure, print, and write docs/benchmarks.md."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.report import Section

EPILOG = """\
benchmarks:
  scheduling   step batching beside request batching and none, under Poisson arrivals
  efficiency   rows x steps per second, served, over a bare loop on the same graphs
  calls        one-shot calls beside a gRPC server that does nothing, and a raw batched forward
  scale        memory and time against rows that wait and models that are loaded
  determinism  rows from random traffic against the same rows alone, byte by byte
  device       on a GPU: step time against batch size, CUDA graphs, transfers

examples:
  python -m benchmarks --quick
  python -m benchmarks calls efficiency
  python -m benchmarks --docs docs     # all of them, and the page
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; exits with 2 when it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Samovar with real servers and callers in processes of their own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help="which ones; all when left out")
    parser.add_argument(
        "--quick", action="store_true", help="rough figures of a part of it, in about a minute"
    )
    parser.add_argument("--docs", type=Path, help="write benchmarks.md and its plots into this directory")
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("build/bench"),
        help="where models are kept (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run what was asked for: 0, or 2 when there is no such benchmark."""
    options = parse()
    # Threads that spin while they wait for each other cost more than they gain on few cores.
    os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    from benchmarks import load, report, servers, suites

    try:
        names = suites.chosen(options.names, suites.NAMES)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    facts, sections = [*report.machine(), f"servers and bare loops on the device `{servers.device()}`"], []
    with load.callers() as callers:
        bench = suites.Bench(options.artifacts, callers, options.quick)
        for name in names:
            start = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)
            section = suites.load(name)(bench)
            sections.append(section)
            _print(section)
            print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if options.docs:
        _write(options.docs, sections, facts)
    return 0


def _print(section: "Section") -> None:
    from benchmarks import report

    print(f"\n== {section.title} ==\n\n{section.text}\n")
    print("\n\n".join(map(report.plain, section.tables)), flush=True)


def _write(directory: Path, sections: Sequence["Section"], facts: Sequence[str]) -> None:
    from benchmarks import report

    for section in sections:
        for plot in section.plots:
            report.draw(plot, directory / "benchmarks")
    (directory / "benchmarks.md").write_text(report.page(sections, facts))
    print(f"wrote {directory / 'benchmarks.md'}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
