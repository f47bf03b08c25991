"""Make the bundle for a GPU machine without network: `python -m benchmarks.gpu.bundle`.

It holds the wheels that the machine lacks, untrained artifacts of all families and those of the tests. The
wheel of onnxruntime-gpu is cut into pieces, because a connection may limit what travels at once.
"""

import argparse
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from benchmarks import artifacts
from benchmarks.gpu.unpack import ARTIFACTS, CHECKSUMS, PIECES, TEST_ARTIFACTS, WHEELS
from server.core.spec import FORMATS

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).parent / "wheels.txt"
ONNXRUNTIME = "onnxruntime-gpu==1.31.0"
# A glibc of 2.28 and later runs all of these.
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)), "manylinux2014_x86_64"]
# A piece travels with the checkout, in 64 MiB or less.
PIECE_BYTES = 49 << 20
_LIBRARIES = ("torch", "onnx", "onnxscript")
_CLIENT = ROOT / "clients" / "python"
_NOT_SOURCE = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the bundle, and print the size of what travels."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bundle", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("build/gpu"), metavar="DIR", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--python", default="3.12", metavar="X.Y", help="Python of the GPU machine (default: %(default)s)"
    )
    parser.add_argument("--onnxruntime", action="store_true", help=f"cut {ONNXRUNTIME} into pieces as well")
    options = parser.parse_args(arguments)
    bundle = options.out / "bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    download_wheels(bundle / WHEELS, options.python)
    pack(make_artifacts(options.out / ARTIFACTS), bundle)
    pack(make_test_artifacts(options.out / TEST_ARTIFACTS), bundle)
    print(f"checkout: {_mebibytes(_tracked_files()):.1f} MiB")
    for path in sorted(bundle.iterdir()):
        print(f"{path}: {_mebibytes([path]):.1f} MiB")
    if options.onnxruntime:
        wheel = download_onnxruntime(options.out / "onnxruntime", options.python)
        for piece in cut(wheel, options.out / PIECES):
            print(f"{piece}: {_mebibytes([piece]):.1f} MiB")


def download_wheels(directory: Path, python: str) -> None:
    """Download the wheels of wheels.txt, and build those of the client and the project."""
    # Two versions of a package cannot be installed.
    shutil.rmtree(directory, ignore_errors=True)
    _pip("download", "--requirement", str(REQUIREMENTS), "--dest", str(directory), *_target(python))
    with tempfile.TemporaryDirectory() as copies:
        # A build in the checkout leaves copies of modules there, which the next build takes for modules.
        client, project = Path(copies) / "client", Path(copies) / "project"
        shutil.copytree(_CLIENT, client, ignore=_NOT_SOURCE)
        # The metadata of the project itself: its packages run from the checkout.
        project.mkdir()
        shutil.copy(ROOT / "pyproject.toml", project)
        _pip("wheel", "--no-deps", "--wheel-dir", str(directory), str(client), str(project))


def download_onnxruntime(directory: Path, python: str) -> Path:
    """Download onnxruntime-gpu; return the wheel."""
    _pip("download", ONNXRUNTIME, "--dest", str(directory), *_target(python))
    name = ONNXRUNTIME.replace("-", "_").replace("==", "-")
    return next(directory.glob(f"{name}-cp{python.replace('.', '')}-*.whl"))


def make_artifacts(directory: Path) -> Path:
    """Make untrained artifacts of all families, again if the exporter has changed; return `directory`."""
    stamp, made_from = directory / ".made-from", hash_of_exporter()
    if not stamp.exists() or stamp.read_text() != made_from:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        stamp.write_text(made_from)
    return artifacts.make(tuple(artifacts.FAMILIES), directory, "starter", FORMATS)


def hash_of_exporter() -> str:
    """Return a hash of the code that makes artifacts, and of the libraries that it uses."""
    digest = hashlib.sha256(repr([importlib.metadata.version(name) for name in _LIBRARIES]).encode())
    for source in (*sorted((ROOT / "export").rglob("*.py")), Path(artifacts.__file__)):
        digest.update(f"{source.relative_to(ROOT)}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def make_test_artifacts(directory: Path) -> Path:
    """Make the artifacts of the tests; return `directory`."""
    from tests.support import artifact_cache
    from tests.support.datasets import DEFAULT_PAIRS

    directory.mkdir(parents=True, exist_ok=True)
    artifact_cache.copy(DEFAULT_PAIRS, FORMATS, directory)
    return directory


def pack(directory: Path, bundle: Path) -> Path:
    """Write a directory to BUNDLE/NAME.tar.xz, with its own name as the root; return the archive."""
    path = bundle / f"{directory.name}.tar.xz"
    with tarfile.open(path, "w:xz") as archive:
        archive.add(directory, directory.name, filter=_without_hidden)
    return path


def _without_hidden(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out directories whose names start with a dot, which hold links into this machine."""
    return None if Path(member.name).name.startswith(".") else member


def cut(wheel: Path, directory: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Cut a wheel into pieces, and write their checksums and that of the wheel; return the pieces."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    pieces, lines, whole = [], [], hashlib.sha256()
    for number, data in enumerate(_blocks(wheel, piece_bytes)):
        piece = directory / f"piece-{number:02}"
        piece.write_bytes(data)
        pieces.append(piece)
        whole.update(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  {piece.name}")
    lines.append(f"{whole.hexdigest()}  {wheel.name}")
    (directory / CHECKSUMS).write_text("\n".join(lines) + "\n")
    return pieces


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(size):
            yield data


def _target(python: str) -> list[str]:
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    return [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--python-version",
        python,
        "--implementation",
        "cp",
        *platforms,
    ]


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments[1:]], check=True)


def _tracked_files() -> list[Path]:
    """Return the files of the checkout that travel; none if it is not under Git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    return [ROOT / name for name in names.split("\0") if name]


def _mebibytes(paths: Iterable[Path]) -> float:
    """Return the size of files, and of the files in directories."""
    files = (file for path in paths for file in (path.rglob("*") if path.is_dir() else (path,)))
    return sum(file.stat().st_size for file in files if file.is_file()) / (1 << 20)


if __name__ == "__main__":
    main()
