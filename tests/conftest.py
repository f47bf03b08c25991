"""What several tests share: tiny untrained artifacts, and a real server over them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import samovar
from export.graphs.formats import DEFAULT_FORMATS, FORMATS
from tests.support import artifact_cache
from tests.support.datasets import PAIRS
from tests.support.live_server import RunningServer, serving


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tests may share their cores: threads that spin for each other cost more than they gain."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny untrained artifact of every family on its usual data, in every format: digits-vae/1, say."""
    usual = (pair for pair in PAIRS if pair.is_usual)
    return artifact_cache.link(usual, FORMATS, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of every family on each of its other data sets, in the usual formats: moons-gan/1, say."""
    others = (pair for pair in PAIRS if not pair.is_usual)
    return artifact_cache.link(others, DEFAULT_FORMATS, tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[RunningServer]:
    """A server over the tiny artifacts, shared: leave it as you found it."""
    with serving(models) as running:
        yield running


@pytest.fixture(scope="session")
def other_server(other_models: Path) -> Iterator[RunningServer]:
    """A server over the other tiny artifacts, shared in the same way."""
    with serving(other_models) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=60.0) as connected:
        yield connected
