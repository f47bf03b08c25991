"""Metrics of models and samples on held-out rows.

Three metrics compare samples with test rows. Their reference value is the same metric with training rows in
place of the samples.

- FD(our-cnn): Frechet distance (Heusel et al. 2017) on the features of a small classifier that is trained
  here. It is not comparable with any published FID.
- C2ST: accuracy of a classifier two-sample test (Lopez-Paz & Oquab 2017), leave-one-out 5 nearest neighbors.
  It is 0.5 for samples of the same distribution. The mean of both sets hides the case that all neighbors come
  from one set, so the accuracy on each set is reported too.
- coverage(our-cnn): fraction of test rows with a sample nearer than their 5th nearest test row (Naeem et al.
  2020), on the same features.
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
from export.evaluation.figures import cell_centers
from export.training.trainer import Network, Settings, fit
from samovar.v1 import manifest_pb2

NUM_FEATURES = 16
NUM_NEIGHBORS = 5
# Every comparison is the mean of this many sets of samples.
NUM_SETS = 4
CLASSIFIER_NAME = "our-cnn"
_CHUNK_ROWS = 50

Samples = NDArray[Any]
# Returns samples [count, *shape] from a count and the index of the set.
DrawSamples = Callable[[int, int], Samples]


def run_in_chunks(interpreter: Interpreter, name: str, rows: Rows, title: str) -> Tensors:
    """Run a program for many rows, in chunks and with a progress bar; return the outputs by name."""
    starts = range(0, len(rows), _CHUNK_ROWS)
    chunks = [
        interpreter.run(name, rows[start : start + _CHUNK_ROWS])
        for start in tqdm(starts, desc=f"  measuring: {title}", unit="chunk", dynamic_ncols=True)
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def make_sampler(interpreter: Interpreter) -> DrawSamples:
    """Return a function that draws sets of samples from the model.

    The set with index `i` is drawn with seed `i`.
    """
    program, name = interpreter.program("sample"), interpreter.manifest.data_spec.tensor.name

    def draw(count: int, index: int) -> Samples:
        rows = make_rows(program, index, range(count))
        return run_in_chunks(interpreter, "sample", rows, f"samples {index + 1}/{NUM_SETS}")[name]

    return draw


def density_grid(interpreter: Interpreter, name: str, limit: float, count: int) -> NDArray[np.float32]:
    """Return the density at the cell centers of the square [-limit, limit]^2.

    Args:
        interpreter: a model of points in the plane.
        name: a program that scores points, for example `score`.
        limit: half the side of the square.
        count: cells on each side.

    Returns:
        float32 [count, count]; the first index is the x axis.
    """
    points = cell_centers(limit, count)
    inputs = {interpreter.manifest.data_spec.tensor.name: points}
    rows = make_rows(interpreter.program(name), 0, range(len(points)), inputs=inputs)
    nats = interpreter.run(name, rows)[interpreter.program(name).score.nats_output]
    return np.asarray(np.exp(nats).reshape(count, count), np.float32)


def mean_quality(name: str, values: NDArray[Any], unit: str, doc: str) -> manifest_pb2.Quality:
    """Return the mean of independent values [N] and its standard error as a quality figure."""
    return manifest_pb2.Quality(
        name=name, value=float(values.mean()), unit=unit, standard_error=standard_error(values), doc=doc
    )


def standard_error(values: NDArray[Any]) -> float:
    """Return the standard error of the mean of independent values [N]."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def mean_bits_per_dimension(
    nats: NDArray[Any], dimensions: int, detail: str, doc: str
) -> manifest_pb2.Quality:
    """Return the mean negative log-likelihood in bits per dimension.

    Args:
        nats: log-likelihoods of test rows [N], in nats.
        dimensions: dimensions of a row.
        detail: method of the estimate, added to the name of the figure.
        doc: sentence that describes the figure.
    """
    name = ", ".join(filter(None, ("negative log-likelihood", detail)))
    return mean_quality(name, -nats / (dimensions * math.log(2)), "bits/dim", doc)


def bits_per_dimension(nats: NDArray[Any], dimensions: int, num_draws: int) -> manifest_pb2.Quality:
    """Return the mean importance-weighted bound [N], in nats, as bits per dimension."""
    doc = f"Upper bound, {len(nats)} test rows of integers (no offset), {num_draws} importance draws each."
    return mean_bits_per_dimension(nats, dimensions, f"IW-{num_draws}", doc)


def exact_bits_per_dimension(nats: NDArray[Any], dimensions: int) -> manifest_pb2.Quality:
    """Return the mean exact log-likelihood [N], in nats, as bits per dimension."""
    doc = f"Exact, {len(nats)} test rows of integers (no offset)."
    return mean_bits_per_dimension(nats, dimensions, "", doc)


