"""The denoiser D(x, sigma, label): the expected clean row, and the only trained part of the model.

It is preconditioned as in Karras et al. (2022). With the standard deviation s of the data and the network F,

    D = s^2 / (sigma^2 + s^2) x + sigma s / sqrt(sigma^2 + s^2) F(x / sqrt(sigma^2 + s^2), sigma, label).

F is a U-Net for images and a perceptron for points. In training, a part of the labels is dropped (Ho &
Salimans, "Classifier-Free Diffusion Guidance", 2022): the label `num_classes` stands for an unknown class.
Independent of samplers and programs.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.families.diffusion.solvers import broadcast_to_rows
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum
from export.probability.discretized_logistic import scale_rows, unscale_rows
from export.training.trainer import Network

NUM_FREQUENCIES = 16
# The U-Net halves an image until its shorter side has at most this length, or a side is odd.
MIN_SIDE = 4
# By kind of data: mean and standard deviation of log sigma in training, and the probability to drop a label.
LOG_SIGMA = {"image": (-1.2, 1.2), "vector": (-1.5, 1.4)}
LABEL_DROPOUT = {"image": 0.1, "vector": 0.5}


class Conditioning(nn.Module):
    """Embedding of the noise level and the label.

    Maps c_noise = log(sigma) / 4 [B] and int64 labels [B] to features [B, num_features].
    """

    frequencies: Tensor

    def __init__(self, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1.5, NUM_FREQUENCIES))
        self.level = nn.Linear(2 * NUM_FREQUENCIES, num_features)
        self.label = nn.Embedding(num_classes + 1, num_features)

    def forward(self, c_noise: Tensor, label: Tensor) -> Tensor:
        angles = c_noise.unsqueeze(1) * self.frequencies
        return functional.silu(self.level(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label))


class Perceptron(nn.Module):
    """F for points [B, D]: hidden layers, each shifted by the noise level and the label."""

    identity: Tensor

    def __init__(self, dimensions: int, preset: Preset, num_classes: int) -> None:
        super().__init__()
        widths = [dimensions] + [preset.width] * preset.depth
        self.conditioning = Conditioning(num_classes, preset.width)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.shifts = nn.ModuleList(nn.Linear(preset.width, width) for width in widths[1:])
        self.output = nn.Linear(preset.width, dimensions)
        nn.init.zeros_(self.output.weight)
        self.register_buffer("identity", torch.eye(dimensions))

    def forward(self, point: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        features = self.conditioning(c_noise, label)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            point = functional.silu(layer(point) + shift(features))
        output: Tensor = self.output(point)
        return output

    def forward_with_divergence(self, point: Tensor, c_noise: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [B, D] and its divergence with respect to the point [B], by the chain rule."""
        features = self.conditioning(c_noise, label)
        jacobian = self.identity.expand(point.shape[0], -1, -1)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            assert isinstance(layer, nn.Linear)
            activation = layer(point) + shift(features)
            gate = activation.sigmoid()
            point = activation * gate
            jacobian = (jacobian @ layer.weight.T) * (gate * (1 + activation * (1 - gate))).unsqueeze(1)
        diagonal = jacobian @ self.output.weight.T * self.identity
        return self.output(point), batch_invariant_sum(diagonal.flatten(1))


