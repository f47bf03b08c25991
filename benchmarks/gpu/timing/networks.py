"""U-Net of 35 million parameters (Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020).

It has the usual size of a diffusion model of images of 32 x 32 pixels. Weights are random: speed does not
depend on training.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS, SIDE, NUM_CLASSES = 3, 32, 10
WIDTH = 128
# Channels at 32, 16, 8 and 4 pixels, as multiples of the width.
MULTIPLES = (1, 2, 2, 2)
BLOCKS = 2
ATTENTION_SIDES = (16, 8)
HEAD_CHANNELS = 64
GROUPS, GROUP_CHANNELS = 32, 4


class Conditioning(nn.Module):
    """Embedding of times [B] in 0..1 and int64 labels [B] as features [B, num_features]."""

    frequencies: Tensor

    def __init__(self, width: int, num_features: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 1000 * torch.logspace(0, -4, width // 2))
        self.time = nn.Sequential(
            nn.Linear(width, num_features), nn.SiLU(), nn.Linear(num_features, num_features)
        )
        self.label = nn.Embedding(NUM_CLASSES, num_features)

    def forward(self, time: Tensor, label: Tensor) -> Tensor:
        angles = time.unsqueeze(1) * self.frequencies
        features: Tensor = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        activated: Tensor = functional.silu(features)
        return activated


class Block(nn.Module):
    """Residual block: two convolutions with group norm, shifted by the features."""

    def __init__(self, inputs: int, outputs: int, num_features: int) -> None:
        super().__init__()
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.shift = nn.Linear(num_features, outputs)
        self.last = nn.Sequential(_norm(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, planes: Tensor, features: Tensor) -> Tensor:
        shifted: Tensor = self.first(planes) + self.shift(features)[:, :, None, None]
        skipped: Tensor = self.skip(planes)
        residual: Tensor = self.last(shifted)
        return skipped + residual


class Attention(nn.Module):
    """Self-attention over the pixels of a row, in heads of HEAD_CHANNELS channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // HEAD_CHANNELS)
        self.scale = 1 / math.sqrt(channels // self.heads)
        self.norm = _norm(channels)
        self.project = nn.Conv2d(channels, 3 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)

    def forward(self, planes: Tensor) -> Tensor:
        side = planes.shape[-1]
        projected = self.project(self.norm(planes)).flatten(2).unflatten(1, (3, self.heads, -1))
        query, key, value = projected.unbind(1)  # [B, heads, channels of a head, pixels]
        weights = torch.softmax(query.transpose(2, 3) @ key * self.scale, -1)  # [B, heads, pixels, pixels]
        mixed = value @ weights.transpose(2, 3)
        output: Tensor = self.output(mixed.flatten(1, 2).unflatten(2, (side, side)))
        return planes + output


class Stage(nn.Module):
    """Residual blocks at one resolution, with attention after each if the resolution has attention."""

    def __init__(self, channels: Sequence[tuple[int, int]], num_features: int, has_attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(inputs, outputs, num_features) for inputs, outputs in channels)
        self.attention = nn.ModuleList(
            Attention(outputs) if has_attention else nn.Identity() for _, outputs in channels
        )

    def forward(self, planes: Tensor, features: Tensor, skips: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the planes after each block; `skips` are added as channels before each block."""
        outputs = []
        for index, (block, attention) in enumerate(zip(self.blocks, self.attention, strict=True)):
            planes = torch.cat([planes, skips[index]], 1) if skips else planes
            planes = attention(block(planes, features))
            outputs.append(planes)
        return outputs


class UNet(nn.Module):
    """Noise in images [B, 3, 32, 32], given times [B] in 0..1 and int64 labels [B]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        num_features = 2 * width
        widths = [width * multiple for multiple in MULTIPLES]
        sides = [SIDE >> level for level in range(len(widths))]
        self.conditioning = Conditioning(width, num_features)
        self.first = nn.Conv2d(CHANNELS, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList()
        before = width
        for channels, side in zip(widths, sides, strict=True):
            has_attention = side in ATTENTION_SIDES
            self.down.append(Stage(_channels(before, channels), num_features, has_attention))
            up = [(2 * channels, channels)] * BLOCKS + [(before + channels, channels)]
            self.up.insert(0, Stage(up, num_features, has_attention))
            before = channels
        for fine, coarse in pairwise(widths):
            self.downsample.append(nn.Conv2d(fine, fine, 3, stride=2, padding=1))
            self.upsample.insert(0, nn.Conv2d(coarse, fine, 3, padding=1))
        self.middle = Stage([(before, before)] * BLOCKS, num_features, has_attention=False)
        self.last = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, CHANNELS, 3, padding=1))

    def forward(self, image: Tensor, time: Tensor, label: Tensor) -> Tensor:
        features = self.conditioning(time, label)
        planes, skips = self.first(image), []
        for level, stage in enumerate(self.down):
            planes = self.downsample[level - 1](planes) if level else planes
            skips.append([planes, *stage(planes, features)])
            planes = skips[-1][-1]
        planes = self.middle(planes, features)[-1]
        for level, stage in enumerate(self.up):
            planes = self.upsample[level - 1](_double(planes)) if level else planes
            planes = stage(planes, features, skips.pop()[::-1])[-1]
        output: Tensor = self.last(planes)
        return output


def count_parameters(module: nn.Module) -> int:
    """Return the number of trained parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _channels(before: int, channels: int) -> list[tuple[int, int]]:
    """Return the channels before and after each block of a stage on the way down."""
    return list(pairwise([before] + [channels] * BLOCKS))


def _double(planes: Tensor) -> Tensor:
    return functional.interpolate(planes, scale_factor=2.0, mode="nearest")


def _norm(channels: int) -> nn.GroupNorm:
    # With one channel a group, the norm would remove the shift that a block adds to a channel.
    return nn.GroupNorm(math.gcd(GROUPS, channels // GROUP_CHANNELS), channels)
