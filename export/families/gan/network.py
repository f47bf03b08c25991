"""The networks of the GAN: generator, discriminator and their training objectives.

Shapes: B rows, Z latent dimensions, `shape` of a row.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.families.gan.losses import discriminator_loss, generator_loss, gradient_penalty, squared_mmd
from export.graphs.program import DataSpec
from export.probability.discretized_logistic import scale_rows, unscale_rows
from export.training.trainer import Network, Objective

# Z, by the kind of the data.
LATENT_DIMENSIONS = {"image": 32, "vector": 4}
# gamma of the gradient penalty, by the kind of the data.
PENALTY_WEIGHTS = {"image": 0.5, "vector": 0.001}
# Convolutions halve an image until its sides are at most MAX_DENSE_SIDE. A perceptron processes the result.
MAX_DENSE_SIDE = 8
# Units of the perceptron for each channel of the first convolution.
UNITS_PER_CHANNEL = 16
# Slope of the leaky rectifiers below 0.
LEAKY_SLOPE = 0.2
# Random Fourier features of points: their number, and the standard deviation of their frequencies.
NUM_FREQUENCIES, FREQUENCY_STD = 64, 4.0
# Training rows from which the median distance is computed.
_MEDIAN_ROWS = 1000


class Generator(nn.Module):
    """Latent and class -> scaled row: a perceptron, then convolutions that double (Radford et al. 2016).

    A scaled row has pixels in -1..1; points are not scaled.
    """

    class_weights: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.latent_dimensions = LATENT_DIMENSIONS[data.spec.kind]
        self.num_classes, sizes = len(data.spec.class_labels), _layer_shapes(data.spec, preset)
        counts = torch.tensor(data.train.labels).bincount(minlength=self.num_classes)
        self.register_buffer("class_weights", counts / counts.sum())
        self.label_embedding = nn.Embedding(self.num_classes, self.latent_dimensions)
        layers: list[nn.Module] = [
            *_perceptron(2 * self.latent_dimensions, preset),
            nn.Linear(preset.width, math.prod(sizes[-1])),
            nn.Unflatten(1, sizes[-1]),
        ]
        for small, large in pairwise(reversed(sizes)):
            layers += [
                nn.LeakyReLU(LEAKY_SLOPE),
                nn.ConvTranspose2d(small[0], large[0], 4, stride=2, padding=1),
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        """Return scaled rows [B, *shape] of latents [B, Z] and int64 labels [B].

        Pixels are rounded to the levels of the data; their gradient is that of the values before rounding.
        """
        outputs: Tensor = self.layers(torch.cat([latent, self.label_embedding(label)], 1))
        if not self.num_levels:
            return outputs
        image = _from_channels_first(outputs, self.shape).tanh()
        rounded = self.scale(self.to_rows(image))
        return image + (rounded - image).detach()

    def scale(self, rows: Tensor) -> Tensor:
        """Return rows [B, *shape] as scaled rows."""
        return scale_rows(rows, self.num_levels)

    def to_rows(self, scaled: Tensor) -> Tensor:
        """Return scaled rows [B, *shape] as rows of the data: pixels as the nearest level, uint8."""
        return unscale_rows(scaled, self.num_levels)

    def sample(self, labels: Tensor) -> Tensor:
        """Return scaled rows [B, *shape] for int64 labels [B], with latents from torch's random generator."""
        latents = torch.randn((len(labels), self.latent_dimensions), device=labels.device)
        scaled: Tensor = self(latents, labels)
        return scaled


class FourierFeatures(nn.Module):
    """Points x [B, D] -> [x, sin(x W), cos(x W)], [B, D + 2 * NUM_FREQUENCIES], with random frequencies W.

    Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions" (2020): a perceptron of
    few coordinates does not learn fine structure without them.
    """

    frequencies: Tensor

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", FREQUENCY_STD * torch.randn(dimensions, NUM_FREQUENCIES))

    def forward(self, point: Tensor) -> Tensor:
        angles = point @ self.frequencies
        return torch.cat([point, angles.sin(), angles.cos()], 1)


