"""Counter-based random numbers of rows: Philox4x32-10.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011. The key is the request's seed. The
counter is (block of four elements, step, row index, stream). No two numbers of a seed share a counter, and
none depends on the batch that computes it. The generator is part of the wire contract: a client draws the
same latents as the server (docs/reproducibility.md).

The functions below take one seed, row index and step for each of B rows, as integer arrays [B].
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Floats = NDArray[np.float32]

MAX_ROW_INDEX = 2**32 - 1

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Compute Philox4x32-10.

    Args:
        counter: 32-bit words, uint64 [4, ...].
        key: 32-bit words, uint64 [2, ...]; broadcast against `counter`.

    Returns:
        Random 32-bit words, uint64 [4, ...].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3))


def words(
    seeds: NDArray[np.uint64], rows: NDArray[Any], steps: NDArray[Any], stream: int, count: int
) -> NDArray[np.uint64]:
    """Return the first `count` random 32-bit words of each row, uint64 [B, count].

    Args:
        seeds: The requests' seeds, uint64 [B].
        rows: Row indices, [B], 0 <= index <= MAX_ROW_INDEX.
        steps: Step indices, [B].
        stream: The stream; no two noise tensors of a program share one.
        count: Number of words per row.
    """
    batch, blocks = len(seeds), math.ceil(count / 4)
    counter = np.empty((4, batch, blocks), np.uint64)
    counter[0] = np.arange(blocks, dtype=np.uint64)
    counter[1] = np.asarray(steps, np.uint64)[:, None]
    counter[2] = np.asarray(rows, np.uint64)[:, None]
    counter[3] = np.uint64(stream)
    key = np.stack([seeds & _LOW, seeds >> _SHIFT])[:, :, None]
    return np.moveaxis(philox(counter, key), 0, -1).reshape(batch, blocks * 4)[:, :count]


def uniform(
    seeds: NDArray[np.uint64], rows: NDArray[Any], steps: NDArray[Any], stream: int, shape: Sequence[int]
) -> Floats:
    """Return uniform numbers in the open interval (0, 1), float32 [B, *shape].

    Args:
        seeds: The requests' seeds, uint64 [B].
        rows: Row indices, [B].
        steps: Step indices, [B].
        stream: The stream.
        shape: Shape of one row.
    """
    drawn = words(seeds, rows, steps, stream, math.prod(shape))
    # 23 bits plus half a step: every value is exact in float32, and none is 0 or 1.
    return (((drawn >> np.uint64(9)) + 0.5) * 2.0**-23).astype(np.float32).reshape(len(seeds), *shape)


def normal(
    seeds: NDArray[np.uint64], rows: NDArray[Any], steps: NDArray[Any], stream: int, shape: Sequence[int]
) -> Floats:
    """Return standard normal numbers, float32 [B, *shape], by the Box-Muller transform in float64.

    Args:
        seeds: The requests' seeds, uint64 [B].
        rows: Row indices, [B].
        steps: Step indices, [B].
        stream: The stream.
        shape: Shape of one row.
    """
    count = math.prod(shape)
    drawn = words(seeds, rows, steps, stream, count + count % 2)
    unit = np.ascontiguousarray(drawn, np.float64)
    unit += 0.5
    unit *= 2.0**-32
    radius = np.sqrt(-2.0 * np.log(np.ascontiguousarray(unit[:, 0::2])))
    angle = (2.0 * np.pi) * unit[:, 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(len(seeds), -1)[:, :count].astype(np.float32).reshape(len(seeds), *shape)
