"""The digits, and one tiny artifact of every family."""

from pathlib import Path

import pytest

from export import data, recipe
from export.families import FAMILIES


@pytest.fixture(scope="session")
def digits() -> data.Dataset:
    return data.load("digits")


@pytest.fixture(scope="session")
def artifacts(digits: data.Dataset, models: Path) -> dict[str, Path]:
    """By family; those that the shared models lack are written beside them."""
    paths = {name: models / f"digits-{name}" / "1" for name in FAMILIES}
    for name, path in paths.items():
        if not path.exists():
            recipe.untrained(recipe.Recipe(FAMILIES[name].load(), digits, models, preset="tiny"))
    return paths
