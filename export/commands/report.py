"""python -m export report: what every artifact makes and how good it is, as pages for a browser."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_models, command

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Write a page of HTML for each artifact, and an index of them: samples, reconstructions, ways between latents,
densities and calibration, computed by the artifact's own graphs; the training curve; every figure of quality
beside those of others on the same data; every program with its parameters and the lines that ask for it.

A page holds all that it shows, so that it can be sent to somebody; nothing in it asks for a network. Test
rows are shown where the data set is at hand: what needs no download always is, a folder where --data-dir
names it."""


def add(commands: "Commands") -> None:
    """The command `report`."""
    parser = command(commands, "report", "pages that show every artifact", _DESCRIPTION)
    add_models(parser)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to show; all when left out")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report"), metavar="DIR", help="where to (%(default)s)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="a data folder that models were trained on; may be given more than once",
    )
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    from export.datasets import loading
    from export.report import pages

    library = pages.DatasetIndex([loading.load_folder(directory) for directory in options.data_dir])
    directories = pages.artifacts(options.models, options.names)
    written = pages.write(directories, options.output, library, options.models)
    print(f"Wrote {len(written)} page(s); open {options.output / pages.INDEX}")
    return 0
