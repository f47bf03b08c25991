"""Grids of images as PNG files (W3C Portable Network Graphics, third edition)."""

import math
import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from samovar.tensors import Array

Bytes = NDArray[np.uint8]

_TILE_PIXELS = 64
_GAP_PIXELS = 2
_GAP_LEVEL = 96
_MAX_PAIR_COLUMNS = 16
# Color types of the IHDR chunk.
_GRAY, _RGB = 0, 2


def levels(images: Array, low: float, high: float) -> Bytes:
    """Scale elements to gray levels.

    Args:
        images: Elements of any shape.
        low: The element that becomes 0; smaller elements and NaN do too.
        high: The element that becomes 255; larger elements do too.

    Returns:
        Rounded levels 0..255, uint8 of the same shape.
    """
    scaled = (np.asarray(images, np.float64) - low) / (high - low)
    rounded: Bytes = np.rint(np.nan_to_num(scaled).clip(0, 1) * 255).astype(np.uint8)
    return rounded


def grid(images: Bytes, columns: int = 0) -> bytes:
    """Encode images as one picture, row by row.

    Small images are enlarged by a whole number, so that an 8 x 8 digit is visible.

    Args:
        images: [N, H, W], [N, H, W, 1] or [N, H, W, 3].
        columns: Images per row; 0 for an approximately square grid.

    Raises:
        ValueError: If there are no images, or they have another shape.
    """
    tiles = _add_gaps(_enlarge(_add_channel_axis(images)))
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    return encode(_arrange(tiles, columns))


def pairs(above: Bytes, below: Bytes) -> bytes:
    """Encode two series of N images as one picture, with `above[i]` directly above `below[i]`."""
    columns = min(len(above), _MAX_PAIR_COLUMNS)
    blank = np.zeros((-len(above) % columns, *above.shape[1:]), np.uint8)
    series = [
        np.concatenate([images, blank]).reshape(-1, columns, *above.shape[1:]) for images in (above, below)
    ]
    return grid(np.stack(series, axis=1).reshape(-1, *above.shape[1:]), columns)


def encode(picture: Bytes) -> bytes:
    """Encode a picture [H, W, 1] or [H, W, 3] as PNG, with 8 bits per channel."""
    height, width, channels = picture.shape
    color_type = _RGB if channels == 3 else _GRAY
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    no_filter = np.zeros((height, 1), np.uint8)
    lines = np.hstack([no_filter, picture.reshape(height, -1)])
    chunks = (
        _chunk(b"IHDR", header),
        _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
        _chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _add_channel_axis(images: Array) -> Array:
    with_channels = images[..., None] if images.ndim == 3 else images
    if with_channels.ndim != 4 or with_channels.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {list(images.shape)}")
    return with_channels


def _enlarge(images: Array) -> Array:
    scale = max(1, _TILE_PIXELS // max(images.shape[1:3]))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _add_gaps(images: Array) -> Array:
    """Return the images with a gap at the right and the bottom."""
    gap = ((0, 0), (0, _GAP_PIXELS), (0, _GAP_PIXELS), (0, 0))
    return np.pad(images, gap, constant_values=_GAP_LEVEL)


def _arrange(tiles: Array, columns: int) -> Array:
    count, height, width, channels = tiles.shape
    lines = math.ceil(count / columns)
    padded = np.full((lines * columns, height, width, channels), _GAP_LEVEL, np.uint8)
    padded[:count] = tiles
    picture = padded.reshape(lines, columns, height, width, channels).swapaxes(1, 2)
    return picture.reshape(lines * height, columns * width, channels)[:-_GAP_PIXELS, :-_GAP_PIXELS]


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
