"""What stands for the inputs that a request leaves out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.core.spec import ProgramSpec


def default_inputs(spec: ProgramSpec) -> dict[str, NDArray[Any]]:
    """One row for every row of a request, of each input that may be left out."""
    return {
        item.tensor.name: np.full((1, *item.tensor.shape), item.default, item.tensor.dtype)
        for item in spec.inputs
        if item.optional
    }
