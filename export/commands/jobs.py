"""The training jobs for data that needs no download: names, families, datasets and training times.

Imports no torch.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.families import FAMILIES

# The models that `make serve` serves: fast to train, and of two kinds.
STARTERS = ("digits-vae", "digits-diffusion")

# Packages that a dataset needs and the exporter does not.
_PACKAGES = {"chorales": "music21"}

# Seconds on one core with the starter preset, everything included. Long jobs start first.
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
_DEFAULT_SECONDS = 90


@dataclass(frozen=True)
class Job:
    """An artifact to train, models/<name>/; `package` is what its dataset needs in addition."""

    name: str
    family: str
    dataset: str
    package: str = ""

    @property
    def seconds(self) -> int:
        """Approximate seconds on one core with the starter preset."""
        return _SECONDS.get(self.name, _DEFAULT_SECONDS)

    @property
    def missing_package(self) -> str:
        """The package that the dataset needs if it is not installed, else an empty string."""
        return self.package if self.package and importlib.util.find_spec(self.package) is None else ""

    def has_artifact(self, models: Path) -> bool:
        """Return whether a directory of artifacts has a version of this model."""
        directory = models / self.name
        return directory.is_dir() and any(entry.name.isdecimal() for entry in directory.iterdir())


def select_jobs(names: Sequence[str] = ()) -> list[Job]:
    """Return the jobs with these names, or all jobs if there are no names, the longest first.

    Raises:
        ValueError: If a name is unknown.
    """
    jobs = {
        f"{dataset}-{family}": Job(f"{dataset}-{family}", family, dataset, _PACKAGES.get(dataset, ""))
        for family, entry in FAMILIES.items()
        for dataset in entry.datasets
    }
    for name in names:
        if name not in jobs:
            raise ValueError(f"unknown artifact {name!r}; expected one of: {', '.join(jobs)}")
    return sorted((jobs[name] for name in names or jobs), key=lambda job: -job.seconds)
