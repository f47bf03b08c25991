"""python -m export verify: check that an artifact computes the recorded results."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_command

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Check the checksums of an artifact, and that its graphs are pure. Then replay its golden rows in every format:
as one batch, mixed with unrelated rows, and the first row alone.

Prints the largest difference and the tolerance of each check. The exit status is 1 if any check fails."""


def add(commands: "Commands") -> None:
    """Add the command `verify`."""
    parser = add_command(commands, "verify", "check the files and golden rows of an artifact", _DESCRIPTION)
    parser.add_argument("path", type=Path, help="artifact directory, for example models/digits-vae/1")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from export.artifacts.verify import format_report, verify

    report = verify(options.path)
    print(format_report(report))
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if report.failures else 0
