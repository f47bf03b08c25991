"""python -m export verify: prove that an artifact computes what was recorded."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import command

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Check the digests of an artifact's files, then replay its golden rows in every format: alone, among strangers,
and one by one. Prints the largest difference of each check beside what is allowed; exit status 1 when one is
larger."""


def add(commands: "Commands") -> None:
    """The command `verify`."""
    parser = command(commands, "verify", "check an artifact's files and golden rows", _DESCRIPTION)
    parser.add_argument("path", type=Path, help="such as models/digits-vae/1")
    parser.set_defaults(command=_verify)


def _verify(options: argparse.Namespace) -> int:
    from export.artifacts.verify import format_report, verify

    report = verify(options.path)
    print(format_report(report))
    for failure in report.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if report.failures else 0
