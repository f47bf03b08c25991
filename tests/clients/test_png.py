"""Tests of PNG files, decoded by Pillow."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from samovar import png
from samovar.tensors import Array

SCALE, GAP = 8, 2


def decode(content: bytes) -> Array:
    with Image.open(io.BytesIO(content)) as picture:
        picture.load()
        return np.asarray(picture)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])).flatmap(
        lambda shape: arrays.arrays(np.uint8, shape)
    )
)
def test_encoded_picture_is_decoded_unchanged(picture: Array) -> None:
    restored = decode(png.encode(picture))
    assert restored.reshape(picture.shape).tolist() == picture.tolist()


def test_grid_enlarges_images_and_separates_them() -> None:
    digits = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
    picture = decode(png.grid(digits))
    assert picture.shape == (2 * 8 * SCALE + GAP, 2 * 8 * SCALE + GAP)
    tile = 8 * SCALE + GAP
    for number, digit in enumerate(digits):
        top, left = tile * (number // 2), tile * (number % 2)
        shown = picture[top : top + 8 * SCALE, left : left + 8 * SCALE]
        assert shown[::SCALE, ::SCALE].tolist() == digit.tolist()
        assert shown[SCALE - 1 :: SCALE, SCALE - 1 :: SCALE].tolist() == digit.tolist()
    assert len(np.unique(picture[8 * SCALE : tile])) == 1


def test_grid_preserves_colors() -> None:
    colors = np.array([[[[255, 0, 0]]], [[[0, 0, 255]]]], np.uint8)
    picture = decode(png.grid(colors))
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[0, -1].tolist() == [0, 0, 255]


def test_pairs_put_each_image_above_its_partner() -> None:
    above = np.arange(20, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    picture = decode(png.pairs(above, above + 100))
    centers = picture[4 * SCALE :: 8 * SCALE + GAP, 4 * SCALE :: 8 * SCALE + GAP]
    assert centers.tolist() == [
        list(range(16)),
        list(range(100, 116)),
        [16, 17, 18, 19] + [0] * 12,
        [116, 117, 118, 119] + [0] * 12,
    ]


def test_levels_are_scaled_and_clipped() -> None:
    assert png.levels(np.array([-1.0, 0, 4, 8, 16, 20, np.nan]), 0, 16).tolist() == [
        0,
        0,
        64,
        128,
        255,
        255,
        0,
    ]


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8, 2), (0, 8, 8)])
def test_grid_rejects_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected images"):
        png.grid(np.zeros(shape, np.uint8))
