"""Fixtures for tests of the exporter: datasets, and the shared untrained artifacts."""

from pathlib import Path

import pytest

from export.datasets import loading
from tests.support.datasets import PAIRS


@pytest.fixture(scope="session")
def digits() -> loading.Dataset:
    """The digits, shared: do not change them."""
    return loading.load("digits")


@pytest.fixture(scope="session")
def artifacts(models: Path) -> dict[str, Path]:
    """The artifact of each family on its default dataset, by family."""
    return {pair.family: models / pair.model / "1" for pair in PAIRS if pair.is_default}


@pytest.fixture(scope="session")
def moons() -> loading.Dataset:
    """The two moons, shared: do not change them."""
    return loading.load("moons")


@pytest.fixture(params=["digits", "moons"])
def dataset(
    request: pytest.FixtureRequest, digits: loading.Dataset, moons: loading.Dataset
) -> loading.Dataset:
    """A dataset of images and a dataset of points."""
    return {"digits": digits, "moons": moons}[request.param]
