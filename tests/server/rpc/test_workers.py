"""gRPC worker processes: same responses as without workers, restart after a crash."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc
import numpy as np
import pytest

import samovar
from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from server.rpc import health
from server.rpc.workers import WorkerPool
from tests.support.live_server import (
    HANG_SECONDS,
    RunningServer,
    assert_idle,
    listening,
    scrape,
    serving,
    wait_until,
)

DIFFUSION, VAE = "digits-diffusion", "digits-vae"
# One format loads in a tenth of the time that all formats take.
ONNX = ("onnx",)

Parameters = Mapping[str, bool | int | float | str]


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """The model that the servers of single tests load."""
    return models_of(DIFFUSION)


@pytest.fixture(scope="module")
def worker_server(default_models: Path) -> Iterator[RunningServer]:
    """A server with two gRPC workers."""
    with serving(default_models, formats=ONNX, grpc_workers=2) as running:
        yield running


@pytest.fixture
def worker_client(worker_server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(worker_server.address, timeout=HANG_SECONDS) as connected:
        yield connected


def is_serving(server: RunningServer) -> bool:
    return asyncio.run(health.is_serving(server.address, 60.0))


def worker_pids(server: RunningServer) -> list[int]:
    workers = server.app.frontend
    assert isinstance(workers, WorkerPool)
    return workers.pids


def test_results_with_workers_equal_results_without_workers(
    client: samovar.Client, worker_client: samovar.Client
) -> None:
    parameters: Parameters = {"sampler": "ddim", "steps": 5, "eta": 0.5}
    images = client.sample(DIFFUSION, 20, seed=7, parameters=parameters).value
    assert np.array_equal(worker_client.sample(DIFFUSION, 20, seed=7, parameters=parameters).value, images)
    expected, actual = (
        connected.score(VAE, images, seed=3, parameters={"draws": 25})
        for connected in (client, worker_client)
    )
    assert actual.nats.tobytes() == expected.nats.tobytes()
    assert actual.run == expected.run


def rejection(client: samovar.Client, model: str, operation: str, parameters: Parameters) -> tuple[type, str]:
    """Return the type and the message of the error of a call with one image."""
    call = getattr(client, operation)
    with pytest.raises(samovar.SamovarError) as rejected:
        call(model, np.zeros((1, 8, 8), np.uint8), parameters=parameters)
    return rejected.type, str(rejected.value)


@pytest.mark.parametrize(
    ("model", "operation", "parameters"),
    [
        ("no-such-model", "score", {}),
        (VAE, "score", {"draws": 10**9}),
        (VAE, "score", {"warmth": 1}),
        (VAE, "energy", {}),
    ],
)
def test_errors_with_workers_equal_errors_without_workers(
    client: samovar.Client, worker_client: samovar.Client, model: str, operation: str, parameters: Parameters
) -> None:
    assert rejection(worker_client, model, operation, parameters) == rejection(
        client, model, operation, parameters
    )


def test_workers_list_the_same_models(client: samovar.Client, worker_client: samovar.Client) -> None:
    assert [model.name for model in worker_client.models()] == [model.name for model in client.models()]


def test_engine_rejections_reach_clients_of_workers(models: Path) -> None:
    with (
        serving(models, formats=ONNX, grpc_workers=1, max_queued_rows=200) as server,
        samovar.Client(server.address) as client,
    ):
        with client.stream(DIFFUSION, 200, preview_every=1, parameters={"steps": 200}) as stream:
            next(iter(stream))
            with pytest.raises(samovar.Overloaded) as rejected:
                client.sample(DIFFUSION, 200)
            assert rejected.value.retry_delay
        assert_idle(server)
        with pytest.raises(samovar.DeadlineExceeded):
            client.sample(DIFFUSION, 200, timeout=0.2, parameters={"steps": 200})
        assert_idle(server)


def test_previews_arrive_before_their_rows(worker_client: samovar.Client) -> None:
    with worker_client.stream(DIFFUSION, 8, seed=1, preview_every=2, parameters={"steps": 6}) as stream:
        events = list(stream)
    assert any(isinstance(event, samovar.Preview) for event in events)
    assert sum(len(event.indices) for event in events if isinstance(event, samovar.Rows)) == 8


def test_slow_reader_pauses_its_request(worker_server: RunningServer) -> None:
    engine = worker_server.app.engine
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    selector = pb.ModelSelector(name=DIFFUSION)
    with grpc.insecure_channel(worker_server.address, narrow) as channel:
        request = pb.SampleRequest(
            model=selector,
            rows=100_000,
            seed=1,
            parameters={"steps": pb.ParameterValue(integer_value=1)},
        )
        call = pb_grpc.InferenceStub(channel).Sample(request)
        next(call)
        wait_until(lambda: engine.num_queued > 0 and engine.num_running == 0, "the engine did not pause")
        call.cancel()
    assert_idle(worker_server)


def test_calls_of_workers_are_counted_in_server_metrics(models: Path) -> None:
    with serving(models, formats=ONNX, grpc_workers=1) as server, samovar.Client(server.address) as client:
        client.sample(DIFFUSION, 10, parameters={"steps": 4})
        key = ("samovar_requests_total", ("OK", "Sample", DIFFUSION))
        wait_until(lambda: scrape(server)[key] == 1, "the call was not counted")
        metrics = scrape(server)
        assert metrics["samovar_queue_duration_seconds_count", ("Sample", DIFFUSION)] == 1
        assert metrics["samovar_requests_in_flight", ()] == 0


def test_killed_worker_is_restarted_and_its_rows_are_freed(models: Path) -> None:
    with serving(models, formats=ONNX, grpc_workers=1) as server:
        (first,) = worker_pids(server)
        with (
            samovar.Client(server.address, timeout=HANG_SECONDS) as client,
            client.stream(DIFFUSION, 5_000, preview_every=1, parameters={"steps": 200}) as stream,
        ):
            events = iter(stream)
            next(events)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(samovar.SamovarError):
                list(events)
        assert_idle(server)
        wait_until(lambda: worker_pids(server) not in ([], [first]), "the worker was not restarted")
        wait_until(lambda: is_serving(server), "the restarted worker does not serve")
        with samovar.Client(server.address, timeout=HANG_SECONDS) as client:
            assert len(client.sample(DIFFUSION, 3, parameters={"steps": 2}).value) == 3
        assert scrape(server)["samovar_grpc_worker_restarts_total", ()] == 1
        in_flight = ("samovar_requests_in_flight", ())
        wait_until(lambda: scrape(server)[in_flight] == 0, "a failed call is still counted as in flight")


def test_workers_are_not_serving_until_models_are_loaded(models: Path) -> None:
    with listening(models, formats=ONNX, grpc_workers=1) as server:
        assert not is_serving(server)
        server.load()
        wait_until(lambda: is_serving(server), "the server did not start serving")


def test_workers_reject_a_port_in_use(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        expected = f"cannot bind 127.0.0.1:{port}: Address already in use; choose another port with --port"
        with pytest.raises(RuntimeError, match=expected):
            listening(models, grpc_workers=1, port=port).__enter__()
