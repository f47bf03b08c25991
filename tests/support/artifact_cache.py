"""Untrained artifacts, built once and kept on disk under a hash of everything that they depend on.

Exporting a graph takes seconds and there are hundreds of them, so that a second run of the tests reuses
those of the first. Comments and docstrings are not part of the hash.
"""

import ast
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

from export import pipeline
from export.families import FAMILIES
from tests.support.datasets import Pair

ROOT = Path(__file__).parents[2]
CACHE = ROOT / "build" / "test-artifacts"
_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "scikit-learn", "protobuf")
# Sources that decide what an artifact holds, besides the modules of its family.
_SHARED = (
    "export/pipeline.py",
    "export/families/base.py",
    "export/families/classifier.py",
    *(f"export/{folder}" for folder in ("artifacts", "datasets", "evaluation", "graphs", "probability")),
    "clients/python/samovar",
    "tests/support/datasets.py",
)


def artifact(pair: Pair, formats: Sequence[str]) -> Path:
    """Return a pair's artifact directory <name>, and build it first when it is not cached."""
    directory = CACHE / _key(pair, tuple(formats))
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        if not (directory / pair.model).exists():
            _build(pair, formats, directory)
    return directory / pair.model


def link(pairs: Iterable[Pair], formats: Sequence[str], models: Path) -> Path:
    """Fill a models directory with links to the artifacts of these pairs."""
    for pair in pairs:
        (models / pair.model).symlink_to(artifact(pair, formats), target_is_directory=True)
    return models


def _build(pair: Pair, formats: Sequence[str], directory: Path) -> None:
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
    family = FAMILIES[pair.family].module.replace(".", "/")
    digest = hashlib.sha256(repr((pair, formats, sys.version_info[:2])).encode())
    for library in _LIBRARIES:
        digest.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    for source in _sources((*_SHARED, family, f"{family}.py")):
        digest.update(f"{source.relative_to(ROOT)}\n{_code(source)}\n".encode())
    return f"{pair.model}-{digest.hexdigest()[:16]}"


def _sources(paths: Iterable[str]) -> Iterator[Path]:
    for path in paths:
        source = ROOT / path
        yield from sorted(source.rglob("*.py")) if source.is_dir() else filter(Path.exists, [source])


@cache
def _code(source: Path) -> str:
    """Return a module's syntax tree without its docstrings."""
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
