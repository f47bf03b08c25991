"""Class-conditional generative adversarial network, for points and for images of integers.

Goodfellow et al., "Generative Adversarial Nets" (2014): a generator G makes rows of
latents z ~ N(0, I), and a discriminator D learns to tell them from training rows.
Here D compares a training row x with a made row of the same class, and

    D descends  softplus(-(D(x) - D(G(z)))) + gamma / 2 (|dD/dx|^2 + |dD/dG(z)|^2)
    G descends  softplus(-(D(G(z)) - D(x)))

as in Huang et al., "The GAN is dead; long live the GAN!" (R3GAN, 2024), with the
gradient penalty of Mescheder et al., "Which Training Methods for GANs do actually
Converge?" (2018) on both kinds of rows, without which the game need not settle.
D sees the class by projection (Miyato & Koyama 2018). There is no batch norm, whose
statistics would not fit the average of the weights over steps, which is what is kept.

G ends in an image's levels, rounded, and its gradient passes the rounding as if it
were not there: so D judges what is served, and integers alone give nothing away.
The same latent always makes the same image, and none is drawn from a grey mean.

A GAN has no likelihood: D's output is no density, and nothing here is a score. Which
weights are kept is decided by the squared MMD (Gretton et al., "A Kernel Two-Sample
Test", 2012) between held-out rows and samples of the same classes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset
from export.evaluation.figures import Drawing, Panel, Scatter
from export.evaluation.sample_quality import SETS, SampleEvaluator, play, sampler, two_sample_test
from export.families.base import Preset, label_input
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, TensorSpec
from export.probability.discretized_logistic import scale_rows, unscale_rows
from export.training.trainer import Network, Objective, Settings
from samovar.v1 import manifest_pb2

# By kind of value.
LATENT_DIMENSIONS = {"image": 32, "vector": 4}
# What an element of a latent is when it is left out, or asked to be drawn.
DRAWN = 100.0
# Convolutions halve an image until its sides are no longer than this; a perceptron takes the rest.
LARGEST_SIDE = 8
# Units of the perceptron for a channel of the first convolution.
CHANNEL_SHARE = 16
# Of leaky rectifiers, below 0.
SLOPE = 0.2
# gamma, by kind of value.
PENALTY = {"image": 0.5, "vector": 0.001}
# What the discriminator sees points by: so many random waves, whose frequencies have this spread.
WAVES, FREQUENCY = 64, 4.0
# Of the kernels of the MMD, as shares of the median distance between training rows.
BANDWIDTHS = (1.0, 0.5, 0.25, 0.125, 0.0625)
PICTURED = 10
# The picture of points: -LIMIT..LIMIT on both axes.
LIMIT = 2.5
_MEDIAN_ROWS = 1000


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Low where the logit of a training row [B] is above that of the made row beside it [B]."""
    return functional.softplus(made - real)


def generator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Low where the logit of a made row [B] is above that of the training row beside it [B]."""
    return functional.softplus(real - made)


def gradient_penalty(logits: Tensor, rows: Tensor) -> Tensor:
    """Squared length [B] of the gradient of every row's logit [B] by the row [B, *shape], differentiable."""
    (gradient,) = torch.autograd.grad(logits.sum(), rows, create_graph=True)
    return gradient.square().flatten(1).sum(1)


