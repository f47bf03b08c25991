"""Fixtures: the fake server on a free port, and a client of it."""

from collections.abc import Iterator

import pytest

from samovar import Client
from tests.support.fake_server import FakeServer, FakeService


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer(FakeService()) as server:
        yield server


@pytest.fixture
def service(server: FakeServer) -> FakeService:
    return server.service


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with Client(server.address, timeout=500) as client:
        yield client
