"""What several commands take."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from export.graphs import formats

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PRESETS = ("starter", "medium", "full", "tiny")


def command(commands: "Commands", name: str, help: str, description: str) -> argparse.ArgumentParser:
    """A new command; the description's paragraphs are kept as they are."""
    return commands.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    """Where the artifacts are."""
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="the directory of artifacts (%(default)s)"
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Which graph files an artifact carries."""
    parser.add_argument(
        "--format",
        choices=formats.CHOICES,
        default="both",
        help=f"graph files; both: {' and '.join(formats.DEFAULT_FORMATS)} (%(default)s)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """What every training takes, of one model or of many."""
    add_models(parser)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="starter",
        help="size and patience: starter for minutes on a CPU, medium for larger data and half an hour on "
        "a CPU, full for a GPU, tiny to see everything work once (%(default)s)",
    )
    add_format(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of initialisation and training; the manifest records it (%(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda (%(default)s)")
    parser.add_argument(
        "--fresh", action="store_true", help="start over where an interrupted run would go on"
    )


def positive(text: str) -> int:
    """A positive integer; argparse says what it got instead."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number above 0; argparse says what it got instead."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number
