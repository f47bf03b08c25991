"""The distribution: what it exports, and that it stays light."""

import subprocess
import sys

import samovar


def test_everything_exported_exists_and_is_sorted() -> None:
    assert all(hasattr(samovar, name) for name in samovar.__all__)
    assert len(set(samovar.__all__)) == len(samovar.__all__)


def test_importing_the_client_brings_nothing_heavy() -> None:
    """Only what pyproject.toml declares: a fresh interpreter imports all of it without torch."""
    program = """
import importlib, pkgutil, sys, samovar
for module in pkgutil.iter_modules(samovar.__path__):
    if module.name != "__main__":
        importlib.import_module(f"samovar.{module.name}")
heavy = {"torch", "onnxruntime", "scipy", "PIL", "pandas", "server", "export", "google.rpc", "grpc_status"}
print(sorted(heavy & set(sys.modules)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
