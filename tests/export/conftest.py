"""The digits, and where the shared artifacts of every family are."""

from pathlib import Path

import pytest

from export import data
from export.families import FAMILIES


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="session")
def artifacts(models: Path) -> dict[str, Path]:
    return {name: models / f"{entry.data[0]}-{name}" / "1" for name, entry in FAMILIES.items()}
