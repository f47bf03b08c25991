"""Every family on every data set that it is for."""

import importlib.util
from dataclasses import dataclass

import pytest

from export.families import FAMILIES


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
        return self.data == FAMILIES[self.family].data[0]

    @property
    def is_there(self) -> bool:
        """Whether the data set can be had here: the chorales come with a package of their own."""
        return self.data != "chorales" or importlib.util.find_spec("music21") is not None


PAIRS = tuple(Pair(family, data) for family, entry in FAMILIES.items() for data in entry.data)

each_pair = pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=str(pair), marks=pytest.mark.skipif(not pair.is_there, reason="needs music21"))
        for pair in PAIRS
    ],
)
