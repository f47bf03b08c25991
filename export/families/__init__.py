"""Catalog of the model families. `FamilyEntry.load` imports a family on demand."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.families.base import Family


@dataclass(frozen=True)
class FamilyEntry:
    """Module of a family and its description in `python -m export list`.

    Attributes:
        module: module that defines `FAMILY`.
        summary: one line with the method and its papers.
        operations: names of the family's programs.
        datasets: datasets that the family is for, the default one first.
    """

    module: str
    summary: str
    operations: tuple[str, ...]
    datasets: tuple[str, ...] = ("digits",)

    def load(self) -> "Family":
        """Import the family's module and return its `FAMILY`."""
        family: Family = importlib.import_module(self.module).FAMILY
        return family


FAMILIES: Mapping[str, FamilyEntry] = {
    "vae": FamilyEntry(
        "export.families.vae",
        "variational autoencoder (Kingma & Welling 2013)",
        ("sample", "sample:inpaint", "reconstruct", "encode", "decode", "score"),
    ),
    "gan": FamilyEntry(
        "export.families.gan",
        "class-conditional GAN (Goodfellow et al. 2014, R3GAN by Huang et al. 2024)",
        ("sample", "decode"),
        ("digits", "moons"),
    ),
    "diffusion": FamilyEntry(
        "export.families.diffusion",
        "class-conditional diffusion model (EDM, Karras et al. 2022)",
        (
            *("sample", "sample:guided", "sample:edit", "sample:inpaint"),
            *("encode", "decode", "reconstruct", "score", "score:ode"),
        ),
        ("digits", "moons"),
    ),
    "pixelcnn": FamilyEntry(
        "export.families.pixelcnn",
        "class-conditional Gated PixelCNN (van den Oord et al. 2016)",
        ("sample", "score", "classify"),
    ),
    "mlp": FamilyEntry(
        "export.families.mlp",
        "multilayer perceptron classifier (Rumelhart et al. 1986)",
        ("classify", "encode"),
    ),
    "cnn": FamilyEntry(
        "export.families.cnn",
        "convolutional classifier (LeCun et al. 1998, He et al. 2015)",
        ("classify", "encode"),
    ),
    "realnvp": FamilyEntry(
        "export.families.realnvp",
        "normalizing flow of affine couplings (RealNVP, Dinh et al. 2017)",
        ("sample", "reconstruct", "encode", "decode", "score"),
        ("digits", "moons"),
    ),
    "lstm": FamilyEntry(
        "export.families.lstm",
        "LSTM for text and music, token by token (Hochreiter & Schmidhuber 1997)",
        ("sample", "score", "encode"),
        ("text", "chorales"),
    ),
    "ebm": FamilyEntry(
        "export.families.ebm",
        "energy-based model by noise contrast (Gutmann & Hyvärinen 2012)",
        ("sample", "sample:langevin", "energy", "score"),
        ("digits", "moons"),
    ),
}
