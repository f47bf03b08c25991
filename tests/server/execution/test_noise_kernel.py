"""Kernel of random numbers, run by the interpreter of Triton and compiled for GPUs. Neither needs a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not available for this platform")

ROOT = Path(__file__).parents[3]

INTERPRET = """
import numpy as np
import torch
from samovar import noise
from server.core.spec import NoiseSpec, TensorSpec
from server.execution.noise import kernel
from server.execution.noise.device import check_kernel

check_kernel(kernel.draw, torch.device("cpu"))
random = np.random.default_rng(0)
seeds = random.integers(0, 2**64, 9, dtype=np.uint64)
rows, steps = random.integers(0, 2**32, 9), random.integers(0, 1000, 9)
keys = [torch.from_numpy(array) for array in (seeds.view(np.int64), rows, steps)]
for shape in ((), (1,), (5,), (3, 32, 32)):
    for distribution in ("uniform", "normal"):
        out = torch.zeros((9, *shape))
        kernel.draw(NoiseSpec(TensorSpec("noise", "float32", shape), distribution, 3), *keys, out)
        expected = getattr(noise, distribution)(seeds, rows, steps, 3, shape)
        assert out.numpy().tobytes() == expected.tobytes(), (distribution, shape)
"""

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from server.execution.noise import kernel

pointers = {"out": "*fp32", "seeds": "*i64", "rows": "*i64", "steps": "*i64"}
signature = {**pointers, "stream": "i32", "count": "i32", "IS_NORMAL": "constexpr", "BLOCKS": "constexpr"}
for capability in (75, 80, 90):
    for is_normal in (True, False):
        source = ASTSource(kernel._draw, signature, {"IS_NORMAL": is_normal, "BLOCKS": 128})
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def run(script: str, directory: Path, **environment: str) -> None:
    """Run a script in a process of its own: Triton reads its settings when it is imported."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(directory), **environment}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=500, check=False
    )
    assert finished.returncode == 0, finished.stderr


def test_kernel_draws_the_numbers_of_the_seed_contract(tmp_path: Path) -> None:
    run(INTERPRET, tmp_path, TRITON_INTERPRET="1")


def test_kernel_compiles_for_gpus(tmp_path: Path) -> None:
    run(COMPILE, tmp_path)