def accuracy(is_correct: NDArray[np.bool_]) -> manifest_pb2.Quality:
    """Return the classification accuracy; `is_correct` [N] says whether each predicted label is right."""
    doc = f"Fraction of {len(is_correct)} test rows whose most probable class is the right one."
    return mean_quality("accuracy", is_correct.astype(np.float64), "", doc)


def negative_log_density(nats: NDArray[Any], doc: str) -> manifest_pb2.Quality:
    """Return the mean negative log-density of test rows from exact log-densities [N] in nats."""
    return mean_quality(
        "negative log-density", -nats, "nats", f"Mean over {len(nats)} test rows. {doc}".strip()
    )


def two_sample_test(data: Dataset, draw: DrawSamples, count: int) -> manifest_pb2.Quality:
    """Return the C2ST of `count` samples against as many test rows. It needs no classifier."""
    test = data.test.rows[:count]
    samples = [draw(len(test), index) for index in range(NUM_SETS)]
    references = [data.train.rows[subset] for subset in _subsets(len(data.train), len(test))]
    return _c2st_quality(samples, references, test)


@dataclass(frozen=True)
class SampleEvaluator:
    """Comparison of samples with the test rows of a dataset, on the features of a trained classifier."""

    data: Dataset
    classifier: "FeatureClassifier"

    @classmethod
    def train(cls, data: Dataset, settings: Settings) -> "SampleEvaluator":
        """Train the classifier on the even training rows; the odd ones are for the reference values."""
        torch.manual_seed(settings.seed)
        classifier = FeatureClassifier(
            data.spec.tensor.shape, data.spec.num_levels, len(data.spec.class_labels)
        )
        half = dataclasses.replace(data, train=data.train[0::2])
        fit(classifier, half, settings, "  measuring: classifier")
        return cls(data, classifier)

    def similarity(self, draw: DrawSamples, count: int) -> list[manifest_pb2.Quality]:
        """Return FD(our-cnn) and C2ST of `count` samples, uint8 [count, *shape]."""
        test, samples, references = self._comparison(draw, count)
        return [
            _comparison_quality(
                f"FD({CLASSIFIER_NAME})",
                "",
                [self.distance(rows, test) for rows in samples],
                [self.distance(rows, test) for rows in references],
                f"Frechet distance between {len(test)} samples and as many test rows on {NUM_FEATURES} "
                "features of our own classifier; not an FID. The reference value uses training rows that the "
                "classifier was not trained on.",
            ),
            _c2st_quality(samples, references, test),
        ]

    def distance(self, rows: Samples, others: Samples) -> float:
        """Return FD(our-cnn) between two sets of rows."""
        return frechet_distance(self.classifier.embed(rows), self.classifier.embed(others))

    def coverage(self, draw: DrawSamples, count: int) -> manifest_pb2.Quality:
        """Return coverage(our-cnn) of `count` samples, uint8 [count, *shape]."""
        test, samples, references = self._comparison(draw, count)
        features = self.classifier.embed(test)
        return _comparison_quality(
            f"coverage({CLASSIFIER_NAME})",
            "",
            [coverage(self.classifier.embed(rows), features) for rows in samples],
            [coverage(self.classifier.embed(rows), features) for rows in references],
            f"Fraction of {len(test)} test rows with one of as many samples nearer than their "
            f"{NUM_NEIGHBORS}th nearest test row, on {NUM_FEATURES} features of our own classifier. Missing "
            "modes lower it. The reference value uses training rows that the classifier was not trained on.",
        )

    def label_agreement(self, rows: Samples, labels: NDArray[np.int64]) -> manifest_pb2.Quality:
        """Return the fraction of samples that the classifier assigns to the requested label.

        Args:
            rows: samples, uint8 [N, *shape].
            labels: requested labels [N].
        """
        agrees, on_test = self._is_correct(Split(rows, labels)), self._is_correct(self.data.test)
        return manifest_pb2.Quality(
            name="label agreement",
            value=float(agrees.mean()),
            unit="accuracy",
            standard_error=standard_error(agrees),
            reference_value=float(on_test.mean()),
            doc=f"Fraction of {len(agrees)} samples that our classifier assigns to the requested label. "
            "The reference value is its accuracy on test rows.",
        )

    def _comparison(self, draw: DrawSamples, count: int) -> tuple[Samples, list[Samples], list[Samples]]:
        """Return test rows, sets of as many samples, and sets of as many training rows."""
        test = self.data.test.rows[:count]
        unseen = self.data.train.rows[1::2]
        samples = [draw(len(test), index) for index in range(NUM_SETS)]
        return test, samples, [unseen[subset] for subset in _subsets(len(unseen), len(test))]

    def _is_correct(self, split: Split) -> NDArray[np.float64]:
        with torch.no_grad():
            logits = self.classifier.logits(torch.tensor(split.rows))
        return np.asarray(logits.argmax(1).numpy() == split.labels, np.float64)


