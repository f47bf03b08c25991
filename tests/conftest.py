"""Fixtures of several test files: untrained artifacts, real servers over them, and the selection of tests."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import samovar
from export.graphs.formats import DEFAULT_FORMATS, FORMATS
from tests.support import artifact_cache
from tests.support.datasets import DEFAULT_PAIRS, OTHER_PAIRS, TOKEN_PAIRS
from tests.support.live_server import HANG_SECONDS, SETTINGS, RunningServer, serving

# No test depends on the clock: examples have no deadline, and their generation may be slow. A failure prints
# the line that reproduces it.
settings.register_profile(
    "samovar", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("samovar")

# A test that needs one of these fixtures exports artifacts or starts servers: `make test FAST=1` skips it.
_SLOW_FIXTURES = {"default_models", "models_of", "other_models"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device of the servers: cpu or cuda")


def pytest_configure(config: pytest.Config) -> None:
    SETTINGS["device"] = config.getoption("--device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use artifacts as slow, and order the tests for two workers that steal.

    pytest-xdist gives each worker one half of the list; a worker without work steals the end of the other
    half. The order avoids that both workers load the largest servers.
    """
    for item in items:
        if _SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    items.sort(key=_position)


def _position(item: pytest.Item) -> int:
    """Return the part of the list to which a test belongs; a sort keeps the order within a part."""
    if item.get_closest_marker("slow") is None:
        return 1
    if item.path.stem in ("test_reproducibility", "test_family_contract"):
        return 2
    return 3 if "server" in item.path.parts else 0


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Let torch use one thread: the threads of parallel tests would wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def default_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of every family on its default dataset in every format, such as digits-vae/1."""
    return artifact_cache.link(DEFAULT_PAIRS, FORMATS, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def models(default_models: Path) -> Path:
    """`default_models`, unless the tests of a file need fewer."""
    return default_models


@pytest.fixture(scope="session")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts of the families on their other datasets in the default formats, such as moons-gan/1."""
    return artifact_cache.link(OTHER_PAIRS, DEFAULT_FORMATS, tmp_path_factory.mktemp("other-models"))


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Function that returns a directory with a few artifacts, for a server that loads no others."""

    def select(*names: str, formats: Sequence[str] = FORMATS) -> Path:
        pairs = [pair for pair in (*DEFAULT_PAIRS, *TOKEN_PAIRS) if pair.model in names]
        assert len(pairs) == len(names), names
        return artifact_cache.link(pairs, formats, tmp_path_factory.mktemp("models-of"))

    return select


@pytest.fixture(scope="session")
def default_server(default_models: Path) -> Iterator[RunningServer]:
    """A server of `default_models` in the default formats. Tests share it and must leave it idle."""
    with serving(default_models, formats=DEFAULT_FORMATS) as running:
        yield running


@pytest.fixture(scope="session")
def torch_export_server(default_models: Path) -> Iterator[RunningServer]:
    """A server of `default_models` as torch.export programs, which take longer to load than other formats."""
    with serving(default_models, formats=("torch_export",)) as running:
        yield running


@pytest.fixture(scope="session")
def other_server(other_models: Path) -> Iterator[RunningServer]:
    """A server of `other_models`."""
    with serving(other_models) as running:
        yield running


@pytest.fixture(scope="session")
def server(default_server: RunningServer) -> RunningServer:
    """`default_server`, unless the tests of a folder or a file have their own."""
    return default_server


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=HANG_SECONDS) as connected:
        yield connected
