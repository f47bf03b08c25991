"""Convolutional network for image classification.

LeCun, Bottou, Bengio & Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998), with the
residual blocks of He et al., "Deep Residual Learning for Image Recognition" (2015). All kernels are 3x3. Each
stage after the first halves the height and width and doubles the channels.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.families.classifier import Block, Classifier, ClassifierFamily
from export.training.trainer import Settings

NUM_FEATURES = 128


class Residual(nn.Module):
    """Residual block: x plus two convolution blocks applied to x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.blocks(x)
        return y


class ChannelsFirst(nn.Module):
    """Permutation of [B, height, width(, channels)] to [B, channels, height, width]."""

    def forward(self, image: Tensor) -> Tensor:
        return image.unsqueeze(1) if image.dim() == 3 else image.permute(0, 3, 1, 2)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> Block:
    return Block(nn.Conv2d(inputs, outputs, 3, stride, padding=1))


class Family(ClassifierFamily):
    """Exporter family of convolutional networks."""

    name = "cnn"
    description = (
        "Convolutional classifier (LeCun et al. 1998; He et al. 2015), with batch norm "
        "(Ioffe & Szegedy 2015) folded in and its temperature fitted (Guo et al. 2017)."
    )
    presets: Mapping[str, Preset] = {
        "tiny": Preset(width=4, depth=2, training=Settings(steps=1), evaluation_rows=20),
        "starter": Preset(width=24, depth=2, dropout=0.3, training=Settings(steps=800, validation_rows=1)),
        "medium": Preset(
            width=24,
            depth=3,
            dropout=0.3,
            training=Settings(
                steps=3600, batch_rows=128, learning_rate=4e-3, weight_decay=0.05, ema_decay=0.998
            ),
            evaluation_rows=10_000,
        ),
        "full": Preset(
            width=64,
            depth=4,
            dropout=0.3,
            training=Settings(
                steps=10_000, batch_rows=256, learning_rate=2e-3, weight_decay=0.05, ema_decay=0.999
            ),
            evaluation_rows=10_000,
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> Classifier:
        """Return an untrained network with `depth` stages; the first has `width` channels."""
        shape = data.spec.tensor.shape
        height, width, channels = shape if len(shape) == 3 else (*shape, 1)
        layers: list[nn.Module] = [ChannelsFirst()]
        for stage in range(preset.depth):
            stride, stage_channels = 2 if stage else 1, preset.width << stage
            layers += [_convolution(channels, stage_channels, stride), Residual(stage_channels)]
            channels, height, width = stage_channels, -(-height // stride), -(-width // stride)
        dense = Block(nn.Linear(channels * height * width, NUM_FEATURES), preset.dropout)
        return Classifier(data, nn.Sequential(*layers, nn.Flatten(), dense), NUM_FEATURES)


FAMILY = Family()
