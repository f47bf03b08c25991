"""Figures of quality on held-out rows, with what to read them beside.

Samples are compared with test rows in these ways, each next to the same comparison
between training rows and test rows (the floor):

- the Frechet distance of Heusel et al. (2017), on features of a small classifier
  of our own, hence `FD(our-cnn)`: not comparable with any published FID;
- the classifier two-sample test of Lopez-Paz & Oquab (2017), with 5 nearest
  neighbours, left one out: 0.5 when nothing tells samples from data. It is blind
  where all neighbours are of one set, so both its halves are reported;
- the coverage of Naeem et al. (2020), on the same features: the share of test rows
  that have a sample nearer than their 5th neighbour among test rows.

Knows arrays and no family.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from export.artifacts.interpreter import Interpreter, Rows, Tensors, make_rows
from export.datasets.loading import Dataset, Split
from export.evaluation.figures import cells
from export.training.trainer import Network, Settings, fit
from samovar.v1 import manifest_pb2

FEATURES = 16
NEIGHBOURS = 5
SETS = 4
_CHUNK_ROWS = 50
CLASSIFIER = "our-cnn"

Samples = NDArray[Any]


def play(interpreter: Interpreter, name: str, rows: Rows, title: str) -> Tensors:
    """Run many rows in chunks under a progress bar; returns the outputs by name."""
    bounds = range(0, len(rows), _CHUNK_ROWS)
    chunks = [
        interpreter.run(name, rows[start : start + _CHUNK_ROWS])
        for start in tqdm(bounds, desc=f"  measuring: {title}", unit="chunk", dynamic_ncols=True)
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def sampler(interpreter: Interpreter) -> Callable[[int, int], Samples]:
    """The model's own samples: `draw(n, i)` gives the i-th set of n, [n, *shape]."""
    program, name = interpreter.program("sample"), interpreter.manifest.data_spec.tensor.name

    def draw(count: int, number: int) -> Samples:
        rows = make_rows(program, number, range(count))
        return play(interpreter, "sample", rows, f"samples {number + 1}/{SETS}")[name]

    return draw


def density(interpreter: Interpreter, name: str, limit: float, count: int) -> NDArray[np.float32]:
    """The density of points in the cells of a square, [count, count], by the program `score`, say."""
    points = cells(limit, count)
    given = {interpreter.manifest.data_spec.tensor.name: points}
    rows = make_rows(interpreter.program(name), 0, range(len(points)), inputs=given)
    nats = interpreter.run(name, rows)[interpreter.program(name).score.nats_output]
    return np.asarray(np.exp(nats).reshape(count, count), np.float32)


def mean(name: str, values: NDArray[Any], unit: str, doc: str) -> manifest_pb2.Quality:
    """The mean of independent numbers with its standard error."""
    return manifest_pb2.Quality(
        name=name, value=float(values.mean()), unit=unit, standard_error=standard_error(values), doc=doc
    )


