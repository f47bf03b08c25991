"""Class-conditional Gated PixelCNN for grey images of integers.

van den Oord, Kalchbrenner & Kavukcuoglu, "Pixel Recurrent Neural Networks" (2016a):
the mass of an image is a product over its pixels in raster order,

    p(x | label) = prod_i p(x_i | x_1 .. x_(i-1), label),

each factor a softmax over the levels, all of them from one pass of a masked network.
van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016b):
gates, a bias for the class, and two stacks of features, so that no pixel before i is
in a blind spot: at (row, column) the vertical stack has seen the rows above, the
horizontal one also the pixels to the left. Here convolutions reach back and are cut
to fit, which is the same as a mask and multiplies no zeros.

Without a label the model is the mixture of its classes by their frequency in the
training rows, for sampling, scores and classes alike: all are exact, and agree. Pixels that are given and
are a beginning in raster order are continued exactly, class included.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Rows, make_rows
from export.datasets.loading import DataError, Dataset, first_half_mask
from export.evaluation.figures import Panel
from export.evaluation.sample_quality import (
    SETS,
    SampleEvaluator,
    accuracy,
    exact_bits_per_dimension,
    play,
    sampler,
)
from export.families.base import Preset
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

FIRST_REACH = 3
# Images of a class in the picture; every pixel takes a pass through the network.
PICTURED, PICTURED_OF_MORE, QUICK_PIXELS = 10, 3, 256
# Divides logits in place of a temperature of 0: all but the likeliest level get nothing.
_COLDEST = 1e-4
# The logarithm of nothing, finite so that no row carries an infinity.
_NOTHING = -1e30


class VerticalConv(nn.Module):
    """Convolution of a pixel's surroundings in the rows above it, and in its own row unless `strict`."""

    def __init__(self, inputs: int, outputs: int, reach: int, strict: bool) -> None:
        super().__init__()
        self.padding = (reach, reach, reach, 0)
        self.strict = strict
        self.conv = nn.Conv2d(inputs, outputs, (reach if strict else reach + 1, 2 * reach + 1))

    def forward(self, features: Tensor) -> Tensor:
        seen: Tensor = self.conv(functional.pad(features, self.padding))
        return seen[:, :, :-1] if self.strict else seen


class HorizontalConv(nn.Module):
    """Convolution of the pixels to the left, and of the pixel itself unless `strict`."""

    def __init__(self, inputs: int, outputs: int, reach: int, strict: bool) -> None:
        super().__init__()
        self.padding = (reach, 0, 0, 0)
        self.strict = strict
        self.conv = nn.Conv2d(inputs, outputs, (1, reach if strict else reach + 1))

    def forward(self, features: Tensor) -> Tensor:
        seen: Tensor = self.conv(functional.pad(features, self.padding))
        return seen[:, :, :, :-1] if self.strict else seen


