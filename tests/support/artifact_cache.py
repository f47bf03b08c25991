"""Cache of untrained artifacts on disk, under a hash of everything that an artifact depends on.

An artifact takes up to 30 s of CPU time to export. A second run of the tests reuses the artifacts of the
first one, and parallel workers share the exports between them. The hash covers the code of every module
that the export imports, without comments and docstrings, and the versions of the libraries.

The environment variable SAMOVAR_TEST_ARTIFACTS names a directory of artifacts that `copy` made on another
machine, which are used as they are.
"""

import ast
import hashlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from export import pipeline
from export.families import FAMILIES
from tests.support.datasets import Pair

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "test-artifacts"
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "scikit-learn", "protobuf")
# Roots of the packages whose modules are part of the hash.
_PACKAGES = {"export": ROOT, "samovar": ROOT / "clients" / "python", "tests": ROOT}
_WAIT_FOREVER = -1.0


def link(pairs: Sequence[Pair], formats: Sequence[str], directory: Path) -> Path:
    """Fill a models directory with links to the artifacts of `pairs`; export those that are not cached."""
    # The first pass skips what another worker exports at the moment, the second pass waits for it.
    for pair in pairs:
        with suppress(Timeout):
            artifact(pair, formats, timeout=0)
    for pair in pairs:
        (directory / pair.model).symlink_to(artifact(pair, formats), target_is_directory=True)
    return directory


def copy(pairs: Sequence[Pair], formats: Sequence[str], directory: Path) -> None:
    """Copy the artifacts of `pairs` to a directory, for the tests of another machine."""
    for pair in pairs:
        shutil.copytree(artifact(pair, formats), directory / pair.model, dirs_exist_ok=True)


def artifact(pair: Pair, formats: Sequence[str], timeout: float = _WAIT_FOREVER) -> Path:
    """Return the directory of an artifact, which holds its version 1; export it when it is not cached.

    Args:
        pair: family and data set of the artifact.
        formats: formats of its graphs.
        timeout: seconds to wait while another process exports the same artifact.

    Raises:
        Timeout: the other process needs longer.
    """
    directory = os.environ.get("SAMOVAR_TEST_ARTIFACTS")
    if directory and (ready := Path(directory).resolve() / pair.model).is_dir():
        return ready
    entry = CACHE / _key(pair, tuple(formats))
    entry.mkdir(parents=True, exist_ok=True)
    with FileLock(entry / "lock", timeout):
        if not (entry / pair.model).exists():
            _export(pair, formats, entry)
    return entry / pair.model


def _export(pair: Pair, formats: Sequence[str], directory: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    family = FAMILIES[pair.family].load()
    try:
        pipeline.export_untrained(
            pipeline.TrainingJob(family, pair.dataset(), directory, preset="tiny", formats=tuple(formats))
        )
    finally:
        torch.set_num_threads(threads)


@cache
def _key(pair: Pair, formats: tuple[str, ...]) -> str:
    """Return the name of a cache entry: the model and the hash of what it depends on."""
    digest = hashlib.sha256(repr((pair, formats, sys.version_info[:2])).encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    roots = ("export.pipeline", "tests.support.datasets", FAMILIES[pair.family].module)
    for source in sorted(_import_closure(roots)):
        digest.update(f"{source.relative_to(ROOT)}\n{_code(source)}\n".encode())
    return f"{pair.model}-{digest.hexdigest()[:16]}"


def _import_closure(modules: Iterable[str]) -> set[Path]:
    """Return the files of the modules and of everything that they import from this repository."""
    found: set[Path] = set()
    pending = list(filter(None, map(_file, modules)))
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += _imports(source)
    return found


def _file(module: str) -> Path | None:
    """Return the file of a module or package of this repository, and None for any other name."""
    package, *rest = module.split(".")
    if package not in _PACKAGES:
        return None
    path = _PACKAGES[package].joinpath(package, *rest)
    return next(filter(Path.is_file, (path / "__init__.py", path.with_suffix(".py"))), None)


@cache
def _imports(source: Path) -> tuple[Path, ...]:
    """Return the files that a file imports, inside functions too."""
    files = list[Path | None]()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            files += [_file(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # What is imported from a package is a module of it, or else something that it defines.
            files += [_file(f"{node.module}.{alias.name}") or _file(node.module) for alias in node.names]
    return tuple(filter(None, files))


@cache
def _code(source: Path) -> str:
    """Return the syntax tree of a file without its docstrings."""
    tree = ast.parse(source.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            body[0] = ast.Pass()
    return ast.dump(tree)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
