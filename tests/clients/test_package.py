"""Tests of the package: public names and imports."""

import subprocess
import sys

import samovar


def test_public_names_exist_once() -> None:
    assert all(hasattr(samovar, name) for name in samovar.__all__)
    assert len(set(samovar.__all__)) == len(samovar.__all__)


def test_import_loads_only_declared_dependencies() -> None:
    """A fresh interpreter imports all modules without torch, extras or packages of the applications."""
    program = """
import importlib, pkgutil, sys, samovar
for module in pkgutil.iter_modules(samovar.__path__):
    if module.name != "__main__":
        importlib.import_module(f"samovar.{module.name}")
undeclared = {"torch", "onnxruntime", "scipy", "PIL", "pandas", "mido", "server", "export", "grpc_status"}
print(sorted(undeclared & set(sys.modules)))
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


def test_midi_without_mido_raises_error_that_names_the_extra() -> None:
    program = """
import sys
sys.modules["mido"] = None
from samovar import midi
try:
    midi.encode([["60"] * 4])
except ImportError as error:
    print(error)
"""
    completed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "pip install 'samovar[midi]'" in completed.stdout
