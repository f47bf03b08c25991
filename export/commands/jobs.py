"""The artifacts that are made of data which needs no download: one table of names, families and data sets.

Knows what is missing, what each takes, and in which order several at a time are done first. Light: no torch.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.families import FAMILIES

# What `make serve` serves: the quick ones, of two kinds.
STARTERS = ("digits-vae", "digits-diffusion")

# What a data set needs beside the exporter's own dependencies.
_NEEDS = {"chorales": "music21"}

# Seconds on one core with the starter preset, everything included: to start with the longest.
_SECONDS = {
    "digits-ebm": 170,
    "digits-diffusion": 135,
    "digits-pixelcnn": 135,
    "moons-ebm": 120,
    "chorales-lstm": 115,
    "digits-gan": 105,
    "moons-diffusion": 100,
    "moons-realnvp": 95,
    "text-lstm": 90,
    "digits-vae": 75,
    "digits-realnvp": 75,
    "moons-gan": 65,
    "digits-cnn": 35,
    "digits-mlp": 20,
}
_USUAL_SECONDS = 90


@dataclass(frozen=True)
class Job:
    """An artifact to make: models/<name>/, of a family trained on a data set, which may need a package."""

    name: str
    family: str
    data: str
    needs: str = ""

    @property
    def seconds(self) -> int:
        """About how long it takes on one core with the starter preset."""
        return _SECONDS.get(self.name, _USUAL_SECONDS)

    @property
    def lack(self) -> str:
        """The package without which its data cannot be had, when it is not installed; else nothing."""
        return self.needs if self.needs and importlib.util.find_spec(self.needs) is None else ""

    def is_made(self, models: Path) -> bool:
        """Whether a directory of artifacts has a version of it."""
        directory = models / self.name
        return directory.is_dir() and any(entry.name.isdecimal() for entry in directory.iterdir())


def jobs(names: Sequence[str] = ()) -> list[Job]:
    """The jobs of these names, or all, the longest first; ValueError for a name that is none."""
    known = {
        f"{data}-{family}": Job(f"{data}-{family}", family, data, _NEEDS.get(data, ""))
        for family, entry in FAMILIES.items()
        for data in entry.datasets
    }
    for name in names:
        if name not in known:
            raise ValueError(f"expected names of {', '.join(known)}; got {name!r}")
    return sorted((known[name] for name in names or known), key=lambda job: -job.seconds)