def squared_mmd(a: Tensor, b: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Unbiased squared MMD between rows a and b [B, D] with the same labels [B], as a share of each row [B].

    The kernel is a mean of Gaussians of BANDWIDTHS times the scale, and 0 between rows of different
    labels: so what differs may be the rows of a class.
    """
    alike = (labels.unsqueeze(0) == labels.unsqueeze(1)).fill_diagonal_(False)
    within = _kernel(a, a, scale) + _kernel(b, b, scale)
    between = _kernel(a, b, scale) + _kernel(b, a, scale)
    return ((within - between) * alike).sum(1) / max(1, len(labels) - 1)


def _kernel(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    distances = torch.cdist(a, b) / scale
    return torch.stack([torch.exp(-0.5 * (distances / share).square()) for share in BANDWIDTHS]).mean(0)


class Generator(nn.Module):
    """Latent and class -> scaled row: a perceptron, then convolutions that double (Radford et al. 2016)."""

    class_shares: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.latent = LATENT_DIMENSIONS[data.spec.kind]
        self.classes, sizes = len(data.spec.class_labels), _sizes(data.spec, preset)
        counts = torch.tensor(data.train.labels).bincount(minlength=self.classes)
        self.register_buffer("class_shares", counts / counts.sum())
        self.label = nn.Embedding(self.classes, self.latent)
        layers: list[nn.Module] = [
            *_perceptron(2 * self.latent, preset),
            nn.Linear(preset.width, math.prod(sizes[-1])),
            nn.Unflatten(1, sizes[-1]),
        ]
        for deep, wide in pairwise(reversed(sizes)):
            layers += [nn.LeakyReLU(SLOPE), nn.ConvTranspose2d(deep[0], wide[0], 4, stride=2, padding=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Scaled rows [B, *shape], at the levels of an image, of latents [B, z] and int64 labels [B]."""
        made: Tensor = self.layers(torch.cat([latent, self.label(label)], 1))
        if not self.levels:
            return made
        image = _from_planes(made, self.shape).tanh()
        rounded = self.scaled(self.value(image))
        # The number is the rounded one, the gradient that of what was rounded.
        return image + (rounded - image).detach()

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows as the networks see them: pixels -1..1, points as they are."""
        return scale_rows(rows, self.levels)

    def value(self, row: Tensor) -> Tensor:
        """Scaled rows as they are served: the nearest integers, uint8, for pixels."""
        return unscale_rows(row, self.levels)

    def draw(self, labels: Tensor) -> Tensor:
        """Scaled rows of these labels [B], of latents drawn by torch."""
        scaled: Tensor = self(torch.randn((len(labels), self.latent), device=labels.device), labels)
        return scaled


class FourierFeatures(nn.Module):
    """Coordinates [B, D] -> themselves, with sines and cosines of random combinations of them.

    Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020): without them
    a perceptron of few coordinates is blind to fine structure.
    """

    frequencies: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", FREQUENCY * torch.randn(dimensions, WAVES))

    def forward(self, point: Tensor) -> Tensor:
        angles = point @ self.frequencies
        return torch.cat([point, angles.sin(), angles.cos()], 1)


class Discriminator(nn.Module):
    """Scaled row and class -> logit: convolutions that halve, a perceptron, a direction for each class."""

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        classes, sizes = len(data.spec.class_labels), _sizes(data.spec, preset)
        self.is_image, seen = data.spec.kind == "image", math.prod(sizes[-1])
        layers: list[nn.Module] = []
        for wide, deep in pairwise(sizes):
            layers += [nn.Conv2d(wide[0], deep[0], 4, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        layers += [nn.Flatten()]
        if not self.is_image:
            layers, seen = [*layers, FourierFeatures(seen)], seen + 2 * WAVES
        self.layers = nn.Sequential(*layers, *_perceptron(seen, preset))
        self.realness = nn.Linear(preset.width, 1)
        self.direction = nn.Embedding(classes, preset.width)
        nn.init.zeros_(self.direction.weight)

    def forward(self, scaled: Tensor, label: Tensor) -> Tensor:
        """Logits [B] of scaled rows [B, *shape] with int64 labels [B]; high means real."""
        features = self.layers(_to_planes(scaled) if self.is_image else scaled)
        logits: Tensor = self.realness(features).squeeze(1) + (self.direction(label) * features).sum(1)
        return logits


def _perceptron(inputs: int, preset: Preset) -> list[nn.Module]:
    widths = [inputs] + [preset.width] * preset.depth
    return [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.LeakyReLU(SLOPE))]


def _sizes(value: DataSpec, preset: Preset) -> list[tuple[int, ...]]:
    """What convolutions halve: [channels, height, width] from the full size down. A vector has one size."""
    if value.kind != "image":
        return [value.tensor.shape]
    height, width, *rest = value.tensor.shape
    sizes, channels = [(math.prod(rest), height, width)], preset.width // CHANNEL_SHARE
    while max(height, width) > LARGEST_SIDE and height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
        sizes.append((channels, height, width))
        channels *= 2
    return list(sizes)


def _to_planes(image: Tensor) -> Tensor:
    return image.unsqueeze(1) if image.dim() == 3 else image.permute(0, 3, 1, 2)


def _from_planes(planes: Tensor, shape: tuple[int, ...]) -> Tensor:
    return planes.squeeze(1) if len(shape) == 2 else planes.permute(0, 2, 3, 1)


class GAN(Network):
    """A generator and the discriminator that it learns from."""

    median_distance: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.generator, self.discriminator = Generator(data, preset), Discriminator(data, preset)
        self.penalty = PENALTY[data.spec.kind]
        some = self.generator.scaled(torch.tensor(data.train.rows[:_MEDIAN_ROWS])).flatten(1)
        self.register_buffer("median_distance", functional.pdist(some).median())

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator[Objective]:
        """The discriminator's loss with its penalties, then the generator's on rows made anew."""
        real = self.generator.scaled(rows)
        with torch.no_grad():
            made = self.generator.draw(labels)
        both = torch.cat([real, made]).requires_grad_()
        logits = self.discriminator(both, torch.cat([labels, labels]))
        on_real, on_made = gradient_penalty(logits, both).chunk(2)
        loss = discriminator_loss(*logits.chunk(2)) + self.penalty / 2 * (on_real + on_made)
        yield Objective(loss, tuple(self.discriminator.parameters()))

        made = self.generator.draw(labels)
        with torch.no_grad():
            beside = self.discriminator(real, labels)
        loss = generator_loss(beside, self.discriminator(made, labels))
        yield Objective(loss, tuple(self.generator.parameters()))

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """What chooses the weights, and trains nothing: squared_mmd of samples with the rows' labels [B]."""
        real, made = self.generator.scaled(rows), self.generator.draw(labels)
        return squared_mmd(real.flatten(1), made.flatten(1), labels, self.median_distance)


