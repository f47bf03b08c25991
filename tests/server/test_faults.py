"""Faults that a runtime makes on demand, through a real server: what clients see, and what is counted."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import samovar
from server.core.spec import GraphSpec
from server.runtime import Device, Graph, OnnxGraph, Tensors
from tests.support.live_server import RunningServer, scrape, serving

MODEL = "digits-diffusion"
ROWS = 20


class Strike(BaseException):
    """What no graph should raise."""


@dataclass
class FaultyRuntime:
    """ONNX Runtime, but the next call of a graph raises what is in `errors`, or answers NaN."""

    errors: list[BaseException] = field(default_factory=list)
    is_poisoned: bool = False
    num_opened: int = 0

    def __call__(self, path: Path, spec: GraphSpec, device: Device) -> Graph:
        graph = OnnxGraph(path, spec, device)
        self.num_opened += 1

        def call(inputs: Tensors) -> Tensors:
            if self.errors:
                raise self.errors.pop()
            outputs = graph(inputs)
            return [poisoned(tensor) for tensor in outputs] if self.is_poisoned else outputs

        return call


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.nan if tensor.is_floating_point() else tensor


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """The model under test."""
    return models_of(MODEL)


@pytest.fixture(scope="module")
def runtime() -> FaultyRuntime:
    return FaultyRuntime()


@pytest.fixture(scope="module")
def server(
    models: Path, runtime: FaultyRuntime, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server of one model, over a runtime that fails when it is told to."""
    directory = tmp_path_factory.mktemp("faulty")
    shutil.copytree(models / MODEL, directory / MODEL)
    with serving(directory, runtimes={"onnx": runtime}, formats=("onnx",)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    """A client that does not retry by itself."""
    with samovar.Client(server.address, options=(("grpc.enable_retries", 0),)) as connected:
        yield connected


def sample(client: samovar.Client, rows: int = ROWS) -> bytes:
    return client.sample(MODEL, rows, seed=3, parameters={"steps": 4}).value.tobytes()


def sample_when_up(client: samovar.Client) -> bytes:
    """Sample, as a client that retries what was UNAVAILABLE."""
    for _ in range(10_000):
        try:
            return sample(client)
        except samovar.Unavailable:
            time.sleep(0.01)
    raise AssertionError("the engine did not come up again")


def faults(server: RunningServer) -> dict[str, float]:
    """How often each kind of fault was counted for samples."""
    kinds = ("graph", "non_finite", "out_of_memory")
    metrics = scrape(server)
    return {
        kind: metrics["samovar_execution_errors_total", tuple(sorted((kind, MODEL, "sample")))]
        for kind in kinds
    }


def num_restarts(server: RunningServer) -> float:
    return scrape(server)["samovar_engine_restarts_total", ()]


def test_a_graph_that_raises_is_an_internal_error_and_no_more(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), faults(server)
    runtime.errors.append(RuntimeError("secret detail"))
    with pytest.raises(samovar.ServerError, match="failed: RuntimeError") as failed:
        sample(client)
    assert failed.value.reason == "MODEL_FAILED"
    assert "secret" not in str(failed.value)
    assert faults(server) == before | {"graph": before["graph"] + 1}
    assert sample(client) == expected


def test_rows_that_are_no_numbers_are_an_internal_error_and_no_more(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), faults(server)
    runtime.is_poisoned = True
    with pytest.raises(samovar.ServerError, match="non-finite"):
        sample(client)
    runtime.is_poisoned = False
    assert faults(server) == before | {"non_finite": before["non_finite"] + ROWS}
    assert sample(client) == expected


def test_short_memory_is_nothing_that_a_client_notices(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), faults(server)
    runtime.errors.append(MemoryError())
    assert sample(client) == expected
    assert faults(server) == before | {"out_of_memory": before["out_of_memory"] + 1}


@pytest.mark.parametrize("error", [Strike(), RuntimeError("CUDA error: device-side assert triggered")])
def test_a_device_thread_that_is_struck_down_reloads_and_answers_the_same(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client, models: Path, error: BaseException
) -> None:
    expected, before = sample(client), num_restarts(server)
    runtime.num_opened, num_graphs = 0, len(list((models / MODEL / "1").glob("*.onnx")))
    runtime.errors.append(error)
    with pytest.raises(samovar.Unavailable, match="try again"):
        sample(client)
    assert sample_when_up(client) == expected
    assert runtime.num_opened == num_graphs
    assert num_restarts(server) == before + 1
