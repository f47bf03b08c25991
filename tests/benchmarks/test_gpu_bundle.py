"""The bundle of the GPU check, and the script that unpacks it."""

import hashlib
import os
import random
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import bundle, unpack

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "benchmarks" / "gpu" / "check.sh"
PIECE_BYTES = 1000


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "onnxruntime_gpu-1.0-py3-none-any.whl"
    path.write_bytes(random.Random(0).randbytes(4500))
    return path


def check(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run check.sh, with the interpreter of the tests unless PATH is given."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = {**os.environ, "SAMOVAR_GPU_HOME": str(home), "PATH": path, **environment}
    return subprocess.run([CHECK, *arguments], env=variables, capture_output=True, text=True, check=False)


def test_pieces_received_in_any_order_are_joined(wheel: Path, tmp_path: Path) -> None:
    pieces = bundle.cut(wheel, tmp_path / "pieces", PIECE_BYTES)
    random.Random(1).shuffle(pieces)
    checksums, home = tmp_path / "pieces" / unpack.CHECKSUMS, tmp_path / "home"
    for piece in pieces[:3]:
        assert check("--receive", str(piece), home=home).stdout == "missing: SHA256SUMS\n"
    rest = ", ".join(sorted(piece.name for piece in pieces[3:]))
    assert check("--receive", str(checksums), home=home).stdout == f"missing: {rest}\n"
    last = check("--receive", *map(str, pieces[3:]), home=home)
    assert last.stdout == "onnxruntime-gpu is complete\n"
    assert unpack.join(home).read_bytes() == wheel.read_bytes()


def test_piece_that_was_damaged_is_missing_until_it_is_received_again(wheel: Path, tmp_path: Path) -> None:
    pieces, home = bundle.cut(wheel, tmp_path / "pieces", PIECE_BYTES), tmp_path / "home"
    unpack.receive([*pieces, tmp_path / "pieces" / unpack.CHECKSUMS], home)
    (home / unpack.PIECES / pieces[2].name).write_bytes(bytes(PIECE_BYTES))
    assert unpack.receive([pieces[0]], home) == "missing: piece-02"
    assert unpack.receive([pieces[2]], home) == "onnxruntime-gpu is complete"


def test_pieces_cut_again_replace_the_old_ones(wheel: Path, tmp_path: Path) -> None:
    bundle.cut(wheel, tmp_path / "pieces", PIECE_BYTES)
    bundle.cut(wheel, tmp_path / "pieces", 3 * PIECE_BYTES)
    names = sorted(path.name for path in (tmp_path / "pieces").iterdir())
    assert names == [unpack.CHECKSUMS, "piece-00", "piece-01"]
    # `sha256sum --check` can read the list too.
    digest = hashlib.sha256((tmp_path / "pieces" / "piece-00").read_bytes()).hexdigest()
    assert f"{digest}  piece-00\n" in (tmp_path / "pieces" / unpack.CHECKSUMS).read_text()


def test_wheels_are_pinned() -> None:
    lines = bundle.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    assert len({pin.partition("==")[0] for pin in pins}) == len(pins)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A directory for PATH whose python3 unpacks nothing and runs a check that writes two results."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(
        "#!/bin/sh\n"
        'case "$2" in benchmarks.gpu) ;; *) exit 0 ;; esac\n'
        'results="$6"; mkdir -p "$results/files/tests"; echo "$PYTHONPATH"\n'
        'echo {} > "$results/noise.json"; echo page > "$results/gpu.md"\n'
        'echo x > "$results/files/tests/output"\n'
        "exit 3\n"
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python.parent


def test_results_are_copied_to_out_and_the_exit_code_is_kept(machine: Path, tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    out.mkdir()
    run = check("noise", home=home, OUT=str(out), PATH=f"{machine}:{os.environ['PATH']}")
    assert run.returncode == 3, run.stderr
    assert sorted(path.name for path in out.iterdir()) == ["check.log", "gpu.md", "logs.tar.gz", "noise.json"]
    assert (out / "check.log").read_text() == run.stdout
    # Modules of the checkout come before those of wheels.
    path = [f"{home}/onnxruntime", str(ROOT), f"{ROOT}/clients/python", f"{home}/site"]
    assert run.stdout.splitlines()[0].split(":") == path
