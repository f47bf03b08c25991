"""A real server on port 0, on an event loop in a thread of its own."""

import asyncio
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from server.app import App
from server.config import Config
from server.runtime import RUNTIMES, OpenGraph


class RunningServer:
    """An App that serves until it is stopped."""

    def __init__(self, config: Config, runtimes: Mapping[str, OpenGraph]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._is_stopped = False
        self._thread.start()
        self.app = self.call(_make(config, runtimes))
        self.call(self.app.startup())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.app.metrics_port}/metrics"

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def load(self) -> None:
        """Load the models and start serving."""
        self.call(self.app.load())

    def stop(self) -> None:
        """Drain and stop; once is enough."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.call(self.app.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def await_true(condition: Callable[[], bool], complaint: str) -> None:
    """Wait until something holds that soon must."""
    patience = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < patience, complaint
        time.sleep(0.01)


def assert_idle(server: RunningServer) -> None:
    """Soon no row is left in the engine."""
    engine = server.app.engine
    await_true(lambda: engine.num_active == engine.num_waiting == 0, "rows were left in the engine")


def scrape(server: RunningServer) -> dict[tuple[str, tuple[str, ...]], float]:
    """Samples by name and sorted label values."""
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def _make(config: Config, runtimes: Mapping[str, OpenGraph]) -> App:
    return App(config, runtimes)


@contextmanager
def listening(
    models: Path, runtimes: Mapping[str, OpenGraph] = RUNTIMES, **settings: Any
) -> Iterator[RunningServer]:
    """A server that listens but has not loaded its models."""
    defaults = {"port": 0, "metrics_port": 0, "device": "cpu", "drain_timeout": 5.0}
    server = RunningServer(Config(models=models, **{**defaults, **settings}), runtimes)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serving(models: Path, **settings: Any) -> Iterator[RunningServer]:
    """A server over a models directory, ready to answer."""
    with listening(models, **settings) as server:
        server.load()
        yield server
