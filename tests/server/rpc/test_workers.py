"""Front ends in processes of their own: they answer as the engine's process would, and may end before it."""

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
from tests.support.live_server import RunningServer, assert_idle, listening, scrape, serving, wait_until

DIFFUSION, VAE = "digits-diffusion", "digits-vae"
# One format loads in a tenth of the time of all.
ONNX = ("onnx",)

Parameters = Mapping[str, bool | int | float | str]


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """The model that the servers of single tests load."""
    return models_of(DIFFUSION)


@pytest.fixture(scope="module")
def fronted(default_models: Path) -> Iterator[RunningServer]:
    with serving(default_models, formats=ONNX, grpc_workers=2) as running:
        yield running


@pytest.fixture
def far(fronted: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(fronted.address, timeout=60.0) as connected:
        yield connected


def processes(server: RunningServer) -> list[int]:
    edge = server.app.edge
    assert isinstance(edge, WorkerPool)
    return edge.pids


def test_rows_have_the_bytes_that_they_have_without_grpc_workers(
    client: samovar.Client, far: samovar.Client
) -> None:
    parameters: Parameters = {"sampler": "ddim", "steps": 5, "eta": 0.5}
    images = client.sample(DIFFUSION, 20, seed=7, parameters=parameters).value
    assert np.array_equal(far.sample(DIFFUSION, 20, seed=7, parameters=parameters).value, images)
    near, distant = (each.score(VAE, images, seed=3, parameters={"draws": 25}) for each in (client, far))
    assert near.nats.tobytes() == distant.nats.tobytes()
    assert near.run == distant.run


def refusal(client: samovar.Client, model: str, operation: str, parameters: Parameters) -> tuple[type, str]:
    """The kind and the words of the error with which a call of one image ends."""
    call = getattr(client, operation)
    with pytest.raises(samovar.SamovarError) as refused:
        call(model, np.zeros((1, 8, 8), np.uint8), parameters=parameters)
    return refused.type, str(refused.value)


@pytest.mark.parametrize(
    ("model", "operation", "parameters"),
    [
        ("no-such-model", "score", {}),
        (VAE, "score", {"draws": 10**9}),
        (VAE, "score", {"warmth": 1}),
        (VAE, "energy", {}),
    ],
)
def test_refusals_are_the_same(
    client: samovar.Client, far: samovar.Client, model: str, operation: str, parameters: Parameters
) -> None:
    assert refusal(far, model, operation, parameters) == refusal(client, model, operation, parameters)


def test_the_models_are_the_same(client: samovar.Client, far: samovar.Client) -> None:
    assert [model.name for model in far.models()] == [model.name for model in client.models()]


def test_what_the_engine_refuses_comes_back_as_it_was(models: Path) -> None:
    with (
        serving(models, formats=ONNX, grpc_workers=1, max_queued_rows=200) as server,
        samovar.Client(server.address) as client,
    ):
        with client.stream(DIFFUSION, 200, preview_every=1, parameters={"steps": 200}) as stream:
            next(iter(stream))
            with pytest.raises(samovar.Overloaded) as refused:
                client.sample(DIFFUSION, 200)
            assert refused.value.retry_delay
        assert_idle(server)
        with pytest.raises(samovar.DeadlineExceeded):
            client.sample(DIFFUSION, 200, timeout=0.2, parameters={"steps": 200})
        assert_idle(server)


def test_previews_come_before_their_rows(far: samovar.Client) -> None:
    with far.stream(DIFFUSION, 8, seed=1, preview_every=2, parameters={"steps": 6}) as stream:
        events = list(stream)
    assert any(isinstance(event, samovar.Preview) for event in events)
    assert sum(len(event.indices) for event in events if isinstance(event, samovar.Rows)) == 8


def test_a_slow_reader_is_not_computed_for_without_bound(fronted: RunningServer) -> None:
    engine = fronted.app.engine
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    selector = pb.ModelSelector(name=DIFFUSION)
    with grpc.insecure_channel(fronted.address, narrow) as channel:
        call = pb_grpc.InferenceStub(channel).Sample(pb.SampleRequest(model=selector, rows=100_000, seed=1))
        next(call)
        wait_until(lambda: engine.num_queued > 0 and engine.num_running == 0, "the engine did not pause")
        call.cancel()
    assert_idle(fronted)


def test_calls_are_counted_where_the_metrics_are(models: Path) -> None:
    with serving(models, formats=ONNX, grpc_workers=1) as server, samovar.Client(server.address) as client:
        client.sample(DIFFUSION, 10, parameters={"steps": 4})
        key = ("samovar_requests_total", ("OK", "Sample", DIFFUSION))
        wait_until(lambda: scrape(server)[key] == 1, "the call was not counted")
        metrics = scrape(server)
        assert metrics["samovar_queue_duration_seconds_count", ("Sample", DIFFUSION)] == 1
        assert metrics["samovar_requests_in_flight", ()] == 0


def test_one_that_is_killed_is_replaced_and_its_rows_are_freed(models: Path) -> None:
    with serving(models, formats=ONNX, grpc_workers=1) as server:
        (first,) = processes(server)
        with (
            samovar.Client(server.address, timeout=60.0) as client,
            client.stream(DIFFUSION, 5_000, preview_every=1, parameters={"steps": 200}) as stream,
        ):
            events = iter(stream)
            next(events)
            os.kill(first, signal.SIGKILL)
            with pytest.raises(samovar.SamovarError):
                list(events)
        assert_idle(server)
        wait_until(lambda: processes(server) not in ([], [first]), "it was not replaced")
        with samovar.Client(server.address, timeout=60.0) as client:
            assert len(client.sample(DIFFUSION, 3, parameters={"steps": 2}).value) == 3
        assert scrape(server)["samovar_grpc_worker_restarts_total", ()] == 1
        in_flight = ("samovar_requests_in_flight", ())
        wait_until(lambda: scrape(server)[in_flight] == 0, "a call that died is still counted")


def test_they_are_not_serving_until_the_models_are_loaded(models: Path) -> None:
    with listening(models, formats=ONNX, grpc_workers=1) as server:
        assert not asyncio.run(health.is_serving(server.address, 60.0))
        server.load()
        wait_until(lambda: asyncio.run(health.is_serving(server.address, 60.0)), "it never served")


def test_a_port_that_another_has_is_refused(models: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"{port} cannot be listened on; ask for another with --port"):
            listening(models, grpc_workers=1, port=port).__enter__()
