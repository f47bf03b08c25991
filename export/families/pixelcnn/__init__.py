"""Class-conditional Gated PixelCNN for gray images of integers (van den Oord et al. 2016)."""

from export.families.pixelcnn.programs import FAMILY, PixelCNN

__all__ = ["FAMILY", "PixelCNN"]
