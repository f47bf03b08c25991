"""python -m export report: HTML pages that show each artifact and its quality."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_command, add_models

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Write an HTML page for each artifact, and an index. A page shows, computed by the artifact's own graphs:
samples, reconstructions, interpolations, densities and calibration. It also shows the training curve, the
quality figures next to published baselines on the same data, and example calls of each program.

A page is one file that needs no network. Test rows are shown if the dataset is available: the built-in
datasets without download always are, a folder if --data-dir names it."""


def add(commands: "Commands") -> None:
    """Add the command `report`."""
    parser = add_command(commands, "report", "write HTML pages that show the artifacts", _DESCRIPTION)
    add_models(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to show (default: all)")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("report"),
        metavar="DIR",
        help="output directory (default: %(default)s)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a data folder that models were trained on; can be repeated",
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from export.datasets import loading
    from export.report import pages

    datasets = pages.DatasetIndex([loading.load_folder(directory) for directory in options.data_dir])
    directories = pages.artifacts(options.models, options.names)
    written = pages.write(directories, options.output, datasets, options.models)
    print(f"Wrote {len(written)} page(s); open {options.output / pages.INDEX}")
    return 0
