"""The PixelCNN family for the exporter: presets, golden requests, quality and figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Rows, make_rows
from export.datasets.loading import DataError, Dataset, first_half_mask
from export.evaluation.figures import ImageGrid
from export.evaluation.sample_quality import (
    NUM_SETS,
    SampleEvaluator,
    accuracy,
    exact_bits_per_dimension,
    make_sampler,
    run_in_chunks,
)
from export.families.base import Preset
from export.families.pixelcnn.network import PixelCNN
from export.families.pixelcnn.programs import build_programs
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Classes in a panel of the figure.
MAX_PANEL_CLASSES = 10
# Images of each class in a panel: fewer for images of more than SMALL_IMAGE_PIXELS pixels, because sampling
# takes one pass through the network for each pixel.
IMAGES_PER_CLASS, LARGE_IMAGES_PER_CLASS, SMALL_IMAGE_PIXELS = 10, 3, 256


class Family:
    """Exporter family of Gated PixelCNNs."""

    name = "pixelcnn"
    description = "Class-conditional Gated PixelCNN (van den Oord et al. 2016), exact pixel by pixel."
    operations = ("sample", "score", "classify")
    unsupported_operations: Mapping[str, str] = {
        "encode": "the model has no latent space",
        "decode": "the model has no latent space; use sample, which draws an image pixel by pixel",
        "reconstruct": "the model has no latent space; use sample with known pixels to complete an image",
        "energy": "the model's mass is normalized; use score for the exact log-mass",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=8, depth=2, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=32,
            depth=5,
            dropout=0.4,
            training=Settings(
                steps=900,
                batch_rows=48,
                learning_rate=7e-3,
                weight_decay=0.2,
                ema_decay=0.985,
                validation_rows=1,
            ),
        ),
        "medium": Preset(
            width=32,
            depth=6,
            training=Settings(steps=7500, batch_rows=16, learning_rate=4e-3, evaluations=5),
            evaluation_samples=0,
        ),
        "full": Preset(
            width=96,
            depth=10,
            dropout=0.2,
            training=Settings(steps=20_000, batch_rows=128, learning_rate=1e-3),
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> PixelCNN:
        """Return an untrained network.

        Raises:
            DataError: the data are not gray images.
        """
        if data.spec.kind != "image" or len(data.spec.tensor.shape) != 2:
            raise DataError(
                f"{data.name}: expected gray images [height, width], got {data.spec.kind} rows of shape "
                f"{list(data.spec.tensor.shape)}; use the family vae or diffusion instead"
            )
        return PixelCNN(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return sample, score and classify."""
        assert isinstance(network, PixelCNN)
        return build_programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests with and without labels, parameters and known pixels."""
        images, labels = data.test.rows[:3], np.arange(3)
        completion = {"image": images, "known": first_half_mask(images)}
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=5, parameters={"temperature": 0.7}, inputs={"label": labels}),
            Example("sample", seed=3, inputs=completion),
            Example("score", inputs={"image": images}),
            Example("score", inputs={"image": images, "label": labels}),
            Example("classify", inputs={"image": images}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Return bits per dimension and accuracy on test images, and the quality of samples."""
        test = data.test[: preset.evaluation_rows]
        scores, classes = (
            run_in_chunks(interpreter, operation, _rows(interpreter, operation, image=test.rows), operation)
            for operation in ("score", "classify")
        )
        return [
            exact_bits_per_dimension(scores["log_mass"], test.rows[0].size),
            accuracy(classes["probabilities"].argmax(1) == test.labels),
            *(_sample_quality(interpreter, data, preset) if preset.num_samples else ()),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> list[ImageGrid]:
        """Return test images, samples, and completions of the upper halves, with one line for each class."""
        classes = min(MAX_PANEL_CLASSES, len(data.spec.class_labels))
        is_small = data.test.rows[0].size <= SMALL_IMAGE_PIXELS
        columns = IMAGES_PER_CLASS if is_small else LARGE_IMAGES_PER_CLASS
        labels = np.repeat(np.arange(classes), columns)
        order = [np.flatnonzero(data.test.labels == label)[:columns] for label in range(classes)]
        images = data.test.rows[np.concatenate(order)]
        halves = _rows(interpreter, "sample", image=images, known=first_half_mask(images))
        samples = interpreter.run("sample", _labeled_rows(interpreter, labels))["image"]
        completions = interpreter.run("sample", halves)["image"]
        return [
            ImageGrid("test images", images, columns),
            ImageGrid("samples", samples, columns),
            ImageGrid("completions of the upper halves of the test images", completions, columns),
        ]


def _sample_quality(interpreter: Interpreter, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
    evaluator = SampleEvaluator.train(data, preset.evaluator)
    labels = np.arange(preset.num_samples) % len(data.spec.class_labels)
    labeled = run_in_chunks(interpreter, "sample", _labeled_rows(interpreter, labels), "labeled samples")[
        "image"
    ]
    return [
        *evaluator.similarity(make_sampler(interpreter), preset.num_samples),
        evaluator.label_agreement(labeled, labels),
    ]


def _labeled_rows(interpreter: Interpreter, labels: NDArray[np.int64]) -> Rows:
    return make_rows(interpreter.program("sample"), NUM_SETS, range(len(labels)), inputs={"label": labels})


def _rows(interpreter: Interpreter, operation: str, **inputs: NDArray[Any]) -> Rows:
    count = len(next(iter(inputs.values())))
    return make_rows(interpreter.program(operation), 0, range(count), inputs=inputs)


FAMILY = Family()
