"""The denoiser, which is all that is learned: D(x, sigma, label), the expected clean row.

Preconditioned as in Karras et al. (2022): with the data's spread s and F the network,

    D = s^2 / (sigma^2 + s^2) x + sigma s / sqrt(sigma^2 + s^2) F(x / sqrt(sigma^2 + s^2), sigma, label).

Images pass through a U-Net, points through a perceptron. A share of the training rows has its label
dropped (Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022), so one label more than there are
classes stands for any of them. Knows no sampler and no program.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.families.diffusion.solvers import per_row
from export.probability.batch_invariant_ops import batch_invariant_map, batch_invariant_sum
from export.probability.discretized_logistic import scale_rows, unscale_rows
from export.training.trainer import Network

FREQUENCIES = 16
# Images are halved until a side is no longer than this, or odd.
SMALLEST_SIDE = 4
# By kind of value: mean and spread of log sigma in training, and the share of rows whose label is dropped.
LOG_SIGMA = {"image": (-1.2, 1.2), "vector": (-1.5, 1.4)}
DROPPED = {"image": 0.1, "vector": 0.5}


class Condition(nn.Module):
    """Logarithm of the noise level [B] and label [B] -> features [B, conditions]."""

    frequencies: Tensor

    def __init__(self, classes: int, conditions: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1.5, FREQUENCIES))
        self.level = nn.Linear(2 * FREQUENCIES, conditions)
        self.label = nn.Embedding(classes + 1, conditions)

    def forward(self, level: Tensor, label: Tensor) -> Tensor:
        angles = level.unsqueeze(1) * self.frequencies
        return functional.silu(self.level(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label))


class Perceptron(nn.Module):
    """For points: hidden layers that are shifted by the noise level and the label."""

    axes: Tensor

    def __init__(self, dimensions: int, preset: Preset, classes: int) -> None:
        super().__init__()
        widths = [dimensions] + [preset.width] * preset.depth
        self.condition = Condition(classes, preset.width)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.shifts = nn.ModuleList(nn.Linear(preset.width, width) for width in widths[1:])
        self.exit = nn.Linear(preset.width, dimensions)
        nn.init.zeros_(self.exit.weight)
        self.register_buffer("axes", torch.eye(dimensions))

    def forward(self, point: Tensor, level: Tensor, label: Tensor) -> Tensor:
        condition = self.condition(level, label)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            point = functional.silu(layer(point) + shift(condition))
        estimate: Tensor = self.exit(point)
        return estimate

    def divergence(self, point: Tensor, level: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate [B, D], and the sum [B] of its slopes along each coordinate, by the chain rule."""
        condition = self.condition(level, label)
        slopes = self.axes.expand(point.shape[0], -1, -1)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            assert isinstance(layer, nn.Linear)
            before = layer(point) + shift(condition)
            share = before.sigmoid()
            point = before * share
            slopes = (slopes @ layer.weight.T) * (share * (1 + before * (1 - share))).unsqueeze(1)
        return self.exit(point), batch_invariant_sum((slopes @ self.exit.weight.T * self.axes).flatten(1))


class Block(nn.Module):
    """Residual block with group normalisation, modulated by the noise level and the label."""

    def __init__(self, inputs: int, outputs: int, conditions: int, dropout: float) -> None:
        super().__init__()
        self.entry = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(conditions, 2 * outputs)
        self.norm = _norm(outputs)
        self.exit = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(_last(self.exit))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        change: Tensor = self.exit(self.norm(self.entry(features)) * (1 + scale) + shift)
        kept: Tensor = self.skip(features)
        return kept + change


