"""Server lifecycle: health, metrics, reflection, draining, and the `python -m server` process."""

import asyncio
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import samovar
from server.rpc import health
from server.runtime import RUNTIMES
from tests.support.live_server import HANG_SECONDS, RunningServer, listening, scrape, serving, wait_until

ROOT = Path(__file__).parents[2]
DIFFUSION = "digits-diffusion"


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """Artifacts of the two models that these tests use."""
    return models_of(DIFFUSION, "digits-vae")


def is_serving(server: RunningServer) -> bool:
    return asyncio.run(health.is_serving(server.address, 60.0))


def test_server_is_not_serving_until_models_are_loaded(models: Path) -> None:
    with listening(models, formats=("onnx",)) as server:
        assert not is_serving(server)
        with samovar.Client(server.address, timeout=2.0) as client, pytest.raises(samovar.SamovarError):
            client.models()
        server.load()
        assert is_serving(server)
        server.stop()
        assert not is_serving(server)


@pytest.mark.parametrize("grpc_workers", [0, 2])
def test_shutdown_lets_calls_in_flight_finish(models: Path, grpc_workers: int) -> None:
    with (
        serving(models, formats=("onnx",), drain_timeout=HANG_SECONDS, grpc_workers=grpc_workers) as server,
        samovar.Client(server.address, timeout=HANG_SECONDS) as client,
    ):
        parameters = {"steps": 20}
        with client.stream(DIFFUSION, 200, seed=1, preview_every=1, parameters=parameters) as stream:
            events = iter(stream)
            next(events)
            stopper = threading.Thread(target=server.stop)
            stopper.start()
            rows = sum(len(event.indices) for event in events if isinstance(event, samovar.Rows))
        stopper.join()
    assert rows == 200


def test_metrics_count_calls_rows_and_steps(models_of: Callable[..., Path]) -> None:
    models = models_of(DIFFUSION)
    with serving(models) as server, samovar.Client(server.address) as client:
        client.sample(DIFFUSION, 10, parameters={"steps": 4})
        with pytest.raises(samovar.ModelNotFound):
            client.sample("no-such-model", 1)
        metrics = scrape(server)
    assert metrics["samovar_requests_total", ("OK", "Sample", DIFFUSION)] == 1
    assert not any("no-such-model" in labels for _, labels in metrics)
    assert metrics["samovar_rows_total", (DIFFUSION, "sample")] == 10
    assert metrics["samovar_steps_total", (DIFFUSION, "onnx", "sample")] == 4
    assert metrics["samovar_step_rows_sum", (DIFFUSION, "onnx", "sample")] == 40
    assert metrics["samovar_request_duration_seconds_count", ("Sample", DIFFUSION)] == 1
    assert metrics["samovar_queue_duration_seconds_count", ("Sample", DIFFUSION)] == 1
    assert metrics["samovar_queued_rows", ()] == metrics["samovar_running_rows", ()] == 0
    infos = [value for (name, _), value in metrics.items() if name == "samovar_model_info"]
    assert infos == [1.0] * len(RUNTIMES) * len(list(models.iterdir()))
    assert any(name == "samovar_build_info" for name, _ in metrics)


def test_calls_above_concurrency_limit_are_rejected_and_counted(models: Path) -> None:
    with (
        serving(models, formats=("onnx",), max_concurrent_calls=1) as server,
        samovar.Client(server.address) as client,
    ):
        with client.stream(DIFFUSION, 500, preview_every=1, parameters={"steps": 200}) as stream:
            next(iter(stream))
            with pytest.raises(samovar.Overloaded, match="limit of 1 concurrent calls") as rejected:
                client.models()
            assert rejected.value.retry_delay
            assert is_serving(server)
        wait_until(lambda: server.app.engine.num_running == 0, "rows were left in the engine")
        assert client.models()
        metrics = scrape(server)
    assert metrics["samovar_requests_total", ("", "ListModels", "RESOURCE_EXHAUSTED")] == 1
    assert metrics["samovar_requests_in_flight", ()] == 0


