"""Multilayer perceptron for image classification.

Fully connected layers trained by backpropagation (Rumelhart, Hinton & Williams, "Learning representations by
back-propagating errors", 1986). The input is a flat list of pixels, so the network knows nothing of the
two-dimensional arrangement of pixels.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.families.classifier import Block, Classifier, ClassifierFamily
from export.training.trainer import Settings


class Family(ClassifierFamily):
    """Exporter family of multilayer perceptrons."""

    name = "mlp"
    description = (
        "Multilayer perceptron classifier (Rumelhart et al. 1986), with batch norm (Ioffe & Szegedy 2015) "
        "folded in and its temperature fitted (Guo et al. 2017)."
    )
    presets: Mapping[str, Preset] = {
        "tiny": Preset(width=16, depth=1, training=Settings(steps=1), evaluation_rows=20),
        "starter": Preset(width=512, depth=2, dropout=0.3, training=Settings(steps=1500, validation_rows=1)),
        "medium": Preset(
            width=1024,
            depth=3,
            dropout=0.2,
            training=Settings(
                steps=10_000, batch_rows=128, learning_rate=1e-3, weight_decay=0.05, ema_decay=0.999
            ),
            evaluation_rows=10_000,
        ),
        "full": Preset(
            width=1024,
            depth=4,
            dropout=0.3,
            training=Settings(steps=30_000, batch_rows=256, learning_rate=1e-3, ema_decay=0.999),
            evaluation_rows=10_000,
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> Classifier:
        """Return an untrained perceptron with `depth` hidden layers of `width` units."""
        widths = [math.prod(data.spec.tensor.shape)] + [preset.width] * preset.depth
        blocks = [Block(nn.Linear(inputs, outputs), preset.dropout) for inputs, outputs in pairwise(widths)]
        return Classifier(data, nn.Sequential(nn.Flatten(), *blocks), preset.width)


FAMILY = Family()