def standard_error(values: NDArray[Any]) -> float:
    """Of the mean of independent numbers [N]."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def mean_bits(nats: NDArray[Any], dimensions: int, detail: str, doc: str) -> manifest_pb2.Quality:
    """The mean of log-masses of test rows in bits per dimension, with its sign changed."""
    name = ", ".join(filter(None, ("negative log-likelihood", detail)))
    return mean(name, -nats / (dimensions * math.log(2)), "bits/dim", doc)


def bits_per_dimension(nats: NDArray[Any], dimensions: int, draws: int) -> manifest_pb2.Quality:
    """The mean of importance-weighted bounds over test rows."""
    doc = f"Upper bound, {len(nats)} test rows of integers (no offset), {draws} importance draws each."
    return mean_bits(nats, dimensions, f"IW-{draws}", doc)


def exact_bits_per_dimension(nats: NDArray[Any], dimensions: int) -> manifest_pb2.Quality:
    """The mean of exact log-masses over test rows."""
    return mean_bits(nats, dimensions, "", f"Exact, {len(nats)} test rows of integers (no offset).")


def accuracy(hits: NDArray[np.bool_]) -> manifest_pb2.Quality:
    """How often the likeliest class of test rows is theirs."""
    doc = f"How often the likeliest class is the right one, over {len(hits)} test rows."
    return mean("accuracy", hits.astype(np.float64), "", doc)


def negative_log_density(nats: NDArray[Any], doc: str) -> manifest_pb2.Quality:
    """The mean of exact log-densities over test rows, with its sign changed."""
    return mean("negative log-density", -nats, "nats", f"Mean over {len(nats)} test rows. {doc}".strip())


def two_sample_test(data: Dataset, draw: Callable[[int, int], Samples], count: int) -> manifest_pb2.Quality:
    """C2ST of `count` samples, `draw(n, i)` giving the i-th set of n, for data of any kind."""
    test = data.test.rows[:count]
    sets = [draw(len(test), number) for number in range(SETS)]
    return _told(sets, [data.train.rows[chosen] for chosen in _subsets(len(data.train), len(test))], test)


@dataclass(frozen=True)
class SampleEvaluator:
    """Compares rows with the test rows of a data set, by a classifier that it trains first."""

    data: Dataset
    classifier: "Classifier"

    @classmethod
    def train(cls, data: Dataset, settings: Settings) -> "SampleEvaluator":
        """A judge with a classifier that has learned every other training row; the rest are for the floor."""
        torch.manual_seed(settings.seed)
        classifier = Classifier(data.spec.tensor.shape, data.spec.num_levels, len(data.spec.class_labels))
        half = dataclasses.replace(data, train=data.train[0::2])
        fit(classifier, half, settings, "  measuring: classifier")
        return cls(data, classifier)

    def similarity(self, draw: Callable[[int, int], Samples], count: int) -> list[manifest_pb2.Quality]:
        """Both comparisons; `draw(n, i)` gives the i-th set of n samples, uint8 [n, *shape]."""
        test = self.data.test.rows[:count]
        sets = [draw(len(test), number) for number in range(SETS)]
        unseen = self.data.train.rows[1::2]
        floor = [unseen[chosen] for chosen in _subsets(len(unseen), len(test))]
        return [
            _quality(
                f"FD({CLASSIFIER})",
                "",
                [self.distance(rows, test) for rows in sets],
                [self.distance(rows, test) for rows in floor],
                f"Frechet distance between {len(test)} samples and as many test rows on {FEATURES} features "
                "of our own classifier; not an FID. The floor: training rows that it never saw as samples.",
            ),
            _told(sets, floor, test),
        ]

    def distance(self, rows: Samples, others: Samples) -> float:
        """FD(our-cnn) between two sets of rows."""
        return frechet_distance(self.classifier.embed(rows), self.classifier.embed(others))

    def coverage(self, draw: Callable[[int, int], Samples], count: int) -> manifest_pb2.Quality:
        """How much of the test rows' variety samples have; `draw(n, i)` gives the i-th set of n."""
        test = self.classifier.embed(self.data.test.rows[:count])
        unseen = self.data.train.rows[1::2]
        sets = [draw(len(test), number) for number in range(SETS)]
        floor = [unseen[chosen] for chosen in _subsets(len(unseen), len(test))]
        return _quality(
            f"coverage({CLASSIFIER})",
            "",
            [coverage(self.classifier.embed(rows), test) for rows in sets],
            [coverage(self.classifier.embed(rows), test) for rows in floor],
            f"Share of {len(test)} test rows with one of as many samples nearer than their "
            f"{NEIGHBOURS}th neighbour, on {FEATURES} features of our own classifier; dropped modes lower "
            "it. In the floor, training rows that it never saw are the samples.",
        )

    def agreement(self, rows: Samples, labels: NDArray[np.int64]) -> manifest_pb2.Quality:
        """How often the classifier sees the label that was asked for; the floor is its test accuracy."""
        hits, known = self._hits(Split(rows, labels)), self._hits(self.data.test)
        return manifest_pb2.Quality(
            name="label agreement",
            value=float(hits.mean()),
            unit="accuracy",
            standard_error=standard_error(hits),
            reference_value=float(known.mean()),
            doc=f"How often our classifier sees the label that was asked for, over {len(hits)} samples. "
            "The floor is its accuracy on test rows.",
        )

    def _hits(self, part: Split) -> NDArray[np.float64]:
        with torch.no_grad():
            logits = self.classifier.logits(torch.tensor(part.rows))
        return np.asarray(logits.argmax(1).numpy() == part.labels, np.float64)


