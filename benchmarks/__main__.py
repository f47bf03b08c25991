"""python -m benchmarks: measure, print tables, and write docs/benchmarks.md with CSV files and plots."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EPILOG = """\
benchmarks:
  scheduling   step batching compared with request batching and none, with Poisson arrivals
  efficiency   row steps per second of a server, compared with a loop over the same graphs
  calls        one-row calls, compared with a no-op gRPC server and with a batched forward pass
  scale        memory and time by the number of queued rows and of loaded models
  determinism  bytes of rows in random traffic, compared with the same rows alone

On a GPU see also: python -m benchmarks.gpu --help

examples:
  python -m benchmarks --quick
  python -m benchmarks calls efficiency
  python -m benchmarks --docs docs     # all benchmarks, and the page
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure Samovar. Servers and clients run in processes of their own.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help="benchmarks to run (default: all)")
    parser.add_argument("--quick", action="store_true", help="rough figures of a part, in about a minute")
    parser.add_argument(
        "--docs", type=Path, metavar="DIR", help="write benchmarks.md, CSV files and plots to this directory"
    )
    parser.add_argument(
        "--artifacts",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="directory of the artifacts to serve; missing ones are made (default: %(default)s)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run the benchmarks; return 0, or 2 for an unknown name."""
    options = parse()
    # On few cores, threads that spin while they wait for each other cost more than they gain.
    os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"})
    from benchmarks import load, report, servers, suites

    try:
        names = suites.select(options.names, suites.NAMES)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = [*report.describe_machine(), f"device of servers and loops: `{servers.device()}`"]
    sections = []
    with load.start_clients() as clients:
        bench = suites.Bench(options.artifacts, clients, options.quick)
        for name in names:
            start = time.monotonic()
            print(f"{name} ...", file=sys.stderr, flush=True)
            section = suites.load(name)(bench)
            sections.append(section)
            print(report.plain_section(section), flush=True)
            print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if options.docs:
        report.write(sections, environment, options.docs)
        print(f"wrote {options.docs / report.PAGE}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
