"""The families, by name: the table of contents. A family is imported when it is asked for."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.families.base import Family


@dataclass(frozen=True)
class Entry:
    """A family's module, and what `python -m export list` says of it."""

    module: str
    summary: str
    operations: tuple[str, ...]

    def load(self) -> "Family":
        """Import the family."""
        family: Family = importlib.import_module(self.module).FAMILY
        return family


FAMILIES: Mapping[str, Entry] = {
    "vae": Entry(
        "export.families.vae",
        "variational autoencoder (Kingma & Welling 2013)",
        ("sample", "reconstruct", "encode", "decode", "score"),
    ),
    "diffusion": Entry(
        "export.families.diffusion",
        "class-conditional diffusion model (EDM, Karras et al. 2022)",
        ("sample",),
    ),
}
