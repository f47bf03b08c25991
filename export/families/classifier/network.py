"""What the classifiers share: p(label | image), its programs, and what it is measured by.

Layers are units of a linear map, batch norm (Ioffe & Szegedy 2015), ReLU and
dropout (Srivastava et al. 2014). In training, batch norm uses the batch's own
mean and variance and dropout scales what survives by 1 / (1 - p). What is served
is frozen: batch norm is the affine map

    y = gamma (x - mean) / sqrt(variance + epsilon) + beta

of the running statistics, folded into the linear map before it, and dropout is
gone. So a row's answer does not depend on its neighbours.

There is no score: log p(label | image) is not a density of images.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from tqdm import tqdm

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets.loading import Dataset, Split
from export.evaluation.calibration import BINS, TEMPERATURES, calibration, fit_temperature
from export.evaluation.figures import Panel
from export.evaluation.sample_quality import accuracy, mean, play
from export.families.base import Preset
from export.graphs.program import Input, Parameter, Program, TensorSpec
from export.training.trainer import Network
from samovar.v1 import manifest_pb2

RANKED = 10
DEFAULT_RANKED = 5
LABEL_SMOOTHING = 0.05
# Training rows are shifted by up to this part of their height and width.
SHIFT = 8
PICTURED = 100
LOOKED_THROUGH = 1000
_CHUNK_ROWS = 256


class Unit(nn.Module):
    """A linear map, batch norm over its outputs, ReLU and dropout."""

    def __init__(self, linear: nn.Linear | nn.Conv2d, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.norm: nn.Module = (
            nn.BatchNorm1d(linear.out_features)
            if isinstance(linear, nn.Linear)
            else nn.BatchNorm2d(linear.out_channels)
        )
        self.dropout: nn.Module = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.dropout(self.norm(self.linear(inputs)).relu())
        return outputs

    def freeze(self) -> None:
        """Fold the running statistics into the linear map, and drop the dropout; call eval() first."""
        if isinstance(self.norm, nn.BatchNorm1d) and isinstance(self.linear, nn.Linear):
            self.linear = fuse_linear_bn_eval(self.linear, self.norm)
        elif isinstance(self.norm, nn.BatchNorm2d) and isinstance(self.linear, nn.Conv2d):
            self.linear = fuse_conv_bn_eval(self.linear, self.norm)
        self.norm, self.dropout = nn.Identity(), nn.Identity()


class Classifier(Network):
    """Class logits by a linear map of the features, which are the last hidden layer.

    `body` turns brightness [B, *shape] in -1..1 into features [B, features].
    """

    def __init__(self, data: Dataset, body: nn.Module, features: int) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.features, self.classes = features, len(data.spec.class_labels)
        self.body = body
        self.head = nn.Linear(features, self.classes)

    def encode(self, image: Tensor) -> Tensor:
        """Features [B, features] of uint8 images [B, *shape]."""
        features: Tensor = self.body(image.to(torch.float32) * (2 / (self.levels - 1)) - 1)
        return features

    def logits(self, image: Tensor) -> Tensor:
        """Class logits [B, classes] of uint8 images [B, *shape]."""
        logits: Tensor = self.head(self.encode(image))
        return logits

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats [B]; in training, rows are disturbed and labels smoothed (Szegedy 2016)."""
        if not self.training:
            return functional.cross_entropy(self.logits(rows), labels, reduction="none")
        logits = self.logits(disturbed(rows))
        return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=LABEL_SMOOTHING)

    def frozen(self) -> "Classifier":
        """A copy to be served: the same function without batch norm and dropout."""
        served = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        for module in list(served.modules()):
            if isinstance(module, Unit):
                module.freeze()
        return served


def disturbed(rows: Tensor) -> Tensor:
    """Rows uint8 [B, height, width(, channels)], each shifted at random and padded with zeros.

    Images in colour, being photographs, are mirrored at random too; digits must not be.
    """
    count, height, width = rows.shape[:3]
    margins = height // SHIFT, width // SHIFT
    padded = functional.pad(rows, (0, 0) * (rows.dim() - 3) + (margins[1],) * 2 + (margins[0],) * 2)
    across = _offsets(count, margins[1], rows.device) + torch.arange(width, device=rows.device)
    if rows.dim() == 4:
        mirrored = torch.rand((count, 1), device=rows.device) < 0.5
        across = torch.where(mirrored, across.flip(1), across)
    down = _offsets(count, margins[0], rows.device) + torch.arange(height, device=rows.device)
    every = torch.arange(count, device=rows.device)
    return padded[every[:, None, None], down[:, :, None], across[:, None, :]]


def _offsets(count: int, margin: int, device: torch.device) -> Tensor:
    return torch.randint(0, 2 * margin + 1, (count, 1), device=device)


