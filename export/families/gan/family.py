"""The GAN family for the exporter: presets, golden requests, quality and figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset
from export.evaluation.figures import ImageGrid, Plot, Scatter
from export.evaluation.sample_quality import (
    NUM_SETS,
    SampleEvaluator,
    make_sampler,
    run_in_chunks,
    two_sample_test,
)
from export.families.base import Preset
from export.families.gan.network import GAN, LATENT_DIMENSIONS
from export.families.gan.programs import build_programs
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Classes in a figure, images of each class, and latents of an interpolation.
NUM_PLOT_IMAGES = 10
# Interpolations of each class in the figure of points.
INTERPOLATIONS_PER_CLASS = 5
# The figure of points covers -PLOT_LIMIT..PLOT_LIMIT on both axes.
PLOT_LIMIT = 2.5


def _settings(steps: int, batch_rows: int, learning_rate: float, ema_decay: float = 0.999) -> Settings:
    """Return training settings without momentum, weight decay and gradient clipping.

    The game of two losses is not a descent, so momentum and decay do not help. The gradient penalties replace
    clipping.
    """
    return Settings(
        steps=steps,
        batch_rows=batch_rows,
        learning_rate=learning_rate,
        weight_decay=0,
        betas=(0.0, 0.99),
        ema_decay=ema_decay,
        clip=math.inf,
    )


# For points, in the presets starter and medium.
POINTS = Preset(
    width=128,
    depth=3,
    training=_settings(steps=4000, batch_rows=256, learning_rate=2e-3, ema_decay=0.995),
    evaluation_rows=10_000,
)


class Family:
    """Exporter family of class-conditional GANs."""

    name = "gan"
    description = "Class-conditional GAN (Goodfellow et al. 2014) with the loss of R3GAN (Huang et al. 2024)."
    operations = ("sample", "decode")
    unsupported_operations: Mapping[str, str] = {
        "score": "a GAN has no likelihood: its generator has no tractable density, and its discriminator's "
        "output is not a density",
        "energy": "a GAN has no density, and the output of its discriminator is not an energy",
        "encode": "the generator has no inverse; a search for the latent of a row may fail",
        "reconstruct": "it needs the latent of a row, and the generator has no inverse",
        "classify": "the model generates rows of a class, but does not predict the class of a row",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=256,
            depth=3,
            training=_settings(steps=3200, batch_rows=128, learning_rate=5e-4),
            by_kind={"vector": POINTS},
        ),
        "medium": Preset(
            width=256,
            depth=2,
            training=_settings(steps=10_000, batch_rows=64, learning_rate=5e-4),
            evaluation_rows=5000,
            by_kind={"vector": POINTS},
        ),
        "full": Preset(
            width=1024,
            depth=3,
            training=_settings(steps=60_000, batch_rows=256, learning_rate=2e-4),
            evaluation_rows=10_000,
            by_kind={
                "vector": Preset(
                    width=256,
                    depth=3,
                    training=_settings(steps=40_000, batch_rows=512, learning_rate=1e-3),
                    evaluation_rows=10_000,
                )
            },
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> GAN:
        """Return an untrained generator and its discriminator."""
        return GAN(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return sample and decode."""
        assert isinstance(network, GAN)
        return build_programs(network.generator, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests with and without latents, labels and truncation."""
        labels = np.arange(3) % len(data.spec.class_labels)
        latents = np.linspace(-2, 2, 3 * LATENT_DIMENSIONS[data.spec.kind], dtype=np.float32).reshape(3, -1)
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"truncation": 0.7}, inputs={"label": labels}),
            Example("sample", seed=3, inputs={"latent": latents}),
            Example("decode", seed=4, inputs={"latent": latents}),
            Example("decode", inputs={"latent": latents, "label": labels}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Return the distances between samples and test rows; for images also the agreement with labels."""
        draw, count = make_sampler(interpreter), preset.evaluation_rows
        if data.spec.kind == "vector":
            return [two_sample_test(data, draw, count)]
        evaluator = SampleEvaluator.train(data, preset.evaluator)
        labels = np.arange(count) % len(data.spec.class_labels)
        rows = make_rows(interpreter.program("sample"), NUM_SETS, range(count), inputs={"label": labels})
        labeled = run_in_chunks(interpreter, "sample", rows, "labeled samples")[data.spec.tensor.name]
        return [
            *evaluator.similarity(draw, count),
            evaluator.coverage(draw, count),
            evaluator.label_agreement(labeled, labels),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return test rows, samples of each class, and interpolations between latents."""
        if data.spec.kind == "vector":
            return _point_plots(interpreter, data)
        classes = min(NUM_PLOT_IMAGES, len(data.spec.class_labels))
        labels = np.repeat(np.arange(classes), NUM_PLOT_IMAGES)
        order = [np.flatnonzero(data.test.labels == label)[:NUM_PLOT_IMAGES] for label in range(classes)]
        samples = _run(interpreter, "sample", {"label": labels})
        between = _run(interpreter, "decode", _interpolations(interpreter, labels))
        return [
            ImageGrid("test images", data.test.rows[np.concatenate(order)]),
            ImageGrid("samples by class", samples),
            ImageGrid("between two latents of a class", between),
        ]


def _point_plots(interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
    classes, count = len(data.spec.class_labels), len(data.test) // 2
    samples = [
        Scatter(f"samples, {name}", _run(interpreter, "sample", {"label": np.full(count, label)}), PLOT_LIMIT)
        for label, name in enumerate(data.spec.class_labels)
    ]
    labels = np.repeat(np.arange(classes), INTERPOLATIONS_PER_CLASS * NUM_PLOT_IMAGES)
    between = _run(interpreter, "decode", _interpolations(interpreter, labels))
    return [
        Scatter("test points", data.test.rows, PLOT_LIMIT),
        *samples,
        Scatter("between latents", between, PLOT_LIMIT),
    ]


def _run(interpreter: Interpreter, operation: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    rows = make_rows(interpreter.program(operation), 0, range(len(inputs["label"])), inputs=inputs)
    return interpreter.run(operation, rows)[interpreter.manifest.data_spec.tensor.name]


def _interpolations(interpreter: Interpreter, labels: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """Return labels, and latents that move from one draw to another in each group of NUM_PLOT_IMAGES rows.

    The latents lie on an arc cos(t) a + sin(t) b, on which all have the distribution N(0, I).
    """
    (dimensions,) = interpreter.program("decode").inputs[0].tensor.shape
    ends = np.random.default_rng(0).standard_normal((2, len(labels) // NUM_PLOT_IMAGES, 1, dimensions))
    angles = np.linspace(0, np.pi / 2, NUM_PLOT_IMAGES)[:, np.newaxis]
    arcs = np.cos(angles) * ends[0] + np.sin(angles) * ends[1]
    return {"label": labels, "latent": arcs.reshape(len(labels), -1).astype(np.float32)}


FAMILY = Family()