def _last(layers: nn.Sequential) -> Tensor:
    """The weight of the last layer; zero, it makes a block begin as the identity."""
    weight = layers[-1].weight
    assert isinstance(weight, Tensor)
    return weight


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class UNet(nn.Module):
    """For images (Ronneberger et al. 2015): halves them while it can, `depth` blocks a size, and back."""

    def __init__(self, shape: tuple[int, ...], preset: Preset, classes: int) -> None:
        super().__init__()
        conditions, channels = 4 * preset.width, 1 if len(shape) == 2 else shape[2]
        self.condition = Condition(classes, conditions)
        self.entry = nn.Conv2d(channels, preset.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = _widths(preset.width, shape[0], shape[1])
        for wide, deep in pairwise(widths):
            self.down.append(_blocks(wide, wide, conditions, preset))
            self.down.append(nn.Conv2d(wide, deep, 3, stride=2, padding=1))
            self.up.insert(0, _blocks(2 * wide, wide, conditions, preset))
            self.up.insert(0, nn.Conv2d(deep, wide, 3, padding=1))
        self.middle = _blocks(widths[-1], widths[-1], conditions, preset)
        self.exit = nn.Sequential(
            _norm(preset.width), nn.SiLU(), nn.Conv2d(preset.width, channels, 3, padding=1)
        )
        nn.init.zeros_(_last(self.exit))

    def forward(self, image: Tensor, level: Tensor, label: Tensor) -> Tensor:
        condition, grey = self.condition(level, label), image.dim() == 3
        features, skips = self.entry(image.unsqueeze(1) if grey else image.permute(0, 3, 1, 2)), []
        for blocks, halve in zip(self.down[0::2], self.down[1::2], strict=True):
            features = _through(blocks, features, condition)
            skips.append(features)
            features = halve(features)
        features = _through(self.middle, features, condition)
        for double, blocks in zip(self.up[0::2], self.up[1::2], strict=True):
            features = double(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
            features = _through(blocks, torch.cat([features, skips.pop()], 1), condition)
        planes: Tensor = self.exit(features)
        return planes.squeeze(1) if grey else planes.permute(0, 2, 3, 1)


def _widths(width: int, *sides: int) -> list[int]:
    widths = [width]
    while min(sides) > SMALLEST_SIDE and all(side % 2 == 0 for side in sides):
        widths.append(2 * width)
        sides = tuple(side // 2 for side in sides)
    return widths


def _blocks(inputs: int, outputs: int, conditions: int, preset: Preset) -> nn.ModuleList:
    sizes = [inputs] + [outputs] * preset.depth
    return nn.ModuleList(Block(a, b, conditions, preset.dropout) for a, b in pairwise(sizes))


def _through(blocks: nn.Module, features: Tensor, condition: Tensor) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        features = block(features, condition)
    return features


class Denoiser(Network):
    """D over scaled rows: points as they are, pixels scaled to -1..1. The label `classes` means any."""

    class_shares: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions, self.classes = math.prod(self.shape), len(data.spec.class_labels)
        self.log_sigma, self.dropped = LOG_SIGMA[data.spec.kind], DROPPED[data.spec.kind]
        self.data_std = float(self.scale(torch.from_numpy(data.train.rows)).std())
        counts = torch.tensor(data.train.labels).bincount(minlength=self.classes)
        self.register_buffer("class_shares", counts / counts.sum())
        self.network = (
            UNet(self.shape, preset, self.classes)
            if self.levels
            else Perceptron(self.dimensions, preset, self.classes)
        )

    def scale(self, rows: Tensor) -> Tensor:
        """Values as D takes them: integers 0..levels-1 as numbers -1..1, points as they are."""
        return scale_rows(rows, self.levels)

    def value(self, row: Tensor) -> Tensor:
        """The reverse of scale: pixels as the nearest integers, uint8."""
        return unscale_rows(row, self.levels)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Denoised rows [B, *shape] of x [B, *shape] at sigma [B] with int64 labels [B]."""
        level, spread = per_row(sigma, x), self.data_std
        norm = torch.sqrt(level.square() + spread**2)
        estimate = self.estimate(x / norm, sigma, label)
        return x * (spread / norm).square() + estimate * (level * spread / norm)

    def estimate(self, normed: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """F of rows [B, *shape] divided by sqrt(sigma^2 + s^2)."""
        estimate: Tensor = self.network(normed, batch_invariant_map(torch.log, sigma) / 4, label)
        return estimate

    def divergence(self, normed: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """F of points [B, D] divided by sqrt(sigma^2 + s^2), and its divergence [B]."""
        assert isinstance(self.network, Perceptron)
        return self.network.divergence(normed, batch_invariant_map(torch.log, sigma) / 4, label)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Weighted squared error at a random noise level (Karras et al., Table 1) [B]."""
        clean, (mean, std) = self.scale(rows), self.log_sigma
        chance = torch.rand(len(rows), device=rows.device)
        labels = torch.where(chance < self.dropped, torch.full_like(labels, self.classes), labels)
        sigma = (mean + std * torch.randn(len(rows), device=rows.device)).exp()
        denoised = self(clean + per_row(sigma, clean) * torch.randn_like(clean), sigma, labels)
        weight = (sigma.square() + self.data_std**2) / (sigma * self.data_std).square()
        error: Tensor = (denoised - clean).square().flatten(1).mean(1)
        return weight * error
