"""The digits, the moons, and where the shared artifacts of every family are."""

from pathlib import Path

import pytest

from export.datasets import loading
from tests.support.datasets import PAIRS


@pytest.fixture(scope="session")
def digits() -> loading.Dataset:
    return loading.load("digits")


@pytest.fixture(scope="session")
def artifacts(models: Path) -> dict[str, Path]:
    """By family, those on its usual data."""
    return {pair.family: models / pair.model / "1" for pair in PAIRS if pair.is_default}


@pytest.fixture(scope="session")
def moons() -> loading.Dataset:
    """Two moons, which nobody may change."""
    return loading.load("moons")


@pytest.fixture(params=["digits", "moons"])
def dataset(
    request: pytest.FixtureRequest, digits: loading.Dataset, moons: loading.Dataset
) -> loading.Dataset:
    """Images, then points."""
    return {"digits": digits, "moons": moons}[request.param]
