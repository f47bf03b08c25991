"""A real server on port 0, whose event loop runs in its own thread."""

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

# A limit for what must not hang. It is far beyond the time that anything takes, on a busy machine too.
HANG_SECONDS = 500.0


# Settings of the servers of all tests. The option --device of pytest replaces the device.
SETTINGS: dict[str, Any] = {
    "port": 0,
    "metrics_port": 0,
    "device": "cpu",
    "intra_op_threads": 1,
    "drain_timeout": 5.0,
}


class RunningServer:
    """An `App` that runs until `stop`."""

    def __init__(self, config: Config, runtimes: Mapping[str, OpenGraph]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._is_stopped = False
        self._thread.start()
        self.app = self.call(_create_app(config, runtimes))
        self.call(self.app.startup())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    @property
    def metrics_url(self) -> str:
        return f"http://127.0.0.1:{self.app.metrics_port}/metrics"

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(HANG_SECONDS)

    def load(self) -> None:
        """Load the models and start serving."""
        self.call(self.app.load())

    def stop(self) -> None:
        """Drain and stop; a second call does nothing."""
        if self._is_stopped:
            return
        self._is_stopped = True
        self.call(self.app.shutdown())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _create_app(config: Config, runtimes: Mapping[str, OpenGraph]) -> App:
    """Create the app on the loop that will run it."""
    return App(config, runtimes)


def wait_until(condition: Callable[[], bool], failure: str) -> None:
    """Wait until a condition holds; fail with the message `failure` if it never does."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)


def assert_idle(server: RunningServer) -> None:
    """Wait until the engine has neither running nor queued rows."""
    engine = server.app.engine
    wait_until(lambda: engine.num_running == engine.num_queued == 0, "rows were left in the engine")


def scrape(server: RunningServer) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the server's metrics: values by name and sorted label values."""
    with urllib.request.urlopen(server.metrics_url) as response:
        text = response.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@contextmanager
def listening(
    models: Path, runtimes: Mapping[str, OpenGraph] = RUNTIMES, **settings: Any
) -> Iterator[RunningServer]:
    """Run a server that listens but has not loaded its models.

    Args:
        models: directory of artifacts.
        runtimes: functions that open graphs, by format.
        **settings: fields of `Config` that differ from SETTINGS.
    """
    server = RunningServer(Config(models=models, **{**SETTINGS, **settings}), runtimes)
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serving(models: Path, **settings: Any) -> Iterator[RunningServer]:
    """Run a server that has loaded its models; the arguments are those of `listening`."""
    with listening(models, **settings) as server:
        server.load()
        yield server
