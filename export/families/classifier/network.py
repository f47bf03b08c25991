"""Classifier network: blocks with batch norm and dropout, a linear head, and the loss.

A block is a linear map or convolution, batch norm (Ioffe & Szegedy 2015), ReLU and dropout (Srivastava et
al. 2014). In training, batch norm uses the mean and variance of the batch, and dropout scales the kept
features by 1 / (1 - p). For inference, dropout is removed and batch norm becomes the affine map

    y = gamma (x - mean) / sqrt(variance + epsilon) + beta

with the running statistics, folded into the linear map before it. So the outputs of a row do not depend on
the other rows of the batch.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from export.datasets.loading import Dataset
from export.training.trainer import Network

LABEL_SMOOTHING = 0.05
# Training images are shifted by up to 1 / SHIFT_DIVISOR of their height and width.
SHIFT_DIVISOR = 8


class Block(nn.Module):
    """Linear map or convolution, batch norm over its outputs, ReLU and dropout."""

    def __init__(self, linear: nn.Linear | nn.Conv2d, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.norm: nn.Module = (
            nn.BatchNorm1d(linear.out_features)
            if isinstance(linear, nn.Linear)
            else nn.BatchNorm2d(linear.out_channels)
        )
        self.dropout: nn.Module = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.dropout(self.norm(self.linear(inputs)).relu())
        return outputs

    def fold_batch_norm(self) -> None:
        """Fold the running statistics into the linear map and remove dropout. Requires eval mode."""
        if isinstance(self.norm, nn.BatchNorm1d) and isinstance(self.linear, nn.Linear):
            self.linear = fuse_linear_bn_eval(self.linear, self.norm)
        elif isinstance(self.norm, nn.BatchNorm2d) and isinstance(self.linear, nn.Conv2d):
            self.linear = fuse_conv_bn_eval(self.linear, self.norm)
        self.norm, self.dropout = nn.Identity(), nn.Identity()


class Classifier(Network):
    """Class logits as a linear map of the features, which are the last hidden layer.

    Args:
        data: the dataset; its spec gives the image shape, the number of levels and the class labels.
        body: maps pixel values scaled to -1..1 [B, *shape] to features [B, num_features].
        num_features: number of features.
    """

    def __init__(self, data: Dataset, body: nn.Module, num_features: int) -> None:
        super().__init__()
        self.shape, self.num_levels = data.spec.tensor.shape, data.spec.num_levels
        self.num_features, self.num_classes = num_features, len(data.spec.class_labels)
        self.body = body
        self.head = nn.Linear(num_features, self.num_classes)

    def encode(self, image: Tensor) -> Tensor:
        """Return the features [B, num_features] of uint8 images [B, *shape]."""
        features: Tensor = self.body(image.to(torch.float32) * (2 / (self.num_levels - 1)) - 1)
        return features

    def logits(self, image: Tensor) -> Tensor:
        """Return the class logits [B, num_classes] of uint8 images [B, *shape]."""
        logits: Tensor = self.head(self.encode(image))
        return logits

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy in nats [B].

        In training mode, images are augmented and labels are smoothed (Szegedy et al. 2016).
        """
        if not self.training:
            return functional.cross_entropy(self.logits(rows), labels, reduction="none")
        logits = self.logits(augment(rows))
        return functional.cross_entropy(logits, labels, reduction="none", label_smoothing=LABEL_SMOOTHING)

    def inference_copy(self) -> "Classifier":
        """Return a CPU copy in eval mode, with batch norm folded and dropout removed."""
        served = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        for module in list(served.modules()):
            if isinstance(module, Block):
                module.fold_batch_norm()
        return served


def augment(rows: Tensor) -> Tensor:
    """Shift each image at random and pad with zeros; mirror color images with probability 1/2.

    Color images are photographs. Grayscale images may be digits, which must not be mirrored.

    Args:
        rows: uint8 [B, height, width] or [B, height, width, channels].

    Returns:
        uint8 of the same shape.
    """
    count, height, width = rows.shape[:3]
    margins = height // SHIFT_DIVISOR, width // SHIFT_DIVISOR
    padded = functional.pad(rows, (0, 0) * (rows.dim() - 3) + (margins[1],) * 2 + (margins[0],) * 2)
    columns = _random_offsets(count, margins[1], rows.device) + torch.arange(width, device=rows.device)
    if rows.dim() == 4:
        is_mirrored = torch.rand((count, 1), device=rows.device) < 0.5
        columns = torch.where(is_mirrored, columns.flip(1), columns)
    lines = _random_offsets(count, margins[0], rows.device) + torch.arange(height, device=rows.device)
    indices = torch.arange(count, device=rows.device)
    return padded[indices[:, None, None], lines[:, :, None], columns[:, None, :]]


def _random_offsets(count: int, margin: int, device: torch.device) -> Tensor:
    return torch.randint(0, 2 * margin + 1, (count, 1), device=device)
