"""A grid of images as PNG bytes (W3C Portable Network Graphics, third edition). Knows no models."""

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
_GREY, _COLOUR = 0, 2


def levels(images: Array, low: float, high: float) -> Bytes:
    """Elements between low and high as 0..255, rounded; those outside are clipped."""
    unit = (np.asarray(images, np.float64) - low) / (high - low)
    rounded: Bytes = np.rint(np.nan_to_num(unit).clip(0, 1) * 255).astype(np.uint8)
    return rounded


def grid(images: Bytes, columns: int = 0) -> bytes:
    """Images [N, H, W], [N, H, W, 1] or [N, H, W, 3] as one picture, in reading order.

    Small images are enlarged by a whole number, so that an 8 x 8 digit can be seen.
    Without a number of columns the grid is about square.
    """
    tiles = _framed(_enlarged(_with_channels(images)))
    columns = columns or math.ceil(math.sqrt(len(tiles)))
    return encode(_assembled(tiles, columns))


def pairs(above: Bytes, below: Bytes) -> bytes:
    """Two equally long series of images, each of the first above its partner of the second."""
    columns = min(len(above), 16)
    blank = np.zeros((-len(above) % columns, *above.shape[1:]), np.uint8)
    series = [
        np.concatenate([images, blank]).reshape(-1, columns, *above.shape[1:]) for images in (above, below)
    ]
    return grid(np.stack(series, axis=1).reshape(-1, *above.shape[1:]), columns)


def encode(picture: Bytes) -> bytes:
    """A picture [H, W, 1 or 3] as PNG, 8 bits a channel."""
    height, width, channels = picture.shape
    colour_type = _COLOUR if channels == 3 else _GREY
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    unfiltered = np.zeros((height, 1), np.uint8)
    lines = np.hstack([unfiltered, picture.reshape(height, -1)])
    parts = (
        _chunk(b"IHDR", header),
        _chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)),
        _chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _with_channels(images: Array) -> Array:
    with_channels = images[..., None] if images.ndim == 3 else images
    if with_channels.ndim != 4 or with_channels.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"expected images [N, H, W], [N, H, W, 1] or [N, H, W, 3], got {list(images.shape)}")
    return with_channels


def _enlarged(images: Array) -> Array:
    scale = max(1, _TILE_PIXELS // max(images.shape[1:3]))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _framed(images: Array) -> Array:
    """A gap at the right and at the bottom of every tile."""
    gap = ((0, 0), (0, _GAP_PIXELS), (0, _GAP_PIXELS), (0, 0))
    return np.pad(images, gap, constant_values=_GAP_LEVEL)


def _assembled(tiles: Array, columns: int) -> Array:
    count, height, width, channels = tiles.shape
    lines = math.ceil(count / columns)
    padded = np.full((lines * columns, height, width, channels), _GAP_LEVEL, np.uint8)
    padded[:count] = tiles
    picture = padded.reshape(lines, columns, height, width, channels).swapaxes(1, 2)
    return picture.reshape(lines * height, columns * width, channels)[:-_GAP_PIXELS, :-_GAP_PIXELS]


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
