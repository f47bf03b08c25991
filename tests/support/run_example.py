"""Subprocesses that run the client's examples and conformance suite, with warnings as errors."""

import subprocess
import sys
from pathlib import Path

from tests.support.live_server import RunningServer

CLIENT = Path(__file__).parents[2] / "clients" / "python"
EXAMPLES = CLIENT / "examples"


def run_example(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an example of the client and return its exit status and output."""
    return _run([str(EXAMPLES / f"{name}.py"), *map(str, arguments)])


def run_example_on(server: RunningServer, name: str, *arguments: object) -> str:
    """Run an example against a server, expect success, and return its standard output."""
    process = run_example(name, "--address", server.address, *arguments)
    assert process.returncode == 0, process.stderr
    return process.stdout


def run_conformance(server: RunningServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the conformance suite against a server and return its exit status and output."""
    return _run(["-m", "conformance", "--address", server.address, *map(str, arguments)])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=CLIENT, capture_output=True, text=True
    )
