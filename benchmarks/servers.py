"""Servers in processes of their own, with their CPU time, memory and metrics. Requires Linux (/proc)."""

import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.runtime.onnx import has_cuda_provider

START_SECONDS = 120.0
_LOG_CHARACTERS = 2000
_PORTS = re.compile(r"listening on .*:(\d+); metrics on port (\d+)")


@dataclass(frozen=True)
class Server:
    """Running server process; `log` is what it has written to standard error, if it is kept."""

    address: str
    pid: int
    metrics_port: int = 0
    log: Path | None = None

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the process and its descendants so far."""
        ticks = sum(int(stat[11]) + int(stat[12]) for stat in _process_tree(self.pid))
        return ticks / os.sysconf("SC_CLK_TCK")

    @property
    def resident_bytes(self) -> int:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s*(\d+)", status)[0])

    def metric(self, name: str) -> float:
        """Return the sum of a Prometheus metric over its labels."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=10) as response:
            lines = response.read().decode().splitlines()
        series = (line.split() for line in lines if re.match(rf"{name}[{{ ]", line))
        return sum(float(fields[-1]) for fields in series)

    def step_metrics(self) -> tuple[float, float]:
        """Return the seconds spent in steps, and the number of steps, since the start."""
        return self.metric("samovar_step_duration_seconds_sum"), self.metric("samovar_steps_total")


@cache
def device() -> str:
    """Return the device of servers and loops: cuda if both torch and ONNX Runtime can use it, else cpu."""
    return "cuda" if torch.cuda.is_available() and has_cuda_provider() else "cpu"


@contextmanager
def samovar_server(
    models: Path, *options: str, batching: str = "step", log: Path | None = None
) -> Iterator[Server]:
    """Start a server over a directory of artifacts, ready for calls, with a mode of benchmarks.batching.

    Args:
        models: directory of the artifacts.
        *options: command line of the server.
        batching: the mode.
        log: file for what the server writes to standard error (default: a temporary one).

    Raises:
        RuntimeError: the server exited, or does not serve after START_SECONDS; with the end of its log.
    """
    command = [sys.executable, "-m", "benchmarks.batching", batching, "--models", str(models)]
    command += ["--port", "0", "--metrics-port", "0", "--max-rows-per-request", "200000"]
    command += ["--device", device(), *options]
    with tempfile.TemporaryDirectory() as directory:
        log = log or Path(directory) / "log"
        with log.open("w") as file, _running(command, stderr=file) as process:
            match = _wait_for_ports(process, log)
            server = Server(f"127.0.0.1:{match[1]}", process.pid, int(match[2]), log)
            _wait_until_serving(server.address)
            yield server


@contextmanager
def noop_server(reply_bytes: int) -> Iterator[Server]:
    """Start benchmarks/noop_server.py."""
    with _running([sys.executable, "-m", "benchmarks.noop_server", str(reply_bytes)]) as process:
        assert process.stdout is not None
        yield Server(f"127.0.0.1:{process.stdout.readline().strip()}", process.pid)


@contextmanager
def _running(command: list[str], stderr: IO[str] | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def _wait_for_ports(process: subprocess.Popen[str], log: Path) -> re.Match[str]:
    """Return the ports that a server has written to its log."""
    deadline = time.monotonic() + START_SECONDS
    while (match := _PORTS.search(log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {log.read_text()[-_LOG_CHARACTERS:]}")
        time.sleep(0.02)
    return match


def _wait_until_serving(address: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    with grpc.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while check(health_pb2.HealthCheckRequest()).status != health_pb2.HealthCheckResponse.SERVING:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{address}: not SERVING after {START_SECONDS:.0f} s")
            time.sleep(0.05)


def _process_tree(pid: int) -> list[list[str]]:
    """Return the fields of /proc/PID/stat for a process and its descendants."""
    stats = {int(path.name): _stat(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    tree = [pid]
    for parent in tree:  # The list grows while it is iterated.
        tree += [child for child, stat in stats.items() if stat and int(stat[1]) == parent]
    return [stat for member in tree if (stat := stats.get(member))]


def _stat(process: Path) -> list[str]:
    """Return the fields after the process name; [] if the process has ended."""
    with suppress(OSError):
        return (process / "stat").read_text().rpartition(")")[2].split()
    return []
