"""Options that several commands share."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from export.graphs import formats

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

PRESETS = ("starter", "medium", "full", "tiny")


def add_command(
    commands: "Commands", name: str, help: str, description: str, old_name: str | None = None
) -> argparse.ArgumentParser:
    """Add a command.

    Args:
        commands: The parser action that collects the commands.
        name: The name of the command.
        help: One line for the list of commands.
        description: Text for the command's --help; its line breaks are kept.
        old_name: A former name that still works, but is not shown.
    """
    parser = commands.add_parser(
        name, help=help, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if old_name:
        # An argparse alias would be shown in --help.
        commands._name_parser_map[old_name] = parser
    return parser


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add --models."""
    parser.add_argument(
        "--models",
        type=Path,
        default=Path("models"),
        metavar="DIR",
        help="directory of all artifacts (default: %(default)s)",
    )


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add --format."""
    parser.add_argument(
        "--format",
        choices=formats.CHOICES,
        default="both",
        help=f"graph file format; both = {' and '.join(formats.DEFAULT_FORMATS)} (default: %(default)s)",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that train."""
    add_models(parser)
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="starter",
        help="network size and training time: starter = minutes on a CPU; medium = half an hour on a CPU, "
        "for larger data; full = for a GPU; tiny = seconds, to try the pipeline (default: %(default)s)",
    )
    add_format(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="random seed of initialization and training, recorded in the manifest (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cpu", help="torch device for training, for example cuda (default: %(default)s)"
    )
    parser.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="discard the checkpoint of an interrupted run and start over",
    )
    parser.add_argument("--fresh", dest="resume", action="store_false", help=argparse.SUPPRESS)


def positive_integer(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number
