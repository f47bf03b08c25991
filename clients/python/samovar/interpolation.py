"""Linear and spherical interpolation between two arrays.

Slerp (White, "Sampling Generative Networks", 2016) follows the great circle between two vectors. It keeps
the distance from the origin at which draws from a standard normal distribution lie; lerp does not.
"""

import numpy as np
from numpy.typing import ArrayLike

from samovar.tensors import Array

# Vectors whose angle has a smaller sine count as parallel: the arc between them is not defined.
_MIN_SINE = 1e-6


def lerp(a: ArrayLike, b: ArrayLike, weight: ArrayLike) -> Array:
    """Interpolate along the straight line from `a` to `b`.

    Args:
        a: The point at weight 0, [*shape].
        b: The point at weight 1, [*shape].
        weight: Weights of `b`, [...].

    Returns:
        The points, float32 [..., *shape].
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray(start + _expand(weight, start.ndim) * (end - start), np.float32)


def slerp(a: ArrayLike, b: ArrayLike, weight: ArrayLike) -> Array:
    """Interpolate along the great circle from `a` to `b`.

    Parallel, opposite and zero vectors have no single arc between them; for them the result is that of
    `lerp`.

    Args:
        a: The point at weight 0, [*shape].
        b: The point at weight 1, [*shape].
        weight: Weights of `b`, [...].

    Returns:
        The points, float32 [..., *shape].
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    cosine = float(np.clip((start * end).sum() / lengths, -1, 1)) if lengths else 1.0
    sine = np.sqrt(1 - cosine**2)
    if sine < _MIN_SINE:
        return lerp(a, b, weight)
    angle, weights = np.arccos(cosine), _expand(weight, start.ndim)
    point = np.sin((1 - weights) * angle) * start + np.sin(weights * angle) * end
    return np.asarray(point / sine, np.float32)


def _expand(weight: ArrayLike, ndim: int) -> Array:
    """Return the weights as float64 with `ndim` trailing axes of length 1."""
    weights = np.asarray(weight, np.float64)
    return weights.reshape(weights.shape + (1,) * ndim)
