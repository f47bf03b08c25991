"""Every family on every data set that it is for."""

from dataclasses import dataclass

import numpy as np
import pytest

from export.datasets import chorales
from export.datasets.loading import Dataset, Split, load
from export.families import FAMILIES
from export.graphs.program import DataSpec, TensorSpec


@dataclass(frozen=True)
class Pair:
    """A family and one of its data sets."""

    family: str
    data: str

    def __str__(self) -> str:
        return self.model

    @property
    def model(self) -> str:
        """What its artifact is called."""
        return f"{self.data}-{self.family}"

    @property
    def is_usual(self) -> bool:
        """Whether the data set is the family's first."""
        return self.data == FAMILIES[self.family].datasets[0]

    def dataset(self) -> Dataset:
        """The data set; of chorales a few that are made up, because to read Bach's takes a minute."""
        return _pieces() if self.data == "chorales" else load(self.data)


PAIRS = tuple(Pair(family, data) for family, entry in FAMILIES.items() for data in entry.datasets)

each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


def _pieces() -> Dataset:
    chance, shape = np.random.default_rng(0), (120, chorales.VOICES)
    rows = chorales.tokenize(
        [
            (chance.integers(chorales.LOWEST, chorales.HIGHEST, shape), chance.random(shape) < 0.5)
            for _ in range(30)
        ]
    )
    last = len(chorales.VOCABULARY) - 1
    tensor = TensorSpec("sequence", "uint8", rows.shape[1:], 0, last, "four voices in turn")
    value = DataSpec("tokens", tensor, last + 1, chorales.VOCABULARY)
    part = Split(rows, np.zeros(len(rows), np.int64))
    return Dataset("chorales", value, part, part, part, sha256="made up")