def test_server_info_reports_limits(tmp_path: Path) -> None:
    settings = {
        "max_queued_rows": 900,
        "max_buffered_mib": 3,
        "max_batch_rows": 16,
        "max_message_mib": 2,
        "max_concurrent_calls": 5,
        "drr_quantum_rows": 4,
        "intra_op_threads": 1,
        "formats": ("torchscript", "onnx"),
    }
    with serving(tmp_path, **settings) as server, samovar.Client(server.address) as client:
        info = client.server_info()
    reported = {**dataclasses.asdict(info), "max_buffered_mib": info.max_buffered_bytes >> 20}
    reported["max_message_mib"] = info.max_message_bytes >> 20
    assert {name: reported[name] for name in settings} == settings
    assert info.max_rows_per_request == 900
    assert info.drain_timeout_seconds == 5.0
    assert info.grpc_workers == 0


def test_duration_metrics_end_in_seconds(server: RunningServer) -> None:
    names = {name for name, _ in scrape(server)}
    durations = {name for name in names if "duration" in name}
    assert durations
    assert all(
        re.fullmatch(r"samovar_\w+_seconds(_bucket|_sum|_count|_created)?", name) for name in durations
    )


def test_reflection_lists_services(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        response = next(iter(stub.ServerReflectionInfo(iter([request]))))
    services = {service.name for service in response.list_services_response.service}
    assert {"samovar.v1.Inference", "grpc.health.v1.Health"} <= services


@pytest.fixture
def process(models: Path) -> Iterator[subprocess.Popen[str]]:
    """`python -m server` on free ports."""
    command = [sys.executable, "-m", "server", "--models", str(models), "--port", "0", "--metrics-port", "0"]
    command += ["--formats", "onnx,torchscript"]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    )
    yield started
    started.kill()
    started.wait()
    assert started.stdout
    started.stdout.close()


def test_process_prints_served_models_and_exits_with_0_on_sigterm(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Try in another shell" in line:
            break
    output = "".join(lines)
    assert "digits-vae/1" in output
    address = re.search(r"--address (\S+)", output)
    assert address
    with samovar.Client(address[1]) as client:
        assert len(client.sample("digits-vae", 3).value) == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0
    assert "Traceback" not in process.stdout.read()


def failed_start(*flags: str) -> str:
    """Return the line that a server logs when it cannot start."""
    command = [sys.executable, "-m", "server", "--port", "0", "--metrics-port", "0", *flags]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr
    (line,) = [line for line in finished.stderr.splitlines() if "cannot serve" in line]
    return line


def test_failed_start_logs_one_line_with_flag_and_exits_with_1(models: Path) -> None:
    assert "--device cuda:77" in failed_start("--models", str(models), "--device", "cuda:77")


def test_start_without_models_directory_fails_with_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="nowhere: no such directory"),
        listening(tmp_path / "nowhere"),
    ):
        pass


@pytest.mark.parametrize("setting", ["port", "metrics_port"])
def test_start_on_a_used_port_fails_with_cause_and_flag(models: Path, setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flag = f"--{setting.replace('_', '-')}"
        reason = f"cannot bind 127.0.0.1:{port}: Address already in use; choose another port with {flag}"
        with pytest.raises(RuntimeError, match=reason), listening(models, **{setting: port}):
            pass


def test_second_interrupt_ends_process_immediately(process: subprocess.Popen[str]) -> None:
    assert process.stdout
    address = next(match[1] for line in process.stdout if (match := re.search(r"--address (\S+)", line)))
    with (
        samovar.Client(address, timeout=HANG_SECONDS) as client,
        client.stream(DIFFUSION, 50_000, preview_every=1, parameters={"steps": 200}) as stream,
    ):
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        assert any("stopping" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait() != 0
