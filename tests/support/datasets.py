"""Pairs of a family and a dataset, of which the tests export untrained artifacts."""

from collections.abc import Callable, Mapping
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
        create = _RANDOM_DATASETS.get(self.data)
        return create() if create else load(self.data)


PAIRS = tuple(Pair(family, data) for family, entry in FAMILIES.items() for data in entry.datasets)
DEFAULT_PAIRS = tuple(pair for pair in PAIRS if pair.is_default)
OTHER_PAIRS = tuple(pair for pair in PAIRS if not pair.is_default)

# Vocabularies and lengths of the small datasets of tokens.
LETTERS = ("", "\n", " ", *"abcdefgh")
PITCHES = ("", chorales.END, chorales.HOLD, chorales.REST, *map(str, range(60, 68)))
CONTEXT = 24
TOKEN_PAIRS = (Pair("lstm", "letters"), Pair("lstm", "pitches"))

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


def _random_tokens(name: str, vocabulary: tuple[str, ...]) -> Dataset:
    rows = np.random.default_rng(0).integers(1, len(vocabulary), (4, CONTEXT)).astype(np.uint8)
    tensor = TensorSpec("sequence", "uint8", (CONTEXT,), 0, len(vocabulary) - 1)
    spec = DataSpec("tokens", tensor, len(vocabulary), vocabulary)
    split = Split(rows, np.zeros(len(rows), np.int64))
    return Dataset(name, spec, split, split, split, sha256="random tokens")


_RANDOM_DATASETS: Mapping[str, Callable[[], Dataset]] = {
    "chorales": _random_chorales,
    "letters": lambda: _random_tokens("letters", LETTERS),
    "pitches": lambda: _random_tokens("pitches", PITCHES),
}
