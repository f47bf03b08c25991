"""Tests of the generator: published vectors, independence of the batch, distributions."""

import doctest
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from samovar import noise

Draw = Callable[[NDArray[np.uint64], NDArray[Any], NDArray[Any], int, Sequence[int]], NDArray[np.float32]]
SEEDS = st.integers(0, 2**64 - 1)
WORDS = st.integers(0, 2**32 - 1)
ROWS = st.lists(st.tuples(SEEDS, WORDS, WORDS), min_size=1, max_size=6)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
DRAWS = st.sampled_from([noise.uniform, noise.normal])

# kat_vectors of Random123, the authors' implementation: counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def hexadecimal(text: str) -> NDArray[np.uint64]:
    return np.array([int(word, 16) for word in text.split()], np.uint64)


DOCUMENT = Path(__file__).parents[2] / "docs" / "reproducibility.md"


def test_documented_example_matches_code() -> None:
    results = doctest.testfile(str(DOCUMENT), module_relative=False)
    assert (results.failed, results.attempted) == (0, 10)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_matches_published_vectors(counter: str, key: str, expected: str) -> None:
    assert noise.philox(hexadecimal(counter), hexadecimal(key)).tolist() == hexadecimal(expected).tolist()


def test_words_use_block_step_row_stream_counter_and_seed_key() -> None:
    seed, step, row, stream = 0x0123456789ABCDEF, 3, 5, 7
    key = np.array([0x89ABCDEF, 0x01234567], np.uint64)
    blocks = [noise.philox(np.array([block, step, row, stream], np.uint64), key) for block in range(2)]
    drawn = noise.words(np.array([seed], np.uint64), np.array([row]), np.array([step]), stream, 6)
    assert drawn.tolist() == [np.concatenate(blocks)[:6].tolist()]


@given(DRAWS, ROWS, st.integers(0, 10), SHAPES)
def test_draw_is_independent_of_batch(
    draw: Draw, rows: list[tuple[int, int, int]], stream: int, shape: list[int]
) -> None:
    seeds, indices, steps = (np.array(column, np.uint64) for column in zip(*rows, strict=True))
    batched = draw(seeds, indices, steps, stream, shape)
    for position in range(len(rows)):
        row = slice(position, position + 1)
        alone = draw(seeds[row], indices[row], steps[row], stream, shape)
        assert alone.tobytes() == batched[row].tobytes()


@given(DRAWS, SEEDS, st.integers(0, 40), st.integers(0, 40))
def test_shorter_draw_is_prefix_of_longer_draw(draw: Draw, seed: int, a: int, b: int) -> None:
    short, long = sorted((a, b))
    key = np.array([seed], np.uint64), np.array([0]), np.array([0]), 0
    assert draw(*key, [short]).tobytes() == draw(*key, [long])[:, :short].tobytes()


def draw_sample(draw: Draw, steps: int = 1) -> NDArray[np.float32]:
    """Return 250,000 numbers of one seed over 2500 rows and steps."""
    rows, step_indices = np.divmod(np.arange(2500), steps)
    return draw(np.full(2500, 7, np.uint64), rows, step_indices, 0, [100]).ravel()


def kolmogorov_distance(numbers: NDArray[np.float64], cdf: NDArray[np.float64]) -> float:
    """Return the scaled Kolmogorov distance; it exceeds 1.95 with probability 0.001."""
    ranks = np.arange(1, len(numbers) + 1) / len(numbers)
    return float(np.abs(np.sort(cdf) - ranks).max() * math.sqrt(len(numbers)))


def test_uniform_is_uniform_on_open_interval() -> None:
    numbers = draw_sample(noise.uniform).astype(np.float64)
    assert 0 < numbers.min() < numbers.max() < 1
    assert kolmogorov_distance(numbers, numbers) < 1.95


@pytest.mark.parametrize("steps", [1, 50])
def test_normal_is_standard_normal(steps: int) -> None:
    numbers = draw_sample(noise.normal, steps).astype(np.float64)
    error = len(numbers) ** -0.5
    assert abs(numbers.mean()) < 4 * error
    assert abs((numbers**2).mean() - 1) < 4 * math.sqrt(2) * error
    assert abs((numbers**4).mean() - 3) < 4 * math.sqrt(96) * error
    cdf = np.array([0.5 + 0.5 * math.erf(number / math.sqrt(2)) for number in numbers])
    assert kolmogorov_distance(numbers, cdf) < 1.95


def test_pairs_rows_steps_streams_and_seeds_are_uncorrelated() -> None:
    seeds = np.full(50_000, 11, np.uint64)
    rows, zeros = np.arange(50_000), np.zeros(50_000, int)
    columns = np.column_stack(
        [
            noise.normal(seeds, rows, zeros, 0, [2]),
            noise.normal(seeds, rows + 1, zeros, 0, [1]),
            noise.normal(seeds, rows, zeros + 1, 0, [1]),
            noise.normal(seeds, rows, zeros, 1, [1]),
            noise.normal(seeds + np.uint64(1), rows, zeros, 0, [1]),
        ]
    )
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(6)
    assert np.abs(correlations).max() < 5 * len(rows) ** -0.5
