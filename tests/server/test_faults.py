"""Failing graphs, injected into a real server: what clients receive and what metrics count."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

import samovar
from server.core.spec import GraphSpec
from server.runtime import RUNTIMES, Device, Graph, Tensors
from tests.support.live_server import SETTINGS, RunningServer, scrape, serving

MODEL = "digits-diffusion"
ROWS = 20
GRAPH_FILES = {"onnx": "*.onnx", "torchscript": "*.pt"}


class UnexpectedGraphError(BaseException):
    """An exception that the engine does not expect from a graph."""


@dataclass
class FaultyRuntime:
    """A runtime whose graphs fail on demand.

    Attributes:
        format: format of the graphs.
        errors: the next calls of graphs raise these exceptions, the last one first.
        returns_nan: whether graphs return NaN in all floating-point outputs.
        num_opened: number of graphs that were opened.
    """

    format: str
    errors: list[BaseException] = field(default_factory=list)
    returns_nan: bool = False
    num_opened: int = 0

    def __call__(self, path: Path, spec: GraphSpec, device: Device) -> Graph:
        graph = RUNTIMES[self.format](path, spec, device)
        self.num_opened += 1

        def call(inputs: Tensors) -> Tensors:
            if self.errors:
                raise self.errors.pop()
            outputs = graph(inputs)
            return [replace_by_nan(tensor) for tensor in outputs] if self.returns_nan else outputs

        return call


def replace_by_nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * torch.nan if tensor.is_floating_point() else tensor


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """Artifacts with the model under test only."""
    return models_of(MODEL)


@pytest.fixture(scope="module")
def runtime() -> FaultyRuntime:
    # ONNX Runtime for the CPU cannot use a GPU.
    return FaultyRuntime("onnx" if SETTINGS["device"] == "cpu" else "torchscript")


@pytest.fixture(scope="module")
def server(
    models: Path, runtime: FaultyRuntime, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server of one model in a runtime that fails on demand."""
    directory = tmp_path_factory.mktemp("faulty")
    shutil.copytree(models / MODEL, directory / MODEL)
    # A CUDA graph would hold the kernels of a call, but not the faults.
    settings = {"formats": (runtime.format,), "cuda_graphs": False}
    with serving(directory, runtimes={runtime.format: runtime}, **settings) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    """A client without automatic retries."""
    with samovar.Client(server.address, options=(("grpc.enable_retries", 0),)) as connected:
        yield connected


def sample(client: samovar.Client, rows: int = ROWS) -> bytes:
    return client.sample(MODEL, rows, seed=3, parameters={"steps": 4}).value.tobytes()


def sample_with_retries(client: samovar.Client) -> bytes:
    """Sample, and retry while the server is UNAVAILABLE."""
    for _ in range(10_000):
        try:
            return sample(client)
        except samovar.Unavailable:
            time.sleep(0.01)
    raise AssertionError("the engine did not restart")


def execution_errors(server: RunningServer) -> dict[str, float]:
    """Return the counted execution errors of the sample program, by kind."""
    kinds = ("graph", "non_finite", "out_of_memory")
    metrics = scrape(server)
    return {
        kind: metrics["samovar_execution_errors_total", tuple(sorted((kind, MODEL, "sample")))]
        for kind in kinds
    }


def num_restarts(server: RunningServer) -> float:
    return scrape(server)["samovar_engine_restarts_total", ()]


def test_graph_that_raises_fails_only_its_request_without_details(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), execution_errors(server)
    runtime.errors.append(RuntimeError("secret detail"))
    with pytest.raises(samovar.ServerError, match="failed: RuntimeError") as failed:
        sample(client)
    assert failed.value.reason == "MODEL_FAILED"
    assert "secret" not in str(failed.value)
    assert execution_errors(server) == before | {"graph": before["graph"] + 1}
    assert sample(client) == expected


def test_nonfinite_rows_fail_only_their_request(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), execution_errors(server)
    runtime.returns_nan = True
    with pytest.raises(samovar.ServerError, match="non-finite"):
        sample(client)
    runtime.returns_nan = False
    assert execution_errors(server) == before | {"non_finite": before["non_finite"] + ROWS}
    assert sample(client) == expected


def test_out_of_memory_batch_is_retried_unnoticed_by_client(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client
) -> None:
    expected, before = sample(client), execution_errors(server)
    runtime.errors.append(MemoryError())
    assert sample(client) == expected
    assert execution_errors(server) == before | {"out_of_memory": before["out_of_memory"] + 1}


@pytest.mark.parametrize(
    "error", [UnexpectedGraphError(), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_device_thread_crash_reloads_graphs_and_keeps_results(
    server: RunningServer, runtime: FaultyRuntime, client: samovar.Client, models: Path, error: BaseException
) -> None:
    expected, before = sample(client), num_restarts(server)
    files = (models / MODEL / "1").glob(GRAPH_FILES[runtime.format])
    runtime.num_opened, num_graphs = 0, len(list(files))
    runtime.errors.append(error)
    with pytest.raises(samovar.Unavailable, match="the engine failed; retry"):
        sample(client)
    assert sample_with_retries(client) == expected
    assert runtime.num_opened == num_graphs
    assert num_restarts(server) == before + 1
