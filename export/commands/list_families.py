"""python -m export list: families, what they do, what they are for, and how long they take."""

import argparse
from typing import TYPE_CHECKING

from export.commands import jobs
from export.commands.options import command
from export.families import FAMILIES

if TYPE_CHECKING:
    from export.commands.options import Commands

_DATA = {
    "digits": "8x8 handwritten digits, 17 levels, 1797 images; comes with scikit-learn",
    "moons": "two half circles of points, 40,000 with noise; made by scikit-learn",
    "text": "the language reference inside Python's standard library, by characters",
    "chorales": "Bach's four-part chorales; comes with music21, which `make setup` installs",
}
_FOLDER = "a folder with train.parquet and test.parquet (image: struct<bytes, path>, label: int64)"


def add(commands: "Commands") -> None:
    """The command `list`."""
    parser = command(
        commands,
        "list",
        "what can be trained, on what",
        "Families with their programs, the data that each is for, and how long the starter preset takes.",
    )
    parser.set_defaults(command=_list)


def _list(options: argparse.Namespace) -> int:
    print("families, with minutes on one core for the starter preset")
    minutes = {(job.family, job.data): job.seconds / 60 for job in jobs.jobs()}
    for name, entry in FAMILIES.items():
        suits = ", ".join(f"{data} ({minutes[name, data]:.1f} min)" for data in entry.datasets)
        print(f"  {name:<10} {entry.summary}\n  {'':<10} {', '.join(entry.operations)}\n  {'':<10} {suits}")
    print("\ndata sets, for train FAMILY --data NAME")
    for name in dict.fromkeys(data for entry in FAMILIES.values() for data in entry.datasets):
        print(f"  {name:<10} {_DATA.get(name, '')}".rstrip())
    print(f"  --data-dir {_FOLDER}")
    return 0