class _Part(nn.Module):
    """A module of a program: a function of the trained generator."""

    reached: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("reached", generator.class_shares.cumsum(0)[:-1])

    def value(self, latent: Tensor, label: Tensor, label_noise: Tensor) -> Tensor:
        """The value of a latent, of a class drawn by its frequency where none was asked for."""
        drawn = (label_noise.unsqueeze(1) >= self.reached).long().sum(1)
        classes = self.generator.classes
        return self.generator.value(self.generator(latent, torch.where(label < classes, label, drawn)))


class Sample(_Part):
    """A latent, given or drawn, shrunk by the truncation -> its value."""

    def forward(
        self, latent: Tensor, label: Tensor, truncation: Tensor, latent_noise: Tensor, label_noise: Tensor
    ) -> Tensor:
        latent = torch.where(latent < DRAWN, latent, latent_noise)
        return self.value(latent * truncation.unsqueeze(1), label, label_noise)


class Decode(_Part):
    """latent -> its value."""

    def forward(self, latent: Tensor, label: Tensor, label_noise: Tensor) -> Tensor:
        return self.value(latent, label, label_noise)


def _settings(steps: int, batch_rows: int, learning_rate: float, ema_decay: float = 0.999) -> Settings:
    """No momentum and no decay, as the game is not a descent; the penalties do what clipping would."""
    return Settings(
        steps=steps,
        batch_rows=batch_rows,
        learning_rate=learning_rate,
        weight_decay=0,
        betas=(0.0, 0.99),
        ema_decay=ema_decay,
        clip=math.inf,
    )


# Of the starter and of medium.
POINTS = Preset(
    width=128,
    depth=3,
    training=_settings(steps=4000, batch_rows=256, learning_rate=2e-3, ema_decay=0.995),
    evaluation_rows=10_000,
)


