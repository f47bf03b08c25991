"""The energy, which is all that is learned: E(x) = -log q(x) + f(x), and its gradient.

q is a base density and f a network, learned by telling data from draws of q: -f(x) - log(NOISE_SHARE) are
the log-odds that x is data (Gutmann & Hyvarinen, "Noise-contrastive estimation of unnormalized statistical
models", 2012), so that Z comes out near 1. The gradient is written out, layer by layer, so that it is part
of the graphs. Knows no chain and no program.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.probability.discretized_logistic import scale_rows, unscale_rows
from export.probability.ppca_mixture import PpcaMixture
from export.training.trainer import Network

NOISE_SHARE = 2
POINT_NOISE = 1.5
SMOOTHING = 0.1
# Of the base beyond the rows it is fitted to: the network needs noise on every side of the data.
WIDENING = 0.1
RANK = 48
FEATURES = 128
# Of chains: on images in shares of SMOOTHING^2, which is the square of their finest structure.
STEP_SHARE, POINT_STEP_SIZE = 0.4, 0.005


class Layer(nn.Module):
    """A differentiable function that knows its own chain rule."""

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by the input x, from the gradient by the output."""
        raise NotImplementedError


class Dense(Layer):
    """A linear layer [B, inputs] -> [B, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ self.linear.weight


class Convolution(Layer):
    """A 3x3 convolution of planes of a known size, padded by one."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        # What a stride leaves over at the far edges, without which the planes would come back smaller.
        self.left_over = tuple((length - 1) % stride for length in size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(x)
        return y

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        forward = self.convolution
        return functional.conv_transpose2d(
            gradient, forward.weight, None, forward.stride, 1, output_padding=self.left_over
        )


class Swish(Layer):
    """SiLU, x sigmoid(x) (Elfwing et al. 2018): smooth, as a chain's ground has to be."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        share = x.sigmoid()
        return gradient * share * (1 + x * (1 - share))


class Planes(Layer):
    """Pixels [B, D] as planes [B, channels, height, width]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (*shape, 1)[:3]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).permute(0, 3, 1, 2)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.permute(0, 2, 3, 1).flatten(1)


class Flat(Layer):
    """Planes [B, channels, height, width] as features [B, channels * height * width]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, *self.shape)


class Tilt(nn.Module):
    """The network f from rows [B, D] to numbers [B], at first 0."""

    def __init__(self, layers: Sequence[Layer], features: int) -> None:
        super().__init__()
        last = Dense(features, 1)
        nn.init.zeros_(last.linear.weight)
        nn.init.zeros_(last.linear.bias)
        self.layers = nn.ModuleList([*layers, last])

    @classmethod
    def of_points(cls, dimensions: int, preset: Preset) -> "Tilt":
        """A perceptron of `depth` hidden layers."""
        widths = [dimensions] + [preset.width] * preset.depth
        layers = [layer for a, b in pairwise(widths) for layer in (Dense(a, b), Swish())]
        return cls(layers, preset.width)

    @classmethod
    def of_images(cls, shape: tuple[int, ...], preset: Preset) -> "Tilt":
        """Convolutions that halve the image `depth` times and double the planes, and a hidden layer."""
        height, width, channels = (*shape, 1)[:3]
        layers: list[Layer] = [
            Planes(shape),
            Convolution(channels, preset.width, (height, width), 1),
            Swish(),
        ]
        planes = preset.width
        for _ in range(preset.depth):
            layers += [Convolution(planes, 2 * planes, (height, width), 2), Swish()]
            height, width, planes = (height + 1) // 2, (width + 1) // 2, 2 * planes
        layers += [Flat((planes, height, width)), Dense(planes * height * width, FEATURES), Swish()]
        return cls(layers, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) [B] and its gradient [B, D], by the chain rule written out."""
        passed: list[tuple[Layer, Tensor]] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            passed.append((layer, x))
            x = layer(x)
        gradient = torch.ones_like(x)
        for layer, given in reversed(passed):
            gradient = layer.pull(given, gradient)
        return x.squeeze(1), gradient


class EnergyModel(Network):
    """E over coordinates [B, D]: the values of points, and pixels scaled to -1..1 with noise on them."""

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = math.prod(self.shape)
        self.smoothing = SMOOTHING if self.levels else 0.0
        self.chains = preset.evaluation_rows
        self.base = self._base(data)
        self.tilt = (
            Tilt.of_images(self.shape, preset) if self.levels else Tilt.of_points(self.dimensions, preset)
        )

    @property
    def step_size(self) -> float:
        """Of a chain, unless another is asked for: of the order of the square of the finest structure."""
        return STEP_SHARE * self.smoothing**2 if self.smoothing else POINT_STEP_SIZE

    @property
    def space(self) -> str:
        """What the coordinates are."""
        if not self.smoothing:
            return "the point itself"
        return f"pixels scaled to -1..1 with normal noise of standard deviation {self.smoothing:g} on each"

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) [B] in nats and its gradient [B, D]."""
        (base, base_gradient), (tilt, tilt_gradient) = self.base.energy(x), self.tilt.energy(x)
        return base + tilt, base_gradient + tilt_gradient

    def coordinates(self, rows: Tensor) -> Tensor:
        """Rows [B, *shape] as coordinates [B, D], without noise."""
        return scale_rows(rows.flatten(1), self.levels)

    def value(self, x: Tensor) -> Tensor:
        """Coordinates [B, D] as values [B, *shape]: points as they are, pixels as the nearest integers."""
        return unscale_rows(x, self.levels).reshape(-1, *self.shape)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """How badly f tells each row from the noise drawn for it, in nats [B]."""
        clean = self.coordinates(rows)
        x = clean + self.smoothing * torch.randn_like(clean)
        noise = self.base.sample(NOISE_SHARE * len(x))
        return contrastive_loss(self.tilt(x), self.tilt(noise).reshape(NOISE_SHARE, -1))

    def _base(self, data: Dataset) -> PpcaMixture:
        if not self.levels:
            return PpcaMixture.isotropic(self.dimensions, POINT_NOISE)
        rows = self.coordinates(torch.from_numpy(data.train.rows))
        return PpcaMixture.fit(
            rows, torch.from_numpy(data.train.labels), RANK, math.hypot(self.smoothing, WIDENING)
        )


def contrastive_loss(on_data: Tensor, on_noise: Tensor) -> Tensor:
    """Cross-entropy of telling data from noise [B], by f on data [B] and on its noise [NOISE_SHARE, B]."""
    log_share = math.log(NOISE_SHARE)
    return functional.softplus(on_data + log_share) + functional.softplus(-on_noise - log_share).sum(0)


class Part(nn.Module):
    """A module of a program: a function of the trained model."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model
