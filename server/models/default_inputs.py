"""Default values of optional inputs."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.core.spec import ProgramSpec


def default_inputs(spec: ProgramSpec) -> dict[str, NDArray[Any]]:
    """Return an array [1, *row shape] for each optional input, which applies to every row of a request."""
    return {
        item.tensor.name: np.full((1, *item.tensor.shape), item.default, item.tensor.dtype)
        for item in spec.inputs
        if item.optional
    }
