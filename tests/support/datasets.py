"""The pairs of a family and a dataset that the contract tests cover."""

from dataclasses import dataclass

import numpy as np
import pytest

from export.datasets import chorales
from export.datasets.loading import Dataset, Split, load
from export.families import FAMILIES
from export.graphs.program import DataSpec, TensorSpec


@dataclass(frozen=True)
class Pair:
    """A family and one of its datasets."""

    family: str
    data: str

    def __str__(self) -> str:
        return self.model

    @property
    def model(self) -> str:
        """Name of the artifact."""
        return f"{self.data}-{self.family}"

    @property
    def is_default(self) -> bool:
        """Whether the dataset is the family's default one."""
        return self.data == FAMILIES[self.family].datasets[0]

    def dataset(self) -> Dataset:
        """Return the dataset; random pieces instead of the chorales, which take a minute to read."""
        return _random_chorales() if self.data == "chorales" else load(self.data)


PAIRS = tuple(Pair(family, data) for family, entry in FAMILIES.items() for data in entry.datasets)
DEFAULT_PAIRS = tuple(pair for pair in PAIRS if pair.is_default)
OTHER_PAIRS = tuple(pair for pair in PAIRS if not pair.is_default)

for_each_pair = pytest.mark.parametrize("pair", PAIRS, ids=str)


def _random_chorales() -> Dataset:
    rng, shape = np.random.default_rng(0), (120, chorales.VOICES)
    rows = chorales.tokenize(
        [(rng.integers(chorales.LOWEST, chorales.HIGHEST, shape), rng.random(shape) < 0.5) for _ in range(30)]
    )
    last_token = len(chorales.VOCABULARY) - 1
    tensor = TensorSpec("sequence", "uint8", rows.shape[1:], 0, last_token, "four interleaved voices")
    spec = DataSpec("tokens", tensor, last_token + 1, chorales.VOCABULARY)
    split = Split(rows, np.zeros(len(rows), np.int64))
    return Dataset("chorales", spec, split, split, split, sha256="random pieces")
