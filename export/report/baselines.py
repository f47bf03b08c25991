"""Published and locally measured figures of other models, for comparison with the figures of an artifact.

Tables are keyed by the SHA-256 of the training rows of a dataset, so figures of different data are never
compared. Figures that are not comparable are left out: published FIDs (the features here are our own),
figures of CIFAR-10 for its JPEG re-encoding, and figures of binarized digits for digits with 256 levels.

The source "measured here" is one run on the same split, with seed 0 on 2 CPU cores and without tuning. The
source "quoted from memory" was not checked against the publication.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from samovar.v1 import manifest_pb2


@dataclass(frozen=True)
class Baseline:
    """Figure of another model.

    Attributes:
        model: name of the model.
        value: value of the figure.
        kind: `exact`, `estimate`, `upper bound` or `measured`.
        source: where the figure comes from.
        note: remark on how it was measured.
        standard_error: standard error of the value, if it is known.
    """

    model: str
    value: float
    kind: str
    source: str
    note: str = ""
    standard_error: float | None = None


@dataclass(frozen=True)
class BaselineTable:
    """Baselines of one metric on one dataset.

    Attributes:
        name: start of the name of the quality figures that can be compared with the baselines.
        unit: unit of the values.
        baselines: in any order.
    """

    name: str
    unit: str
    baselines: tuple[Baseline, ...]

    def is_comparable(self, quality: manifest_pb2.Quality) -> bool:
        """Return whether a quality figure can be compared with the baselines."""
        return quality.name.startswith(self.name) and quality.unit == self.unit


def find_tables(provenance: manifest_pb2.Provenance) -> tuple[BaselineTable, ...]:
    """Return the tables for the dataset that an artifact was trained on; empty if there are none."""
    return _TABLES.get(provenance.dataset_sha256, ())


_HERE = "measured here"
_MEMORY = "quoted from memory"

_DIGITS = (
    BaselineTable(
        "accuracy",
        "",
        (
            Baseline("perceptron 200-150, 44,660 parameters", 0.982, "measured", _HERE, standard_error=0.006),
            Baseline("three convolutions, 90,506 parameters", 0.984, "measured", _HERE, standard_error=0.006),
        ),
    ),
    BaselineTable(
        "negative log-likelihood",
        "bits/dim",
        (
            Baseline("uniform", 4.087, "exact", _HERE),
            Baseline("normal mixture, 10 components", 2.637, "upper bound", _HERE, "dequantized"),
            Baseline("independent pixels", 2.437, "exact", _HERE),
            Baseline("mixture of 10 models of independent pixels", 2.223, "exact", _HERE),
            Baseline("VAE, 17-way pixels, IW-500", 2.109, "upper bound", _HERE),
            Baseline("RealNVP, 12 couplings, 100 draws", 2.032, "upper bound", _HERE, "dequantized"),
            Baseline("Gated PixelCNN, 32 channels, 5 layers", 1.789, "exact", _HERE),
            Baseline("Gated PixelCNN, 48 channels, 6 layers", 1.761, "exact", _HERE),
        ),
    ),
)
_MOONS = (
    BaselineTable(
        "negative log-density",
        "nats",
        (
            Baseline("normal distribution", 2.726, "exact", _HERE),
            Baseline("RealNVP, 2 couplings, 20,000 steps", 1.710, "exact", _HERE, "as in Foster (2023)"),
            Baseline("EBM, persistent chains", 1.259, "estimate", _HERE, "Z by quadrature"),
            Baseline("flow matching, ODE solved by RK4", 1.155, "estimate", _HERE),
            Baseline("RealNVP, 12 couplings", 1.148, "exact", _HERE),
            Baseline("EBM, noise-contrastive estimation", 1.134, "estimate", _HERE, "Z by quadrature"),
            Baseline("true distribution", 1.131, "exact", "quadrature", "no model is better on average"),
        ),
    ),
)
_SPLIT = "the same last tenth, but not cut into rows"
_SHAKESPEARE = (
    BaselineTable(
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
    BaselineTable(
        "accuracy",
        "",
        (
            Baseline(
                "two convolutions, under 100,000 parameters", 0.992, "measured", "README of Fashion-MNIST"
            ),
            Baseline("three convolutions with batch norm", 0.994, "measured", "README of Fashion-MNIST"),
        ),
    ),
    BaselineTable(
        "negative log-likelihood",
        "bits/dim",
        (
            Baseline("independent pixels", 1.689, "exact", _HERE),
            Baseline("bz2", 1.418, "exact", _HERE),
            Baseline("xz", 1.396, "exact", _HERE),
            Baseline("VAE of perceptrons", 1.39, "upper bound", f"Townsend et al. 2019, {_MEMORY}"),
            Baseline("RealNVP", 1.06, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantized"),
            Baseline("Glow", 1.05, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantized"),
            Baseline("FFJORD", 0.99, "upper bound", f"Grathwohl et al. 2019, {_MEMORY}", "dequantized"),
            Baseline("Residual Flow", 0.970, "upper bound", "Chen et al. 2019", "dequantized"),
            Baseline("linear transformer", 0.644, "exact", "Katharopoulos et al. 2020"),
            Baseline("transformer", 0.621, "exact", "Katharopoulos et al. 2020"),
        ),
    ),
)

_TABLES: Mapping[str, tuple[BaselineTable, ...]] = {
    "30f2df0aa5ab90b4dda56fc277ba2fc1e61610595a263a81572a484e6d7b296d": _DIGITS,
    "46422b6dcd15c75ab390cc096c6df7e821f84934fccbeeb6c026a1c0ecba1956": _MOONS,
    "4b1a821bd9b00c4b64988bb9aad159be2efbe511de81c9ee91744c03f8b68487": _SHAKESPEARE,
    "2c84a9b0f1d3ef5c65a3b54563504c43f3eb32a6f0b04c25e0cf2c4e326f887d": _MNIST,
}
