"""Figures of others, to read an artifact's own beside: which model, on what, from where, how comparable.

Keyed by the digest of a data set's training rows, so that figures never meet those of
other data. What cannot be compared is not here: no published FID, since ours is on
features of our own; nothing of CIFAR-10 beside its JPEG re-encoding; nothing of
binarised digits beside digits of 256 levels. "Here" are runs of our own on the same split,
once, with seed 0 on 2 CPU cores and not tuned. What was quoted without the source open says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from samovar.v1 import manifest_pb2


@dataclass(frozen=True)
class Baseline:
    """One figure of another model, of the kind that it is, with its standard error where that is known."""

    model: str
    value: float
    kind: str
    source: str
    remark: str = ""
    error: float | None = None


@dataclass(frozen=True)
class Table:
    """Anchors of a measure; it is that of an artifact's figures whose name begins so, with that unit."""

    name: str
    unit: str
    anchors: tuple[Baseline, ...]

    def suits(self, quality: manifest_pb2.Quality) -> bool:
        """Whether a figure may be read beside these."""
        return quality.name.startswith(self.name) and quality.unit == self.unit


def tables(provenance: manifest_pb2.Provenance) -> tuple[Table, ...]:
    """What there is for the data set that an artifact was made of."""
    return _TABLES.get(provenance.dataset_sha256, ())


_HERE = "measured here"
_MEMORY = "quoted from memory"

_DIGITS = (
    Table(
        "accuracy",
        "",
        (
            Baseline("perceptron 200-150, 44,660 parameters", 0.982, "measured", _HERE, error=0.006),
            Baseline("three convolutions, 90,506 parameters", 0.984, "measured", _HERE, error=0.006),
        ),
    ),
    Table(
        "negative log-likelihood",
        "bits/dim",
        (
            Baseline("uniform", 4.087, "exact", _HERE),
            Baseline("normal mixture, 10 components", 2.637, "upper bound", _HERE, "dequantised"),
            Baseline("each pixel by itself", 2.437, "exact", _HERE),
            Baseline("mixture of 10 products over pixels", 2.223, "exact", _HERE),
            Baseline("VAE, 17-way pixels, IW-500", 2.109, "upper bound", _HERE),
            Baseline("RealNVP, 12 couplings, 100 draws", 2.032, "upper bound", _HERE, "dequantised"),
            Baseline("Gated PixelCNN, 32 channels, 5 layers", 1.789, "exact", _HERE),
            Baseline("Gated PixelCNN, 48 channels, 6 layers", 1.761, "exact", _HERE),
        ),
    ),
)
_MOONS = (
    Table(
        "negative log-density",
        "nats",
        (
            Baseline("normal distribution", 2.726, "exact", _HERE),
            Baseline("RealNVP, 2 couplings, 20,000 steps", 1.710, "exact", _HERE, "as Foster (2023) has it"),
            Baseline("energy, persistent chains", 1.259, "estimate", _HERE, "Z by quadrature"),
            Baseline("flow matching, ODE solved by RK4", 1.155, "estimate", _HERE),
            Baseline("RealNVP, 12 couplings", 1.148, "exact", _HERE),
            Baseline("energy, noise contrast", 1.134, "estimate", _HERE, "Z by quadrature"),
            Baseline("the true distribution", 1.131, "exact", "quadrature", "no model is better on average"),
        ),
    ),
)
_SPLIT = "the same last tenth, but not cut into rows"
_SHAKESPEARE = (
    Table(
        "negative log-likelihood",
        "bits/char",
        (
            Baseline("uniform", 6.022, "exact", _HERE),
            Baseline("single characters", 4.829, "exact", _HERE),
            Baseline("bz2", 2.64, "exact", _HERE, _SPLIT),
            Baseline("nanoGPT, 3 minutes on a CPU", 2.712, "exact", "its README", _SPLIT),
            Baseline("4-gram, Witten and Bell", 2.559, "exact", _HERE, _SPLIT),
            Baseline("5-gram, Witten and Bell", 2.408, "exact", _HERE, _SPLIT),
            Baseline("nanoGPT, 3 minutes on an A100", 2.120, "exact", "its README", _SPLIT),
        ),
    ),
)
_MNIST = (
    Table(
        "accuracy",
        "",
        (
            Baseline(
                "two convolutions, under 100,000 parameters", 0.992, "measured", "README of Fashion-MNIST"
            ),
            Baseline("three convolutions with batch norm", 0.994, "measured", "README of Fashion-MNIST"),
        ),
    ),
    Table(
        "negative log-likelihood",
        "bits/dim",
        (
            Baseline("each pixel by itself", 1.689, "exact", _HERE),
            Baseline("bz2", 1.418, "exact", _HERE),
            Baseline("xz", 1.396, "exact", _HERE),
            Baseline("VAE of perceptrons", 1.39, "upper bound", f"Townsend et al. 2019, {_MEMORY}"),
            Baseline("RealNVP", 1.06, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantised"),
            Baseline("Glow", 1.05, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantised"),
            Baseline("FFJORD", 0.99, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantised"),
            Baseline("Residual Flow", 0.970, "upper bound", "Chen et al. 2019", "dequantised"),
            Baseline("linear transformer", 0.644, "exact", "Katharopoulos et al. 2020"),
            Baseline("transformer", 0.621, "exact", "Katharopoulos et al. 2020"),
        ),
    ),
)

_TABLES: Mapping[str, tuple[Table, ...]] = {
    "30f2df0aa5ab90b4dda56fc277ba2fc1e61610595a263a81572a484e6d7b296d": _DIGITS,
    "46422b6dcd15c75ab390cc096c6df7e821f84934fccbeeb6c026a1c0ecba1956": _MOONS,
    "4b1a821bd9b00c4b64988bb9aad159be2efbe511de81c9ee91744c03f8b68487": _SHAKESPEARE,
    "2c84a9b0f1d3ef5c65a3b54563504c43f3eb32a6f0b04c25e0cf2c4e326f887d": _MNIST,
}
