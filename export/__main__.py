"""The command line: python -m export COMMAND."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from export.commands import export, list_families, report, train, train_all, verify

_EPILOG = """\
examples:
  python -m export list                       what there is
  python -m export starter                    the two models that make serve serves, in minutes
  python -m export all                        every model, several at a time; skips what is there
  python -m export train vae                  one model, on its usual data
  python -m export train diffusion --data-dir ~/mnist --preset full --device cuda
  python -m export write examples/galaxy.py   a model of one's own, from a Python file
  python -m export verify models/digits-vae/1 prove that an artifact computes what was recorded
  python -m export report                     pages that show every artifact, for a browser

Every command has --help. What is interrupted goes on when the same command is run again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    _prepare_environment()
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except KeyboardInterrupt:
        print(
            "\nStopped. No artifact was left half written; the same command goes on where training stopped.",
            file=sys.stderr,
        )
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _prepare_environment() -> None:
    # Waiting threads that spin make everything crawl when cores are shared. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        # A log keeps every state of a progress bar. Read when tqdm is loaded.
        os.environ.setdefault("TQDM_MININTERVAL", "30")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Train generative models and turn them into artifacts that the server runs.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (list_families, train, train_all, verify, report, export):
        module.add(commands)
    return parser


if __name__ == "__main__":
    # Being told to stop is handled like Ctrl-C, so that nothing half written stays behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