class Classifier(Network):
    """A small convolutional network (LeCun et al. 1998); its features are the layer before the logits."""

    def __init__(self, shape: tuple[int, ...], levels: int, classes: int) -> None:
        super().__init__()
        self.top = levels - 1
        channels = 1 if len(shape) == 2 else shape[2]
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Dropout(0.2),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(256, FEATURES), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def hidden(self, rows: Tensor) -> Tensor:
        """Features [B, FEATURES] of uint8 rows [B, *shape]."""
        scaled = rows.to(torch.float32) * (2 / self.top) - 1
        features: Tensor = self.features(
            scaled.unsqueeze(1) if scaled.dim() == 3 else scaled.permute(0, 3, 1, 2)
        )
        return features

    def logits(self, rows: Tensor) -> Tensor:
        """Class logits [B, classes] of uint8 rows [B, *shape]."""
        logits: Tensor = self.head(self.hidden(rows))
        return logits

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of each row [B], in nats."""
        return functional.cross_entropy(self.logits(rows), labels, reduction="none", label_smoothing=0.05)

    def embed(self, rows: Samples) -> NDArray[np.float64]:
        """Features of an array of rows."""
        with torch.no_grad():
            return self.hidden(torch.tensor(rows)).double().numpy()


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Between the normal distributions fitted to two sets of features [N, F]."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # The trace of the root of a product, from the eigenvalues of a similar symmetric matrix.
    root = _root(covariance_a)
    cross = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a + covariance_b) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + trace)


def coverage(made: NDArray[np.float64], real: NDArray[np.float64]) -> float:
    """Share of the real features [N, F] with a made one [M, F] within the distance of their 5th neighbour.

    For two samples of one distribution it is 1 - prod_{i=1..5} (N - i) / (M + N - i): 0.969 when M = N.
    """
    from sklearn.neighbors import NearestNeighbors

    radii = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(real).kneighbors()[0][:, -1]
    nearest = NearestNeighbors(n_neighbors=1).fit(made).kneighbors(real)[0][:, 0]
    return float((nearest <= radii).mean())


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def two_sample_accuracy(a: Samples, b: Samples) -> tuple[float, float]:
    """Share of the rows of each set whose nearest neighbours, left one out, are mostly of their own set."""
    from sklearn.neighbors import NearestNeighbors

    rows = np.concatenate([a, b]).reshape(len(a) + len(b), -1).astype(np.float64)
    own = np.repeat([True, False], [len(a), len(b)])
    neighbours = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(rows).kneighbors(return_distance=False)
    hits = (own[neighbours].mean(1) > 0.5) == own
    return float(hits[own].mean()), float(hits[~own].mean())


def _told(sets: Sequence[Samples], floor: Sequence[Samples], test: Samples) -> manifest_pb2.Quality:
    told, told_floor = (
        np.array([two_sample_accuracy(rows, test) for rows in given]) for given in (sets, floor)
    )
    on_samples, on_test = told.mean(0)
    return _quality(
        "C2ST",
        "accuracy",
        told.mean(1),
        told_floor.mean(1),
        f"How often {NEIGHBOURS} nearest neighbours tell {len(test)} samples from as many test rows, "
        f"the mean of {on_samples:.3f} on samples and {on_test:.3f} on test rows; only with "
        "both near 0.5 are they alike. In the floor, training rows are the samples.",
    )


def _subsets(total: int, size: int) -> list[NDArray[np.intp]]:
    generator = np.random.default_rng(0)
    return [generator.choice(total, min(size, total), replace=False) for _ in range(SETS)]


def _quality(
    name: str,
    unit: str,
    values: Sequence[float] | NDArray[np.float64],
    floor: Sequence[float] | NDArray[np.float64],
    doc: str,
) -> manifest_pb2.Quality:
    return manifest_pb2.Quality(
        name=name,
        value=float(np.mean(values)),
        unit=unit,
        standard_error=standard_error(np.asarray(values)),
        reference_value=float(np.mean(floor)),
        doc=f"{doc} Mean of {len(values)} sets.",
    )