class FeatureClassifier(Network):
    """Small convolutional classifier (LeCun et al. 1998); its features are the last hidden layer."""

    def __init__(self, shape: tuple[int, ...], num_levels: int, num_classes: int) -> None:
        super().__init__()
        self.max_level = num_levels - 1
        channels = 1 if len(shape) == 2 else shape[2]
        self.features = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.SiLU(), nn.Dropout(0.2),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(256, NUM_FEATURES), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def hidden(self, rows: Tensor) -> Tensor:
        """Return the features [B, NUM_FEATURES] of uint8 rows [B, *shape]."""
        scaled = rows.to(torch.float32) * (2 / self.max_level) - 1
        features: Tensor = self.features(
            scaled.unsqueeze(1) if scaled.dim() == 3 else scaled.permute(0, 3, 1, 2)
        )
        return features

    def logits(self, rows: Tensor) -> Tensor:
        """Return the class logits [B, num_classes] of uint8 rows [B, *shape]."""
        logits: Tensor = self.head(self.hidden(rows))
        return logits

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of each row [B], in nats, with smoothed labels."""
        return functional.cross_entropy(self.logits(rows), labels, reduction="none", label_smoothing=0.05)

    def embed(self, rows: Samples) -> NDArray[np.float64]:
        """Return the features float64 [N, NUM_FEATURES] of uint8 rows [N, *shape]."""
        with torch.no_grad():
            return self.hidden(torch.tensor(rows)).double().numpy()


def frechet_distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return the Frechet distance between normal distributions fitted to features [N, F] and [M, F]."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr sqrt(A B) = sum of the roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    root = _matrix_sqrt(covariance_a)
    eigenvalues = np.linalg.eigvalsh(root @ covariance_b @ root)
    trace = np.trace(covariance_a + covariance_b) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + trace)


def coverage(samples: NDArray[np.float64], real: NDArray[np.float64]) -> float:
    """Return the fraction of real rows with a sample nearer than their 5th nearest real row.

    For two sets of one distribution its expectation is 1 - prod_{i=1..5} (N - i) / (M + N - i), which is
    0.969 when M = N.

    Args:
        samples: features [M, F].
        real: features [N, F].
    """
    from sklearn.neighbors import NearestNeighbors

    radii = NearestNeighbors(n_neighbors=NUM_NEIGHBORS).fit(real).kneighbors()[0][:, -1]
    nearest = NearestNeighbors(n_neighbors=1).fit(samples).kneighbors(real)[0][:, 0]
    return float((nearest <= radii).mean())


def _matrix_sqrt(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root


def two_sample_accuracy(a: Samples, b: Samples) -> tuple[float, float]:
    """Return the leave-one-out accuracy of 5 nearest neighbors on the rows of `a` and on those of `b`.

    A row is classified correctly if most of its neighbors come from its own set.
    """
    from sklearn.neighbors import NearestNeighbors

    rows = np.concatenate([a, b]).reshape(len(a) + len(b), -1).astype(np.float64)
    is_in_a = np.repeat([True, False], [len(a), len(b)])
    neighbors = NearestNeighbors(n_neighbors=NUM_NEIGHBORS).fit(rows).kneighbors(return_distance=False)
    is_correct = (is_in_a[neighbors].mean(1) > 0.5) == is_in_a
    return float(is_correct[is_in_a].mean()), float(is_correct[~is_in_a].mean())


def _c2st_quality(
    samples: Sequence[Samples], references: Sequence[Samples], test: Samples
) -> manifest_pb2.Quality:
    accuracies, reference_accuracies = (
        np.array([two_sample_accuracy(rows, test) for rows in sets]) for sets in (samples, references)
    )
    on_samples, on_test = accuracies.mean(0)
    return _comparison_quality(
        "C2ST",
        "accuracy",
        accuracies.mean(1),
        reference_accuracies.mean(1),
        f"Accuracy of {NUM_NEIGHBORS} nearest neighbors that separate {len(test)} samples from as many test "
        f"rows: the mean of {on_samples:.3f} on samples and {on_test:.3f} on test rows. The two sets are "
        "alike only if both are near 0.5. The reference value uses training rows as the samples.",
    )


def _subsets(total: int, size: int) -> list[NDArray[np.intp]]:
    """Return NUM_SETS random subsets of range(total), each with at most `size` indices."""
    generator = np.random.default_rng(0)
    return [generator.choice(total, min(size, total), replace=False) for _ in range(NUM_SETS)]


def _comparison_quality(
    name: str,
    unit: str,
    values: Sequence[float] | NDArray[np.float64],
    references: Sequence[float] | NDArray[np.float64],
    doc: str,
) -> manifest_pb2.Quality:
    return manifest_pb2.Quality(
        name=name,
        value=float(np.mean(values)),
        unit=unit,
        standard_error=standard_error(np.asarray(values)),
        reference_value=float(np.mean(references)),
        doc=f"{doc} Mean of {len(values)} sets.",
    )