class Family:
    """The GAN as the exporter sees it."""

    name = "gan"
    description = "Class-conditional GAN (Goodfellow et al. 2014) with the loss of R3GAN (Huang et al. 2024)."
    operations = ("sample", "decode")
    unsupported_operations: Mapping[str, str] = {
        "score": "a GAN has no likelihood: its generator has no density to evaluate, and its discriminator "
        "tells real rows from made ones, which is no density either",
        "energy": "its discriminator tells real rows from made ones of its own training, which is no energy; "
        "a GAN has no density",
        "encode": "a generator has no inverse; finding a latent for a row is an optimisation that need not "
        "succeed",
        "reconstruct": "that needs the latent of a row, and a generator has no inverse",
        "classify": "it makes rows of a class, and says nothing of the class of a row",
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
        """An untrained generator and its discriminator."""
        return GAN(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample and decode."""
        assert isinstance(network, GAN)
        return _sample(network.generator, data.spec), _decode(network.generator, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests with and without latents, labels and truncation."""
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
        """How samples compare with test rows, and whether images show the label that they were asked for."""
        draw, count = sampler(interpreter), preset.evaluation_rows
        if data.spec.kind == "vector":
            return [two_sample_test(data, draw, count)]
        judge = SampleEvaluator.train(data, preset.evaluator)
        labels = np.arange(count) % len(data.spec.class_labels)
        rows = make_rows(interpreter.program("sample"), SETS, range(count), inputs={"label": labels})
        labelled = play(interpreter, "sample", rows, "labelled samples")[data.spec.tensor.name]
        return [
            *judge.similarity(draw, count),
            judge.coverage(draw, count),
            judge.agreement(labelled, labels),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """Test rows, samples of every class, and what lies between latents."""
        if data.spec.kind == "vector":
            return _point_panels(interpreter, data)
        classes = min(PICTURED, len(data.spec.class_labels))
        labels = np.repeat(np.arange(classes), PICTURED)
        order = [np.flatnonzero(data.test.labels == label)[:PICTURED] for label in range(classes)]
        return [
            Panel("test images", data.test.rows[np.concatenate(order)]),
            Panel("samples by class", _play(interpreter, "sample", {"label": labels})),
            Panel(
                "between two latents of a class", _play(interpreter, "decode", _paths(interpreter, labels))
            ),
        ]


def _play(interpreter: Interpreter, operation: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    rows = make_rows(interpreter.program(operation), 0, range(len(inputs["label"])), inputs=inputs)
    return interpreter.run(operation, rows)[interpreter.manifest.data_spec.tensor.name]


def _paths(interpreter: Interpreter, labels: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    """For every PICTURED labels as many latents from one draw to another, all equally likely."""
    (dimensions,) = interpreter.program("decode").inputs[0].tensor.shape
    ends = np.random.default_rng(0).standard_normal((2, len(labels) // PICTURED, 1, dimensions))
    angles = np.linspace(0, np.pi / 2, PICTURED)[:, np.newaxis]
    arcs = np.cos(angles) * ends[0] + np.sin(angles) * ends[1]
    return {"label": labels, "latent": arcs.reshape(len(labels), -1).astype(np.float32)}


def _point_panels(interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
    classes, count = len(data.spec.class_labels), len(data.test) // 2
    samples = [
        Scatter(f"samples, {name}", _play(interpreter, "sample", {"label": np.full(count, label)}), LIMIT)
        for label, name in enumerate(data.spec.class_labels)
    ]
    labels = np.repeat(np.arange(classes), 5 * PICTURED)
    between = _play(interpreter, "decode", _paths(interpreter, labels))
    return [
        Scatter("test points", data.test.rows, LIMIT),
        *samples,
        Scatter("between latents", between, LIMIT),
    ]


def _sample(generator: Generator, value: DataSpec) -> Program:
    return Program(
        operation="sample",
        readout=Sample(generator),
        outputs=(value.tensor,),
        doc="Draw latents and classes, as far as they are not given, and decode them.",
        parameters=(
            Parameter(
                "truncation",
                "float",
                1,
                0,
                2,
                doc="factor of every latent, given or drawn; 1 is the model's own, 0 makes samples alike",
            ),
        ),
        inputs=(
            Input(
                TensorSpec(
                    "latent",
                    shape=(generator.latent,),
                    minimum=-DRAWN,
                    maximum=DRAWN,
                    doc=f"standard normal under the model; every element of {DRAWN:g} is drawn",
                ),
                optional=True,
                default=DRAWN,
            ),
            label_input(value, "draws it by the classes' frequency"),
        ),
        noise=(
            Noise("latent_noise", "normal", (generator.latent,), 0, "the latent where none was given"),
            _label_noise(1),
        ),
    )


def _decode(generator: Generator, value: DataSpec) -> Program:
    return Program(
        operation="decode",
        readout=Decode(generator),
        outputs=(value.tensor,),
        doc="The value of a latent: what sample makes of it.",
        inputs=(
            Input(TensorSpec("latent", shape=(generator.latent,), doc="standard normal under the model")),
            label_input(value, "draws it by the classes' frequency"),
        ),
        noise=(_label_noise(1),),
    )


def _label_noise(stream: int) -> Noise:
    return Noise("label_noise", "uniform", (), stream, "draws the class where none was asked for")


FAMILY = Family()