class Encode(nn.Module):
    """image -> features."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier.encode(image)


class Classify(nn.Module):
    """image -> probabilities at a temperature, and the labels ranked by them."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.ranked = min(RANKED, classifier.classes)

    def forward(
        self, image: Tensor, temperature: Tensor, top_k: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        logits = self.classifier.logits(image)
        probabilities = (logits / temperature.unsqueeze(1)).softmax(1)
        # By logits, which still differ where probabilities have been rounded to zero.
        labels = logits.topk(self.ranked, dim=1).indices
        ranked = probabilities.gather(1, labels)
        wanted = torch.arange(self.ranked, device=labels.device).unsqueeze(0) < top_k.unsqueeze(1)
        return (
            probabilities,
            labels[:, 0],
            torch.where(wanted, labels, torch.full_like(labels, -1)),
            torch.where(wanted, ranked, torch.zeros_like(ranked)),
            logits,
        )


class ClassifierFamily:
    """A kind of classifier as the exporter sees it; the kinds differ in their networks."""

    operations: tuple[str, ...] = ("classify", "encode")
    unsupported_operations: Mapping[str, str] = {
        "score": "a classifier knows the probability of a label given an image, not of the image",
        "sample": "a classifier does not generate",
        "reconstruct": "features keep what tells classes apart, and not the image",
        "energy": "a classifier knows nothing of how likely an image is; classify gives its logits, which "
        "weigh the labels of one image",
        "decode": "features keep what tells classes apart, and not the image",
    }

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """classify, at the temperature that suits the validation rows, and encode."""
        assert isinstance(network, Classifier)
        served = network.frozen()
        temperature = fit_temperature(_logits(served, data.validation), data.validation.labels)
        return _classify(served, data.spec.tensor, round(temperature, 3)), _encode(served, data.spec.tensor)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests with and without parameters, on the first rows of the test part."""
        images = data.test.rows[:4]
        return (
            Example("classify", rows=4, inputs={"image": images}),
            Example("classify", rows=4, parameters={"temperature": 2, "top_k": 1}, inputs={"image": images}),
            Example("encode", rows=4, inputs={"image": images}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Accuracy, cross-entropy, and calibration error with and without the fitted temperature."""
        held_out = data.test[: preset.evaluation_rows]
        fitted = _answers(interpreter, held_out.rows, "classes")
        plain = _answers(interpreter, held_out.rows, "classes at temperature 1", {"temperature": 1})
        temperature = interpreter.program("classify").parameters[0].default_value
        return [
            accuracy(fitted["top_label"] == held_out.labels),
            _cross_entropy(fitted, held_out, temperature),
            _calibration_error(plain, held_out, 1),
            _calibration_error(fitted, held_out, temperature),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> list[Panel]:
        """The test images that the classifier is least and most sure of."""
        images = data.test.rows[:LOOKED_THROUGH]
        order = _answers(interpreter, images, "pictures")["probabilities"].max(1).argsort()
        return [
            Panel("test images, the least certain", images[order[:PICTURED]]),
            Panel("test images, the most certain", images[order[-PICTURED:]]),
        ]


def _logits(served: Classifier, part: Split) -> NDArray[np.float32]:
    starts = tqdm(range(0, len(part), _CHUNK_ROWS), "  temperature", unit="chunk", dynamic_ncols=True)
    chunks = [served.logits(torch.tensor(part.rows[start : start + _CHUNK_ROWS])) for start in starts]
    return torch.cat(chunks).numpy()


def _answers(
    interpreter: Interpreter, images: NDArray[Any], title: str, parameters: Mapping[str, float] | None = None
) -> Tensors:
    program = interpreter.program("classify")
    rows = make_rows(program, 0, range(len(images)), parameters, {"image": images})
    return play(interpreter, "classify", rows, title)


def _cross_entropy(answers: Tensors, held_out: Split, temperature: float) -> manifest_pb2.Quality:
    scaled = answers["logits"].astype(np.float64) / temperature
    nats = np.logaddexp.reduce(scaled, 1) - scaled[np.arange(len(held_out)), held_out.labels]
    doc = (
        f"Mean of -log p(label | image) over {len(nats)} test rows at temperature {temperature:g}; "
        "it says nothing of the density of images."
    )
    return mean("cross-entropy", nats, "nats", doc)


def _calibration_error(answers: Tensors, held_out: Split, temperature: float) -> manifest_pb2.Quality:
    found = calibration(answers["probabilities"].max(1), answers["top_label"] == held_out.labels)
    return manifest_pb2.Quality(
        name=f"calibration error, temperature {temperature:g}",
        value=found.error,
        unit="probability",
        standard_error=found.standard_error,
        doc=f"Expected calibration error with {BINS} equal bins of the top label's probability over "
        f"{len(held_out)} test rows (Guo et al. 2017), bootstrap standard error. Perfect probabilities of "
        f"this sharpness would score {found.floor:.3f} on so few rows.",
    )


def _classify(served: Classifier, image: TensorSpec, temperature: float) -> Program:
    ranked = min(RANKED, served.classes)
    return Program(
        operation="classify",
        readout=Classify(served),
        outputs=_answer(served.classes, ranked),
        doc="Class probabilities of an image, and the labels ranked by them.",
        parameters=(
            Parameter(
                "temperature",
                "float",
                temperature,
                *TEMPERATURES,
                doc="divides the logits; the default was fitted on validation rows, 1 is the bare network",
            ),
            Parameter("top_k", "integer", min(DEFAULT_RANKED, ranked), 1, ranked, doc="labels to rank"),
        ),
        inputs=(Input(image),),
    )


def _answer(classes: int, ranked: int) -> tuple[TensorSpec, ...]:
    last = classes - 1
    return (
        TensorSpec(
            "probabilities", "float32", (classes,), 0, 1, "of every class, in the order of the class labels"
        ),
        TensorSpec("top_label", "int64", (), 0, last, "index of the most probable class"),
        TensorSpec(
            "ranked_labels", "int64", (ranked,), -1, last, "the top_k classes, most probable first, then -1"
        ),
        TensorSpec("ranked_probabilities", "float32", (ranked,), 0, 1, "their probabilities, then 0"),
        TensorSpec("logits", "float32", (classes,), doc="before the temperature"),
    )


def _encode(served: Classifier, image: TensorSpec) -> Program:
    return Program(
        operation="encode",
        readout=Encode(served),
        outputs=(
            TensorSpec(
                "features", "float32", (served.features,), 0, doc="the last hidden layer, below the logits"
            ),
        ),
        doc=f"The {served.features} features by which the classifier decides.",
        inputs=(Input(image),),
    )