class Discriminator(nn.Module):
    """Scaled row and class -> logit, which is high for training rows.

    Convolutions halve an image, and a perceptron computes features phi(x) of width units. The class enters by
    projection (Miyato & Koyama 2018): D(x, label) = w . phi(x) + b + e[label] . phi(x).
    """

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        classes, sizes = len(data.spec.class_labels), _layer_shapes(data.spec, preset)
        self.is_image, num_features = data.spec.kind == "image", math.prod(sizes[-1])
        layers: list[nn.Module] = []
        for large, small in pairwise(sizes):
            layers += [
                nn.Conv2d(large[0], small[0], 4, stride=2, padding=1),
                nn.LeakyReLU(LEAKY_SLOPE),
            ]
        layers += [nn.Flatten()]
        if not self.is_image:
            layers.append(FourierFeatures(num_features))
            num_features += 2 * NUM_FREQUENCIES
        self.layers = nn.Sequential(*layers, *_perceptron(num_features, preset))
        self.logit = nn.Linear(preset.width, 1)
        self.label_embedding = nn.Embedding(classes, preset.width)
        nn.init.zeros_(self.label_embedding.weight)

    def forward(self, scaled: Tensor, label: Tensor) -> Tensor:
        """Return logits [B] of scaled rows [B, *shape] with int64 labels [B]."""
        features = self.layers(_to_channels_first(scaled) if self.is_image else scaled)
        projection = (self.label_embedding(label) * features).sum(1)
        logits: Tensor = self.logit(features).squeeze(1) + projection
        return logits


def _perceptron(inputs: int, preset: Preset) -> list[nn.Module]:
    widths = [inputs] + [preset.width] * preset.depth
    return [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.LeakyReLU(LEAKY_SLOPE))]


def _layer_shapes(data_spec: DataSpec, preset: Preset) -> list[tuple[int, ...]]:
    """Return the shapes between the convolutions, [channels, height, width], the largest first.

    For points there are no convolutions, and the only shape is that of a row.
    """
    if data_spec.kind != "image":
        return [data_spec.tensor.shape]
    height, width, *rest = data_spec.tensor.shape
    shapes, channels = [(math.prod(rest), height, width)], preset.width // UNITS_PER_CHANNEL
    while max(height, width) > MAX_DENSE_SIDE and height % 2 == width % 2 == 0:
        height, width = height // 2, width // 2
        shapes.append((channels, height, width))
        channels *= 2
    return list(shapes)


def _to_channels_first(image: Tensor) -> Tensor:
    """Return images [B, H, W] or [B, H, W, C] as [B, C, H, W]."""
    return image.unsqueeze(1) if image.dim() == 3 else image.permute(0, 3, 1, 2)


def _from_channels_first(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return images [B, C, H, W] as [B, *shape]."""
    return image.squeeze(1) if len(shape) == 2 else image.permute(0, 2, 3, 1)


class GAN(Network):
    """A generator and the discriminator that trains it."""

    median_distance: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.generator, self.discriminator = Generator(data, preset), Discriminator(data, preset)
        self.penalty_weight = PENALTY_WEIGHTS[data.spec.kind]
        rows = self.generator.scale(torch.tensor(data.train.rows[:_MEDIAN_ROWS])).flatten(1)
        self.register_buffer("median_distance", functional.pdist(rows).median())

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator[Objective]:
        """Yield the discriminator's loss with its penalties, then the generator's loss on new samples.

        Args:
            rows: [B, *shape].
            labels: int64 [B].
        """
        real = self.generator.scale(rows)
        with torch.no_grad():
            generated = self.generator.sample(labels)
        both = torch.cat([real, generated]).requires_grad_()
        logits = self.discriminator(both, torch.cat([labels, labels]))
        real_penalty, generated_penalty = gradient_penalty(logits, both).chunk(2)
        penalty = self.penalty_weight / 2 * (real_penalty + generated_penalty)
        loss = discriminator_loss(*logits.chunk(2)) + penalty
        yield Objective(loss, tuple(self.discriminator.parameters()))

        generated = self.generator.sample(labels)
        with torch.no_grad():
            real_logits = self.discriminator(real, labels)
        loss = generator_loss(real_logits, self.discriminator(generated, labels))
        yield Objective(loss, tuple(self.generator.parameters()))

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the squared MMD between rows and samples of the same labels, as one term for each row [B].

        It selects the weights to keep. No parameter is trained with it.
        """
        real, generated = self.generator.scale(rows), self.generator.sample(labels)
        return squared_mmd(real.flatten(1), generated.flatten(1), labels, self.median_distance)
