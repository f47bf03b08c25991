"""The families, by name: the table of contents. A family is imported when it is asked for."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.families.base import Family


@dataclass(frozen=True)
class Entry:
    """A family's module, and what `python -m export list` says of it.

    `operations` names its programs; `data` the data sets that it is for, its usual one first.
    """

    module: str
    summary: str
    operations: tuple[str, ...]
    data: tuple[str, ...] = ("digits",)

    def load(self) -> "Family":
        """Import the family."""
        family: Family = importlib.import_module(self.module).FAMILY
        return family


FAMILIES: Mapping[str, Entry] = {
    "vae": Entry(
        "export.families.vae",
        "variational autoencoder (Kingma & Welling 2013)",
        ("sample", "sample:inpaint", "reconstruct", "encode", "decode", "score"),
    ),
    "gan": Entry(
        "export.families.gan",
        "class-conditional GAN (Goodfellow et al. 2014, R3GAN by Huang et al. 2024)",
        ("sample", "decode"),
        ("digits", "moons"),
    ),
    "diffusion": Entry(
        "export.families.diffusion",
        "class-conditional diffusion model (EDM, Karras et al. 2022)",
        (
            *("sample", "sample:guided", "sample:edit", "sample:inpaint"),
            *("encode", "decode", "reconstruct", "score", "score:ode"),
        ),
        ("digits", "moons"),
    ),
    "pixelcnn": Entry(
        "export.families.pixelcnn",
        "class-conditional Gated PixelCNN (van den Oord et al. 2016)",
        ("sample", "score", "classify"),
    ),
    "mlp": Entry(
        "export.families.mlp",
        "multilayer perceptron classifier (Rumelhart et al. 1986)",
        ("classify", "encode"),
    ),
    "cnn": Entry(
        "export.families.cnn",
        "convolutional classifier (LeCun et al. 1998, He et al. 2015)",
        ("classify", "encode"),
    ),
    "realnvp": Entry(
        "export.families.realnvp",
        "normalising flow of affine couplings (RealNVP, Dinh et al. 2017)",
        ("sample", "reconstruct", "encode", "decode", "score"),
        ("digits", "moons"),
    ),
    "lstm": Entry(
        "export.families.lstm",
        "LSTM for text and music, token by token (Hochreiter & Schmidhuber 1997)",
        ("sample", "score", "encode"),
        ("text", "chorales"),
    ),
    "ebm": Entry(
        "export.families.ebm",
        "energy-based model by noise contrast (Gutmann & Hyvärinen 2012)",
        ("sample", "sample:langevin", "energy", "score"),
        ("digits", "moons"),
    ),
}