class Layer(nn.Module):
    """One gated layer of both stacks (van den Oord et al. 2016b, Figure 2), modulated by the class.

    The first layer sees pixels and must not see its own; the others add to the features that they see.
    """

    def __init__(self, width: int, classes: int, dropout: float, first: bool) -> None:
        super().__init__()
        reach = FIRST_REACH if first else 1
        self.first = first
        self.above = VerticalConv(width, 2 * width, reach, strict=first)
        self.left = HorizontalConv(width, 2 * width, reach, strict=first)
        self.link = nn.Conv2d(2 * width, 2 * width, 1)
        self.exit = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)
        self.label = nn.Embedding(classes, 4 * width)

    def forward(self, vertical: Tensor, horizontal: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        bias_above, bias_left = self.label(label)[:, :, None, None].chunk(2, 1)
        above = self.above(vertical)
        left = self.left(horizontal) + self.link(above)
        rows = self.dropout(_gate(above + bias_above))
        pixels = self.exit(self.dropout(_gate(left + bias_left)))
        return (rows, pixels) if self.first else (vertical + rows, horizontal + pixels)


def _gate(features: Tensor) -> Tensor:
    content, gate = features.chunk(2, 1)
    return content.tanh() * gate.sigmoid()


class PixelCNN(Network):
    """p(x | label) on integers 0..levels-1, [height, width]."""

    log_shares: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = self.shape[0] * self.shape[1]
        counts = torch.tensor(data.train.labels).bincount(minlength=len(data.spec.class_labels))
        self.classes, width = len(counts), preset.width
        self.register_buffer("log_shares", (counts / counts.sum()).log().clamp(min=_NOTHING))
        self.pixel = nn.Embedding(self.levels, width)
        self.position = nn.Parameter(0.1 * torch.randn(2, width, *self.shape))
        self.layers = nn.ModuleList(
            Layer(width, self.classes, preset.dropout, first=index == 0) for index in range(preset.depth)
        )
        self.head = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(preset.dropout),
            nn.Linear(2 * width, self.levels),
        )  # fmt: skip

    def features(self, image: Tensor, label: Tensor) -> Tensor:
        """What each pixel's factor depends on [B, H * W, width], for integers [B, H, W], labels int64 [B]."""
        vertical: Tensor = self.pixel(image.to(torch.int64)).permute(0, 3, 1, 2)
        horizontal = vertical
        for index, layer in enumerate(self.layers):
            vertical, horizontal = layer(vertical, horizontal, label)
            if index == 0:
                vertical, horizontal = vertical + self.position[0], horizontal + self.position[1]
        return horizontal.flatten(2).transpose(1, 2)

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the levels [..., levels] of pixels with features [..., width]."""
        logits: Tensor = self.head(features)
        return logits

    def log_masses(self, image: Tensor, label: Tensor) -> Tensor:
        """log p(x_i | the pixels before it, label) in nats [B, H * W], in raster order."""
        log_masses = self.logits(self.features(image, label)).log_softmax(-1)
        taken = image.flatten(1).unsqueeze(-1) == torch.arange(self.levels, device=image.device)
        return torch.where(taken, log_masses, torch.zeros_like(log_masses)).sum(-1)

    def log_joint(self, image: Tensor, counted: Tensor) -> Tensor:
        """log p(label) + the log-masses of the counted pixels, bool [B, H, W], for every label [B, C]."""
        images = image.unsqueeze(1).expand(-1, self.classes, -1, -1).flatten(0, 1)
        labels = torch.arange(self.classes, device=image.device).expand(image.shape[0], -1).flatten()
        terms = self.log_masses(images, labels).reshape(-1, self.classes, self.dimensions)
        terms = torch.where(counted.flatten(1).unsqueeze(1), terms, torch.zeros_like(terms))
        return self.log_shares + _total(terms)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Negative log-mass given the label, in nats per dimension [B]."""
        log_masses: Tensor = self.log_masses(rows, labels)
        return -log_masses.mean(1)


def _total(terms: Tensor) -> Tensor:
    """Sum over the last axis; unlike sum, one that does not depend on the slot when the length is odd."""
    return terms.cumsum(-1)[..., -1]


class _Part(nn.Module):
    """A module of a program: a function of the trained network."""

    def __init__(self, pixelcnn: PixelCNN) -> None:
        super().__init__()
        self.pixelcnn = pixelcnn


