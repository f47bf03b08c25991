"""Base of the classifier families for the exporter: programs, golden requests, quality and figures."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets.loading import Dataset, Split
from export.evaluation.calibration import NUM_BINS, fit_temperature, measure_calibration
from export.evaluation.figures import ImageGrid
from export.evaluation.sample_quality import accuracy, mean_quality, run_in_chunks
from export.families.base import Preset
from export.families.classifier.network import Classifier
from export.families.classifier.programs import build_classify, build_encode
from export.graphs.program import Program
from export.training.trainer import Network
from samovar.v1 import manifest_pb2

# Images in a panel of the figure, and test images among which they are searched.
NUM_PANEL_IMAGES, NUM_SEARCHED_IMAGES = 100, 1000
_CHUNK_ROWS = 256


class ClassifierFamily:
    """Base of the classifier families; subclasses add the network and the presets."""

    operations: tuple[str, ...] = ("classify", "encode")
    unsupported_operations: Mapping[str, str] = {
        "score": "a classifier models the probability of a label given an image, not the density of images",
        "sample": "a classifier does not generate images",
        "reconstruct": "the features do not determine the image",
        "energy": "a classifier does not model how probable an image is; use classify for its logits, which "
        "compare the labels of one image",
        "decode": "the features do not determine the image",
    }

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return classify and encode. The default temperature is fitted on the validation rows."""
        assert isinstance(network, Classifier)
        served = network.inference_copy()
        temperature = fit_temperature(_logits(served, data.validation), data.validation.labels)
        return (
            build_classify(served, data.spec.tensor, round(temperature, 3)),
            build_encode(served, data.spec.tensor),
        )

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests on the first test rows, with and without parameters."""
        images = data.test.rows[:4]
        return (
            Example("classify", rows=4, inputs={"image": images}),
            Example("classify", rows=4, parameters={"temperature": 2, "top_k": 1}, inputs={"image": images}),
            Example("encode", rows=4, inputs={"image": images}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Measure accuracy, cross-entropy, and calibration error at temperature 1 and as fitted."""
        held_out = data.test[: preset.evaluation_rows]
        fitted = _classify(interpreter, held_out.rows, "classes")
        unscaled = _classify(interpreter, held_out.rows, "classes at temperature 1", {"temperature": 1})
        temperature = interpreter.program("classify").parameters[0].default_value
        return [
            accuracy(fitted["top_label"] == held_out.labels),
            _cross_entropy(fitted, held_out, temperature),
            _calibration_error(unscaled, held_out, 1),
            _calibration_error(fitted, held_out, temperature),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> list[ImageGrid]:
        """Return the test images with the lowest and the highest top probability."""
        images = data.test.rows[:NUM_SEARCHED_IMAGES]
        order = _classify(interpreter, images, "pictures")["probabilities"].max(1).argsort()
        return [
            ImageGrid("test images, the least certain", images[order[:NUM_PANEL_IMAGES]]),
            ImageGrid("test images, the most certain", images[order[-NUM_PANEL_IMAGES:]]),
        ]


def _logits(served: Classifier, split: Split) -> NDArray[np.float32]:
    starts = tqdm(range(0, len(split), _CHUNK_ROWS), "  temperature", unit="chunk", dynamic_ncols=True)
    chunks = [served.logits(torch.tensor(split.rows[start : start + _CHUNK_ROWS])) for start in starts]
    return torch.cat(chunks).numpy()


def _classify(
    interpreter: Interpreter, images: NDArray[Any], title: str, parameters: Mapping[str, float] | None = None
) -> Tensors:
    program = interpreter.program("classify")
    rows = make_rows(program, 0, range(len(images)), parameters, {"image": images})
    return run_in_chunks(interpreter, "classify", rows, title)


def _cross_entropy(outputs: Tensors, held_out: Split, temperature: float) -> manifest_pb2.Quality:
    scaled = outputs["logits"].astype(np.float64) / temperature
    nats = np.logaddexp.reduce(scaled, 1) - scaled[np.arange(len(held_out)), held_out.labels]
    doc = (
        f"Mean of -log p(label | image) over {len(nats)} test rows at temperature {temperature:g}. "
        "It does not measure the density of images."
    )
    return mean_quality("cross-entropy", nats, "nats", doc)


def _calibration_error(outputs: Tensors, held_out: Split, temperature: float) -> manifest_pb2.Quality:
    result = measure_calibration(outputs["probabilities"].max(1), outputs["top_label"] == held_out.labels)
    return manifest_pb2.Quality(
        name=f"calibration error, temperature {temperature:g}",
        value=result.error,
        unit="probability",
        standard_error=result.standard_error,
        doc="Expected calibration error of the top label's probability (Guo et al. 2017) in "
        f"{NUM_BINS} equal bins over {len(held_out)} test rows; bootstrap standard error. Calibrated "
        f"probabilities of the same sharpness would give {result.reference_value:.3f} on as many rows.",
    )
