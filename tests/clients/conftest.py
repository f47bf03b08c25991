"""A counting server on a free port, and clients that talk to it."""

from collections.abc import Iterator

import pytest

from samovar import Client
from tests.support.fake_server import Counting, Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(Counting()) as server:
        yield server


@pytest.fixture
def service(server: Server) -> Counting:
    return server.service


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, timeout=20) as client:
        yield client
