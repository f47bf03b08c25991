"""What several tests share: tiny untrained artifacts, and a real server over them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import samovar
from export import data, recipe
from export.families import FAMILIES
from export.formats import FORMATS
from tests.serving import RunningServer, serving


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests may share their cores: threads that spin for each other cost more than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny untrained artifact of every family on its usual data, in every format: digits-vae/1, say."""
    directory = tmp_path_factory.mktemp("models")
    for entry in FAMILIES.values():
        usual = data.load(entry.data[0])
        recipe.untrained(recipe.Recipe(entry.load(), usual, directory, preset="tiny", formats=FORMATS))
    return directory


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[RunningServer]:
    """A server over the tiny artifacts, shared: leave it as you found it."""
    with serving(models) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=60.0) as connected:
        yield connected
