"""The PixelCNN network: gated convolutions of a vertical and a horizontal stack, and the loss.

Shapes: B images, H rows, W columns, C classes, F = `width` features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets.loading import Dataset
from export.families.base import Preset
from export.training.trainer import Network

# Reach of the first layer's convolutions: rows above, and columns to each side. Later layers reach 1.
FIRST_LAYER_REACH = 3
# Logarithm of a probability of 0. It is finite, so that every row stays finite.
LOG_ZERO = -1e30


class VerticalConv(nn.Module):
    """Convolution over the rows above a pixel, and over its own row unless `strict`.

    Maps [B, inputs, H, W] to [B, outputs, H, W]. The output at (i, j) reads rows i - reach..i of columns
    j - reach..j + reach, without row i if `strict`.
    """

    def __init__(self, inputs: int, outputs: int, reach: int, strict: bool) -> None:
        super().__init__()
        self.padding = (reach, reach, reach, 0)
        self.strict = strict
        self.conv = nn.Conv2d(inputs, outputs, (reach if strict else reach + 1, 2 * reach + 1))

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.conv(functional.pad(features, self.padding))
        return outputs[:, :, :-1] if self.strict else outputs


class HorizontalConv(nn.Module):
    """Convolution over the pixels to the left of a pixel, and over the pixel itself unless `strict`.

    Maps [B, inputs, H, W] to [B, outputs, H, W]. The output at (i, j) reads columns j - reach..j of row i,
    without column j if `strict`.
    """

    def __init__(self, inputs: int, outputs: int, reach: int, strict: bool) -> None:
        super().__init__()
        self.padding = (reach, 0, 0, 0)
        self.strict = strict
        self.conv = nn.Conv2d(inputs, outputs, (1, reach if strict else reach + 1))

    def forward(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.conv(functional.pad(features, self.padding))
        return outputs[:, :, :, :-1] if self.strict else outputs


class GatedLayer(nn.Module):
    """One layer of both stacks (van den Oord et al. 2016b, Figure 2), with a bias for the class.

        v' = gate(V v + b_v[label])
        h' = W gate(H h + U V v + b_h[label]),   gate(a, b) = tanh(a) * sigmoid(b)

    The first layer reads pixels, and not the pixel at its own position. The other layers are residual: they
    add v' to v and h' to h.
    """

    def __init__(self, width: int, classes: int, dropout: float, is_first: bool) -> None:
        super().__init__()
        reach = FIRST_LAYER_REACH if is_first else 1
        self.is_first = is_first
        self.vertical = VerticalConv(width, 2 * width, reach, strict=is_first)
        self.horizontal = HorizontalConv(width, 2 * width, reach, strict=is_first)
        self.vertical_to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.output = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)
        self.label_bias = nn.Embedding(classes, 4 * width)

    def forward(self, vertical: Tensor, horizontal: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features of both stacks, each [B, F, H, W], from the same and int64 labels [B]."""
        vertical_bias, horizontal_bias = self.label_bias(label)[:, :, None, None].chunk(2, 1)
        above = self.vertical(vertical)
        left = self.horizontal(horizontal) + self.vertical_to_horizontal(above)
        new_vertical = self.dropout(_gate(above + vertical_bias))
        new_horizontal = self.output(self.dropout(_gate(left + horizontal_bias)))
        if self.is_first:
            return new_vertical, new_horizontal
        return vertical + new_vertical, horizontal + new_horizontal


def _gate(features: Tensor) -> Tensor:
    content, gate = features.chunk(2, 1)
    return content.tanh() * gate.sigmoid()


class PixelCNN(Network):
    """p(x | label) over images of integers 0..num_levels-1, [H, W]."""

    log_class_weights: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = self.shape[0] * self.shape[1]
        counts = torch.tensor(data.train.labels).bincount(minlength=len(data.spec.class_labels))
        self.num_classes, width = len(counts), preset.width
        self.register_buffer("log_class_weights", (counts / counts.sum()).log().clamp(min=LOG_ZERO))
        self.pixel = nn.Embedding(self.num_levels, width)
        self.position = nn.Parameter(0.1 * torch.randn(2, width, *self.shape))
        self.layers = nn.ModuleList(
            GatedLayer(width, self.num_classes, preset.dropout, is_first=index == 0)
            for index in range(preset.depth)
        )
        self.head = nn.Sequential(
            nn.SiLU(), nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(preset.dropout),
            nn.Linear(2 * width, self.num_levels),
        )  # fmt: skip

    def features(self, image: Tensor, label: Tensor) -> Tensor:
        """Return the features [B, H * W, F] from which `logits` computes the factor of each pixel.

        Args:
            image: integers [B, H, W].
            label: int64 [B].
        """
        vertical: Tensor = self.pixel(image.to(torch.int64)).permute(0, 3, 1, 2)
        horizontal = vertical
        for index, layer in enumerate(self.layers):
            vertical, horizontal = layer(vertical, horizontal, label)
            if index == 0:
                vertical, horizontal = vertical + self.position[0], horizontal + self.position[1]
        return horizontal.flatten(2).transpose(1, 2)

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [..., num_levels] of pixels with features [..., F]."""
        logits: Tensor = self.head(features)
        return logits

    def log_masses(self, image: Tensor, label: Tensor) -> Tensor:
        """Return log p(x_i | x_1 .. x_(i-1), label) in nats [B, H * W], in raster order."""
        log_masses = self.logits(self.features(image, label)).log_softmax(-1)
        is_level = image.flatten(1).unsqueeze(-1) == torch.arange(self.num_levels, device=image.device)
        return torch.where(is_level, log_masses, torch.zeros_like(log_masses)).sum(-1)

    def log_joint(self, image: Tensor, counted: Tensor) -> Tensor:
        """Return log p(label) + the sum of the counted pixels' log-masses, for every label, in nats [B, C].

        Args:
            image: integers [B, H, W].
            counted: the pixels to count, bool [B, H, W].
        """
        images = image.unsqueeze(1).expand(-1, self.num_classes, -1, -1).flatten(0, 1)
        labels = torch.arange(self.num_classes, device=image.device).expand(image.shape[0], -1).flatten()
        terms = self.log_masses(images, labels).reshape(-1, self.num_classes, self.dimensions)
        terms = torch.where(counted.flatten(1).unsqueeze(1), terms, torch.zeros_like(terms))
        # Unlike the result of sum, that of cumsum is batch-invariant for odd lengths too.
        return self.log_class_weights + terms.cumsum(-1)[..., -1]

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-mass given the label, in nats per dimension [B]."""
        log_masses: Tensor = self.log_masses(rows, labels)
        return -log_masses.mean(1)