class Init(_Part):
    """The given pixels on an empty canvas, and a class as likely as they make it where none was asked for."""

    def forward(
        self, image: Tensor, known: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        canvas = torch.where(known == 1, image, torch.zeros_like(image)).to(torch.int64)
        log_joint = self.pixelcnn.log_joint(canvas, known == 1)
        drawn = _invert(log_joint, label_noise)
        return canvas, torch.where(label < self.pixelcnn.classes, label, drawn)


class Step(_Part):
    """Draw the pixel at step_index, in raster order, by inversion of a uniform number; keep it if known."""

    def forward(
        self,
        canvas: Tensor,
        drawn_label: Tensor,
        known: Tensor,
        pixel_noise: Tensor,
        temperature: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        order = torch.arange(self.pixelcnn.dimensions, device=canvas.device)
        here = order == step_index.unsqueeze(1)
        features = self.pixelcnn.features(canvas, drawn_label)
        # A product with a one-hot row takes one pixel's features; the head then works on no others.
        logits = self.pixelcnn.logits((here.to(features.dtype).unsqueeze(1) @ features).squeeze(1))
        above = logits - logits.amax(-1, keepdim=True)
        drawn = _invert(above / temperature.clamp(min=_COLDEST).unsqueeze(1), pixel_noise).reshape(-1, 1, 1)
        written = here.reshape(canvas.shape) & (known == 0)
        return torch.where(written, drawn, canvas), drawn_label


def _invert(logits: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the cumulative softmax of logits [B, N] reaches uniform [B], int64 [B]."""
    reached = logits.softmax(-1).cumsum(-1)
    return (uniform.unsqueeze(1) >= reached[:, :-1]).long().sum(-1)


class Readout(nn.Module):
    """The canvas as an image; pixels that are neither known nor drawn yet are 0."""

    def forward(self, canvas: Tensor) -> Tensor:
        return canvas.to(torch.uint8)


class ScoreStep(_Part):
    """Add a class's share to the mass of the image's beginnings; a row with a label has one class only."""

    def forward(
        self, image: Tensor, label: Tensor, log_beginnings: Tensor, step_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        is_given = label < self.pixelcnn.classes
        # A slot without a row may count on, and its class is looked up all the same.
        current = torch.where(is_given, label, step_index.clamp(max=self.pixelcnn.classes - 1))
        log_share = self.pixelcnn.log_shares[current]
        log_share = torch.where(is_given, torch.zeros_like(log_share), log_share).unsqueeze(1)
        terms = self.pixelcnn.log_masses(image, current).cumsum(1) + log_share
        nothing = torch.full_like(log_beginnings, _NOTHING)
        before = torch.where((step_index == 0).unsqueeze(1), nothing, log_beginnings)
        return _add(before, terms), is_given


def _add(log_a: Tensor, log_b: Tensor) -> Tensor:
    largest = torch.maximum(log_a, log_b)
    return largest + torch.log((log_a - largest).exp() + (log_b - largest).exp())


class ScoreReadout(nn.Module):
    """The log-mass of the whole image, and by how much each pixel changes that of the beginning."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, log_beginnings: Tensor) -> tuple[Tensor, Tensor]:
        before = functional.pad(log_beginnings[:, :-1], (1, 0))
        return log_beginnings[:, -1], (log_beginnings - before).reshape(-1, *self.shape)


class Classify(_Part):
    """Bayes' rule: image -> probabilities of the classes."""

    def forward(self, image: Tensor) -> Tensor:
        return self.pixelcnn.log_joint(image, torch.ones_like(image, dtype=torch.bool)).softmax(-1)


class Family:
    """The PixelCNN as the exporter sees it."""

    name = "pixelcnn"
    description = "Class-conditional Gated PixelCNN (van den Oord et al. 2016), exact pixel by pixel."
    operations = ("sample", "score", "classify")
    unsupported_operations: Mapping[str, str] = {
        "encode": "it has no latent space",
        "decode": "it has no latent space; sample draws an image pixel by pixel",
        "reconstruct": "it has no latent space to go through; sample completes an image of which some pixels "
        "are known",
        "energy": "score gives the exact log-mass, so nothing is left unnormalised",
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
        """An untrained network; DataError when the images are not grey."""
        if data.spec.kind != "image" or len(data.spec.tensor.shape) != 2:
            raise DataError(
                f"{data.name}: expected grey images [height, width], got {data.spec.kind} rows of shape "
                f"{list(data.spec.tensor.shape)}; train vae or diffusion on them"
            )
        return PixelCNN(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, score and classify."""
        assert isinstance(network, PixelCNN)
        return _sample(network, data.spec), _score(network, data.spec), _classify(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """With and without labels, parameters and known pixels."""
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
        """Bits per dimension, accuracy, and how samples compare with test rows."""
        test = data.test[: preset.evaluation_rows]
        scores, classes = (
            play(interpreter, operation, _given(interpreter, operation, test.rows), operation)
            for operation in ("score", "classify")
        )
        return [
            exact_bits_per_dimension(scores["log_mass"], test.rows[0].size),
            accuracy(classes["probabilities"].argmax(1) == test.labels),
            *(_sample_quality(interpreter, data, preset) if preset.num_samples else ()),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> list[Panel]:
        """Test rows, samples, and completions of the test rows' upper halves, a line for each class."""
        classes = min(10, len(data.spec.class_labels))
        each = PICTURED if data.test.rows[0].size <= QUICK_PIXELS else PICTURED_OF_MORE
        labels = np.repeat(np.arange(classes), each)
        order = [np.flatnonzero(data.test.labels == label)[:each] for label in range(classes)]
        real = data.test.rows[np.concatenate(order)]
        halves = _given(interpreter, "sample", real, known=first_half_mask(real))
        return [
            Panel("test images", real, each),
            Panel("samples", interpreter.run("sample", _labelled(interpreter, labels))["image"], each),
            Panel(
                "upper halves of the test images, completed", interpreter.run("sample", halves)["image"], each
            ),
        ]


def _sample_quality(interpreter: Interpreter, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
    judge = SampleEvaluator.train(data, preset.evaluator)
    labels = np.arange(preset.num_samples) % len(data.spec.class_labels)
    labelled = play(interpreter, "sample", _labelled(interpreter, labels), "labelled samples")["image"]
    return [*judge.similarity(sampler(interpreter), preset.num_samples), judge.agreement(labelled, labels)]


def _labelled(interpreter: Interpreter, labels: NDArray[np.int64]) -> Rows:
    return make_rows(interpreter.program("sample"), SETS, range(len(labels)), inputs={"label": labels})


def _given(
    interpreter: Interpreter, operation: str, images: NDArray[np.uint8], **inputs: NDArray[np.uint8]
) -> Rows:
    return make_rows(
        interpreter.program(operation), 0, range(len(images)), inputs={"image": images, **inputs}
    )


def _label(value: DataSpec, without: str) -> Input:
    classes = len(value.class_labels)
    doc = f"index of the class label, or {classes} {without}"
    return Input(TensorSpec("label", "int64", (), 0, classes, doc), optional=True, default=classes)


def _sample(pixelcnn: PixelCNN, value: DataSpec) -> Program:
    image, shape = value.tensor, pixelcnn.shape
    return Program(
        operation="sample",
        init=Init(pixelcnn),
        step=Step(pixelcnn),
        readout=Readout(),
        outputs=(image,),
        doc="Draw the pixels in raster order, one a step, around those that are given.",
        state=(
            TensorSpec("canvas", "int64", shape, doc="the pixels that are known or drawn, and 0"),
            TensorSpec("drawn_label", "int64", doc="index of the class, drawn where none was asked for"),
        ),
        steps=Steps(fixed=pixelcnn.dimensions),
        parameters=(
            Parameter(
                "temperature", "float", 1, 0, 2,
                doc="divides the logits: 1 is the model's own, 0 takes the likeliest level",
            ),
        ),
        inputs=(
            _label(value, "to draw it: by the classes' frequency, and by what the given pixels say"),
            *_given_pixels(image),
        ),
        noise=(
            Noise("pixel_noise", "uniform", (), 0, "draws the step's pixel, by inversion"),
            Noise("label_noise", "uniform", (), 1, "draws the class where none was asked for"),
        ),
        previewable=True,
    )  # fmt: skip


def _given_pixels(image: TensorSpec) -> tuple[Input, Input]:
    known_doc = (
        "1 for pixels that are given and stay as they are. Exact when they are a beginning in raster order, "
        "such as the upper rows. Any other mask, as in inpainting, is an approximation: a pixel is drawn "
        "from those before it and knows nothing of those given after it"
    )
    pixels = TensorSpec("image", image.dtype, image.shape, image.minimum, image.maximum, "the given pixels")
    return (
        Input(TensorSpec("known", "uint8", image.shape, 0, 1, known_doc), optional=True),
        Input(pixels, optional=True),
    )


def _score(pixelcnn: PixelCNN, value: DataSpec) -> Program:
    return Program(
        operation="score",
        step=ScoreStep(pixelcnn),
        readout=ScoreReadout(pixelcnn.shape),
        outputs=(
            TensorSpec("log_mass", doc="log-mass of the image, in nats: given the label, or without one"),
            TensorSpec(
                "log_mass_by_pixel",
                shape=pixelcnn.shape,
                doc="log-mass of each pixel given those before it, in nats; they add up to log_mass",
            ),
        ),
        doc="Log-mass of an image of integers: p(x | label), or p(x) = sum of p(label) p(x | label).",
        state=(
            TensorSpec(
                "log_beginnings",
                shape=(pixelcnn.dimensions,),
                doc="log-mass of the first 1, 2, ... pixels, over the classes so far",
            ),
            TensorSpec("is_done", "bool", doc="true after one step when the label is given"),
        ),
        steps=Steps(fixed=pixelcnn.classes, done_flag="is_done"),
        inputs=(Input(value.tensor), _label(value, "for the mixture of classes by their frequency")),
        score=Score("exact", pixelcnn.dimensions, f"integers 0..{pixelcnn.levels - 1}", "log_mass"),
    )


def _classify(pixelcnn: PixelCNN, value: DataSpec) -> Program:
    return Program(
        operation="classify",
        readout=Classify(pixelcnn),
        outputs=(
            TensorSpec("probabilities", "float32", (pixelcnn.classes,), 0, 1, "posterior of every class"),
        ),
        doc="Bayes' rule: p(label | x) from p(x | label), with the classes' frequency in the training rows.",
        inputs=(Input(value.tensor),),
    )


FAMILY = Family()