class Block(nn.Module):
    """Residual block with group norm, modulated by the noise level and the label."""

    def __init__(self, inputs: int, outputs: int, num_features: int, dropout: float) -> None:
        super().__init__()
        self.first = nn.Sequential(_group_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(num_features, 2 * outputs)
        self.norm = _group_norm(outputs)
        self.last = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(_last_weight(self.last))

    def forward(self, planes: Tensor, features: Tensor) -> Tensor:
        scale, shift = self.modulation(features)[:, :, None, None].chunk(2, 1)
        residual: Tensor = self.last(self.norm(self.first(planes)) * (1 + scale) + shift)
        skipped: Tensor = self.skip(planes)
        return skipped + residual


def _last_weight(layers: nn.Sequential) -> Tensor:
    """Return the weight of the last layer. With zeros, a block starts as the identity."""
    weight = layers[-1].weight
    assert isinstance(weight, Tensor)
    return weight


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class UNet(nn.Module):
    """F for images (Ronneberger et al. 2015), with `depth` blocks for each resolution."""

    def __init__(self, shape: tuple[int, ...], preset: Preset, num_classes: int) -> None:
        super().__init__()
        num_features, channels = 4 * preset.width, 1 if len(shape) == 2 else shape[2]
        self.conditioning = Conditioning(num_classes, num_features)
        self.first = nn.Conv2d(channels, preset.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = _resolution_widths(preset.width, shape[0], shape[1])
        for fine, coarse in pairwise(widths):
            self.down.append(_build_blocks(fine, fine, num_features, preset))
            self.down.append(nn.Conv2d(fine, coarse, 3, stride=2, padding=1))
            self.up.insert(0, _build_blocks(2 * fine, fine, num_features, preset))
            self.up.insert(0, nn.Conv2d(coarse, fine, 3, padding=1))
        self.middle = _build_blocks(widths[-1], widths[-1], num_features, preset)
        self.last = nn.Sequential(
            _group_norm(preset.width), nn.SiLU(), nn.Conv2d(preset.width, channels, 3, padding=1)
        )
        nn.init.zeros_(_last_weight(self.last))

    def forward(self, image: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        features, is_gray = self.conditioning(c_noise, label), image.dim() == 3
        planes, skips = self.first(image.unsqueeze(1) if is_gray else image.permute(0, 3, 1, 2)), []
        for blocks, downsample in zip(self.down[0::2], self.down[1::2], strict=True):
            planes = _apply_blocks(blocks, planes, features)
            skips.append(planes)
            planes = downsample(planes)
        planes = _apply_blocks(self.middle, planes, features)
        for upsample, blocks in zip(self.up[0::2], self.up[1::2], strict=True):
            planes = upsample(functional.interpolate(planes, scale_factor=2.0, mode="nearest"))
            planes = _apply_blocks(blocks, torch.cat([planes, skips.pop()], 1), features)
        output: Tensor = self.last(planes)
        return output.squeeze(1) if is_gray else output.permute(0, 2, 3, 1)


def _resolution_widths(width: int, *sides: int) -> list[int]:
    """Return the number of channels at each resolution, from the finest to the coarsest."""
    widths = [width]
    while min(sides) > MIN_SIDE and all(side % 2 == 0 for side in sides):
        widths.append(2 * width)
        sides = tuple(side // 2 for side in sides)
    return widths


def _build_blocks(inputs: int, outputs: int, num_features: int, preset: Preset) -> nn.ModuleList:
    widths = [inputs] + [outputs] * preset.depth
    return nn.ModuleList(
        Block(before, after, num_features, preset.dropout) for before, after in pairwise(widths)
    )


def _apply_blocks(blocks: nn.Module, planes: Tensor, features: Tensor) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        planes = block(planes, features)
    return planes


class Denoiser(Network):
    """D over scaled rows: pixels scaled to -1..1, points unchanged. The label `num_classes` means unknown."""

    class_frequencies: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions, self.num_classes = math.prod(self.shape), len(data.spec.class_labels)
        self.log_sigma, self.label_dropout = LOG_SIGMA[data.spec.kind], LABEL_DROPOUT[data.spec.kind]
        self.data_std = float(self.scale(torch.from_numpy(data.train.rows)).std())
        counts = torch.tensor(data.train.labels).bincount(minlength=self.num_classes)
        self.register_buffer("class_frequencies", counts / counts.sum())
        self.network = (
            UNet(self.shape, preset, self.num_classes)
            if self.num_levels
            else Perceptron(self.dimensions, preset, self.num_classes)
        )

    def scale(self, rows: Tensor) -> Tensor:
        """Scale integers 0..num_levels-1 to float32 -1..1; return points unchanged."""
        return scale_rows(rows, self.num_levels)

    def unscale(self, scaled: Tensor) -> Tensor:
        """Round scaled pixels to the nearest uint8 levels, inverting `scale`; return points unchanged."""
        return unscale_rows(scaled, self.num_levels)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Return the denoised rows [B, *shape] of x [B, *shape] at sigma [B], with int64 labels [B]."""
        sigma_of_rows, data_std = broadcast_to_rows(sigma, x), self.data_std
        norm = torch.sqrt(sigma_of_rows.square() + data_std**2)
        output = self.raw_output(x / norm, sigma, label)
        return x * (data_std / norm).square() + output * (sigma_of_rows * data_std / norm)

    def raw_output(self, normalized: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Return F [B, *shape] of rows [B, *shape] divided by sqrt(sigma^2 + s^2)."""
        output: Tensor = self.network(normalized, batch_invariant_map(torch.log, sigma) / 4, label)
        return output

    def raw_output_with_divergence(
        self, normalized: Tensor, sigma: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return F [B, D] of points [B, D] divided by sqrt(sigma^2 + s^2), and the divergence of F [B]."""
        assert isinstance(self.network, Perceptron)
        c_noise = batch_invariant_map(torch.log, sigma) / 4
        return self.network.forward_with_divergence(normalized, c_noise, label)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted squared error at a random noise level (Karras et al., Table 1), [B]."""
        clean, (mean, std) = self.scale(rows), self.log_sigma
        uniform = torch.rand(len(rows), device=rows.device)
        labels = torch.where(uniform < self.label_dropout, torch.full_like(labels, self.num_classes), labels)
        sigma = (mean + std * torch.randn(len(rows), device=rows.device)).exp()
        denoised = self(clean + broadcast_to_rows(sigma, clean) * torch.randn_like(clean), sigma, labels)
        weight = (sigma.square() + self.data_std**2) / (sigma * self.data_std).square()
        error: Tensor = (denoised - clean).square().flatten(1).mean(1)
        return weight * error
