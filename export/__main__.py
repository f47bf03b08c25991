"""The command line of the exporter: python -m export COMMAND."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from export.commands import export, list_families, report, train, train_all, train_starters, verify

_EPILOG = """\
examples:
  python -m export list                        families, datasets and training times
  python -m export train-starters              the two models that `make serve` serves, in minutes
  python -m export all                         all models, in parallel; existing ones are skipped
  python -m export train vae                   one model, on the default dataset of its family
  python -m export train diffusion --data-dir ~/mnist --preset full --device cuda
  python -m export export examples/galaxy.py   a custom model, from a Python file
  python -m export verify models/digits-vae/1  check that an artifact computes the recorded results
  python -m export report                      HTML pages that show the artifacts

COMMAND --help describes a command. Repeat an interrupted command to resume it.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    _set_environment()
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. No incomplete artifact was left; repeat the command to resume training.",
            file=sys.stderr,
        )
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _set_environment() -> None:
    # OpenMP threads that spin while they wait slow everything down when cores are shared. torch reads this
    # when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # A log file keeps each state of a progress bar, so print fewer. tqdm reads this when it is imported.
        os.environ.setdefault("TQDM_MININTERVAL", "30")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Train generative models and export them as artifacts for the server.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for module in (list_families, train, train_all, train_starters, export, verify, report):
        module.add(commands)
    return parser


if __name__ == "__main__":
    # SIGTERM is handled like Ctrl-C, so that no incomplete files stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
