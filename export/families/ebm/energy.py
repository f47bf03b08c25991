"""The energy E(x) = -log q(x) + f(x) and its gradient: the trained part of the model.

q is a base density and f a network. f is trained to separate data from draws of q: -f(x) - log(NOISE_RATIO)
are the log-odds that x is data (Gutmann & Hyvarinen, "Noise-contrastive estimation of unnormalized
statistical models", 2012), so Z is near 1 after training. The gradient is computed layer by layer, so that
it is part of the graphs. Independent of Markov chains and programs.
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

# Noise rows for each data row in the loss.
NOISE_RATIO = 2
# Standard deviation of the base density of points.
POINT_BASE_STD = 1.5
# Standard deviation of the noise on scaled pixels.
SMOOTHING_STD = 0.1
# Additional standard deviation of the base of images: the network needs noise on all sides of the data.
BASE_EXTRA_STD = 0.1
# Rank of each component of the base of images.
BASE_RANK = 48
NUM_FEATURES = 128
# Default step size of chains: for images as a fraction of SMOOTHING_STD^2, the scale of the finest structure.
IMAGE_STEP_FRACTION, POINT_STEP_SIZE = 0.4, 0.005


class Layer(nn.Module):
    """Differentiable function with an explicit vector-Jacobian product."""

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient with respect to the input x, given the gradient with respect to the output."""
        raise NotImplementedError


class Dense(Layer):
    """Linear layer [B, inputs] -> [B, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ self.linear.weight


class Convolution(Layer):
    """3x3 convolution with padding 1, for planes of size [height, width]."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        # Rows and columns at the far edges that the stride skips; without them the gradient would be too
        # small.
        self.output_padding = tuple((length - 1) % stride for length in size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(x)
        return y

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        return functional.conv_transpose2d(
            gradient,
            self.convolution.weight,
            None,
            self.convolution.stride,
            1,
            output_padding=self.output_padding,
        )


class Silu(Layer):
    """SiLU, x sigmoid(x) (Elfwing et al. 2018). It is smooth, as Langevin dynamics requires."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        gate = x.sigmoid()
        return gradient * gate * (1 + x * (1 - gate))


class ToPlanes(Layer):
    """Reshaping of pixels [B, D] to planes [B, channels, height, width]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (*shape, 1)[:3]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).permute(0, 3, 1, 2)

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.permute(0, 2, 3, 1).flatten(1)


class Flatten(Layer):
    """Reshaping of planes [B, channels, height, width] to features [B, channels * height * width]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def vjp(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, *self.shape)


class Tilt(nn.Module):
    """Network f from rows [B, D] to numbers [B]. It is 0 before training."""

    def __init__(self, layers: Sequence[Layer], num_features: int) -> None:
        super().__init__()
        last = Dense(num_features, 1)
        nn.init.zeros_(last.linear.weight)
        nn.init.zeros_(last.linear.bias)
        self.layers = nn.ModuleList([*layers, last])

    @classmethod
    def for_points(cls, dimensions: int, preset: Preset) -> "Tilt":
        """Return a perceptron with `depth` hidden layers."""
        widths = [dimensions] + [preset.width] * preset.depth
        layers = [layer for inputs, outputs in pairwise(widths) for layer in (Dense(inputs, outputs), Silu())]
        return cls(layers, preset.width)

    @classmethod
    def for_images(cls, shape: tuple[int, ...], preset: Preset) -> "Tilt":
        """Return `depth` convolutions that halve the image and double the channels, and a hidden layer."""
        height, width, channels = (*shape, 1)[:3]
        layers: list[Layer] = [
            ToPlanes(shape),
            Convolution(channels, preset.width, (height, width), 1),
            Silu(),
        ]
        planes = preset.width
        for _ in range(preset.depth):
            layers += [Convolution(planes, 2 * planes, (height, width), 2), Silu()]
            height, width, planes = (height + 1) // 2, (width + 1) // 2, 2 * planes
        layers += [
            Flatten((planes, height, width)),
            Dense(planes * height * width, NUM_FEATURES),
            Silu(),
        ]
        return cls(layers, NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return f(x) [B] and its gradient [B, D], by the chain rule over the layers."""
        inputs: list[tuple[Layer, Tensor]] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            inputs.append((layer, x))
            x = layer(x)
        gradient = torch.ones_like(x)
        for layer, layer_input in reversed(inputs):
            gradient = layer.vjp(layer_input, gradient)
        return x.squeeze(1), gradient


class EnergyModel(Network):
    """E over coordinates [B, D]: the values of points, or scaled and noisy pixels."""

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = math.prod(self.shape)
        self.smoothing_std = SMOOTHING_STD if self.num_levels else 0.0
        self.num_chains = preset.evaluation_rows
        self.base = self._build_base(data)
        self.tilt = (
            Tilt.for_images(self.shape, preset)
            if self.num_levels
            else Tilt.for_points(self.dimensions, preset)
        )

    @property
    def step_size(self) -> float:
        """Default step size of chains, on the scale of the square of the finest structure."""
        return IMAGE_STEP_FRACTION * self.smoothing_std**2 if self.smoothing_std else POINT_STEP_SIZE

    @property
    def coordinate_space(self) -> str:
        """Description of the coordinates."""
        if not self.smoothing_std:
            return "the point itself"
        return (
            f"pixels scaled to -1..1 with normal noise of standard deviation {self.smoothing_std:g} on each"
        )

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return E(x) [B] in nats and its gradient [B, D]."""
        (base, base_gradient), (tilt, tilt_gradient) = self.base.energy(x), self.tilt.energy(x)
        return base + tilt, base_gradient + tilt_gradient

    def to_coordinates(self, rows: Tensor) -> Tensor:
        """Convert rows [B, *shape] to coordinates [B, D], without noise."""
        return scale_rows(rows.flatten(1), self.num_levels)

    def to_rows(self, x: Tensor) -> Tensor:
        """Convert coordinates [B, D] to rows [B, *shape]; pixels are rounded to the nearest uint8 levels."""
        return unscale_rows(x, self.num_levels).reshape(-1, *self.shape)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the contrastive loss of each row and its noise rows, in nats [B]."""
        clean = self.to_coordinates(rows)
        x = clean + self.smoothing_std * torch.randn_like(clean)
        noise = self.base.sample(NOISE_RATIO * len(x))
        return contrastive_loss(self.tilt(x), self.tilt(noise).reshape(NOISE_RATIO, -1))

    def _build_base(self, data: Dataset) -> PpcaMixture:
        if not self.num_levels:
            return PpcaMixture.isotropic(self.dimensions, POINT_BASE_STD)
        return PpcaMixture.fit(
            self.to_coordinates(torch.from_numpy(data.train.rows)),
            torch.from_numpy(data.train.labels),
            BASE_RANK,
            math.hypot(self.smoothing_std, BASE_EXTRA_STD),
        )


def contrastive_loss(f_data: Tensor, f_noise: Tensor) -> Tensor:
    """Return the cross-entropy of classifying rows as data or noise, in nats [B].

    Args:
        f_data: f of data rows [B].
        f_noise: f of noise rows [NOISE_RATIO, B].
    """
    log_ratio = math.log(NOISE_RATIO)
    return functional.softplus(f_data + log_ratio) + functional.softplus(-f_noise - log_ratio).sum(0)


class ModelModule(nn.Module):
    """Base of the program modules that use the trained model."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model
