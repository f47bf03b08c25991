"""The client's examples run as a reader runs them, warnings being errors."""

import subprocess
import sys
from pathlib import Path

from tests.serving import RunningServer

RECIPES = Path(__file__).parent.parent / "clients" / "python" / "examples"


def run(recipe: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(RECIPES / f"{recipe}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def cook(server: RunningServer, recipe: str, *words: object) -> str:
    ended = run(recipe, "--address", server.address, *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
