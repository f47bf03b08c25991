"""Unpack a bundle on the GPU machine: `python3 -m benchmarks.gpu.unpack`. Uses the standard library only."""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

BUNDLE = Path("build/gpu/bundle")
WHEELS, ARTIFACTS, TEST_ARTIFACTS = "wheels", "artifacts", "test-artifacts"
SITE, ONNXRUNTIME = "site", "onnxruntime"
PIECES = "onnxruntime-pieces"
CHECKSUMS = "SHA256SUMS"
PIP = ("install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check")


class IncompleteBundle(Exception):
    """A part of the bundle is missing or damaged; the message says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Unpack the bundle, or store pieces of onnxruntime-gpu that arrive one by one; return 0, or 1."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu.unpack", description=__doc__)
    parser.add_argument("--home", type=Path, required=True, help="directory to unpack to")
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="the bundle (default: %(default)s)")
    parser.add_argument("--receive", type=Path, nargs="+", metavar="FILE", help="store pieces, and stop")
    options = parser.parse_args(arguments)
    options.home.mkdir(parents=True, exist_ok=True)
    try:
        if options.receive:
            print(receive(options.receive, options.home))
        else:
            unpack(options.bundle, options.home)
            print(install_onnxruntime(options.home))
    except IncompleteBundle as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def unpack(bundle: Path, home: Path) -> None:
    """Install the wheels in `home`/site, and extract the artifacts; keep what the same files gave."""
    wheels = sorted((bundle / WHEELS).glob("*.whl"))
    if not wheels and not all((home / name).is_dir() for name in (SITE, ARTIFACTS, TEST_ARTIFACTS)):
        raise IncompleteBundle(f"{bundle} has no bundle: run `make gpu-bundle` and bring its output here")
    if wheels:
        _replace(home / SITE, wheels, lambda: _pip_install(wheels, home / SITE))
    for name in (ARTIFACTS, TEST_ARTIFACTS):
        if (archive := bundle / f"{name}.tar.xz").exists():
            _replace(home / name, [archive], partial(_extract, archive, home))


def receive(files: Sequence[Path], home: Path) -> str:
    """Store pieces of onnxruntime-gpu, or the list of their checksums; return what is still missing."""
    pieces = home / PIECES
    pieces.mkdir(parents=True, exist_ok=True)
    for file in files:
        if not file.is_file():
            raise IncompleteBundle(f"{file} is not here: bring it with this call")
        shutil.copyfile(file, pieces / file.name)
    missing = _missing_pieces(pieces)
    return f"missing: {', '.join(missing)}" if missing else "onnxruntime-gpu is complete"


def install_onnxruntime(home: Path) -> str:
    """Join the pieces of onnxruntime-gpu and install it in `home`/onnxruntime; return what was done."""
    pieces = home / PIECES
    if missing := _missing_pieces(pieces):
        return (
            f"ONNX on CUDA is skipped: onnxruntime-gpu lacks {', '.join(missing)}. "
            "To include it, run `benchmarks/gpu/check.sh --receive FILE ...` with these files first"
        )
    site = home / ONNXRUNTIME
    try:
        _replace(site, [pieces / CHECKSUMS], lambda: _pip_install([join(home)], site))
    except (IncompleteBundle, subprocess.CalledProcessError) as error:
        # Half of a package would hide the ONNX Runtime of the machine.
        shutil.rmtree(site, ignore_errors=True)
        return f"ONNX on CUDA is skipped: {error}"
    return "onnxruntime-gpu is installed"


def join(home: Path) -> Path:
    """Join the pieces of onnxruntime-gpu; return the wheel."""
    *pieces, (digest, name) = _checksums(home / PIECES)
    wheel = home / name
    with wheel.open("wb") as target:
        for _, piece in pieces:
            with (home / PIECES / piece).open("rb") as source:
                shutil.copyfileobj(source, target)
    if _sha256(wheel) != digest:
        raise IncompleteBundle(f"{name} is damaged: make the pieces again with `make gpu-bundle ONNX=1`")
    return wheel


def _replace(directory: Path, sources: Sequence[Path], make: Callable[[], None]) -> None:
    """Make a directory again, unless it was made from the same files and completely."""
    stamp = directory.with_name(f".{directory.name}.made-from")
    made_from = "".join(f"{_sha256(source)}  {source.name}\n" for source in sources)
    if stamp.exists() and stamp.read_text() == made_from:
        return
    stamp.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    make()
    stamp.write_text(made_from)


def _extract(archive: Path, home: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(home, filter="data")


def _missing_pieces(pieces: Path) -> list[str]:
    """Return the pieces that are absent or damaged; the last checksum is that of the whole wheel."""
    if not (pieces / CHECKSUMS).exists():
        return [CHECKSUMS]
    return [
        name
        for digest, name in _checksums(pieces)[:-1]
        if not (pieces / name).exists() or _sha256(pieces / name) != digest
    ]


def _checksums(pieces: Path) -> list[tuple[str, str]]:
    lines = (pieces / CHECKSUMS).read_text().splitlines()
    return [(digest, name) for digest, name in (line.split() for line in lines)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_install(wheels: Sequence[Path], target: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", *PIP, "--target", str(target), *map(str, wheels)], check=True
    )


if __name__ == "__main__":
    sys.exit(main())
