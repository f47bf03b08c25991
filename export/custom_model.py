"""Models of one's own: what a Python file outside of this repository needs to become an artifact.

Such a file names its MODEL: what a row is, and the programs that compute it, as
functions or modules whose argument names say what they read. `python -m export write
FILE` exports it, verifies it and leaves it where a server finds it. docs/custom-models.md
explains, examples/ shows.
"""

import ast
import importlib.metadata
import importlib.util
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from google.protobuf import timestamp_pb2
from numpy.typing import NDArray
from torch import Tensor, nn

from export.artifacts import writer
from export.artifacts.golden import Example
from export.artifacts.reader import ArtifactError, sha256
from export.graphs import graph
from export.graphs.formats import DEFAULT_FORMATS
from export.graphs.graph import GraphError
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from samovar.v1 import manifest_pb2

__all__ = [
    "DataSpec",
    "Example",
    "Input",
    "Model",
    "Noise",
    "Parameter",
    "Program",
    "Score",
    "Steps",
    "TensorSpec",
    "module",
]

_LIBRARIES = ("samovar-applications", "torch", "onnx", "onnxruntime", "numpy")


class CustomModelError(ValueError):
    """A file that does not name a model that can be exported; the message says where, and why."""


@dataclass(frozen=True)
class Model:
    """What a file of one's own exports, under the name MODEL.

    Left out: `name` is the file's, `description` the first line of its docstring, and
    `examples`, the golden rows, two requests to each program with drawn inputs: one
    with the parameters' defaults, one half-way to their minima.
    """

    data_spec: DataSpec
    programs: tuple[Program, ...]
    name: str = ""
    description: str = ""
    family: str = "own"
    examples: tuple[Example, ...] = ()
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)


def module(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> nn.Module:
    """A function of tensors [B, ...] as a module of a program: its argument names say what it reads."""
    made: nn.Module = type(function.__name__, (nn.Module,), {"forward": staticmethod(function)})()
    return made


def write(path: Path, models: Path, name: str = "", formats: Sequence[str] = DEFAULT_FORMATS) -> Path:
    """Export the MODEL of a file and verify it; returns the artifact's directory.

    OwnFileError, GraphError or ArtifactError, and nothing is left behind, when the file,
    its programs, its functions or what they compute are not sound.
    """
    model = load(path)
    with _blaming(path):
        whole = _completed(model, path, name)
        return writer.write(whole, models, formats=formats)


def load(path: Path) -> Model:
    """Run a file and take its MODEL, in evaluation mode; OwnFileError where that fails."""
    if not path.is_file() or path.suffix != ".py":
        raise CustomModelError(f"{path}: expected a Python file that names its MODEL, found none")
    with _blaming(path), _importing_beside(path):
        model = getattr(_run(path), "MODEL", None)
    if not isinstance(model, Model):
        found = "found none" if model is None else f"got a {type(model).__name__}"
        raise CustomModelError(f"{path}: expected MODEL, an export.own.Model, {found}")
    for problem in _problems(model):
        raise CustomModelError(f"{path}: MODEL: {problem}")
    for program in model.programs:
        for _, part, _ in program.modules:
            part.eval()
    return model


def _problems(model: Model) -> Iterator[str]:
    if not isinstance(model.data_spec, DataSpec):
        yield f"expected a Value as its value, got a {type(model.data_spec).__name__}"
    if not isinstance(model.programs, tuple) or not model.programs:
        yield f"expected a tuple of programs, got {model.programs!r:.60}"
    elif strangers := [each for each in model.programs if not isinstance(each, Program)]:
        yield f"expected programs only, got a {type(strangers[0]).__name__} among them"


def _run(path: Path) -> ModuleType:
    # A name that no other module has, and that TorchScript can spell.
    name = "own_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = made
    try:
        spec.loader.exec_module(made)
    finally:
        del sys.modules[spec.name]
    return made


@contextmanager
def _importing_beside(path: Path) -> Iterator[None]:
    """The file may import its neighbours, as it could when it is run by itself."""
    sys.path.append(str(path.parent.resolve()))
    try:
        yield
    finally:
        sys.path.pop()


@contextmanager
def _blaming(path: Path) -> Iterator[None]:
    """Say in which line of the file something went wrong, instead of through which of ours it came."""
    try:
        yield
    except (ArtifactError, CustomModelError):
        raise
    except Exception as error:  # the file may raise anything
        place, source = _place(error, path)
        if isinstance(error, GraphError):
            raise GraphError(f"{error}{source}") from error
        reason = (error.msg if isinstance(error, SyntaxError) else str(error)).strip().partition("\n")[0]
        hint = "; @module makes a module of a function" if "no attribute 'forward'" in reason else ""
        raise CustomModelError(f"{place}: {type(error).__name__}: {reason}{hint}{source}") from error


def _place(error: BaseException, path: Path) -> tuple[str, str]:
    """File and line that an error was raised in or through, and the line itself, as far as they are known."""
    if isinstance(error, SyntaxError) and _is_same(error.filename or "", path):
        return f"{path}:{error.lineno}", f"\n    {(error.text or '').strip()}"
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += [f for f in traceback.extract_tb(cause.__traceback__) if _is_same(f.filename, path)]
        cause = cause.__cause__ or cause.__context__
    if not frames:
        return str(path), ""
    return f"{path}:{frames[-1].lineno}", f"\n    line {frames[-1].lineno}: {frames[-1].line}"


def _is_same(filename: str, path: Path) -> bool:
    return Path(filename).resolve() == path.resolve()


def _completed(model: Model, path: Path, name: str) -> writer.Model:
    for entry in graph.collect(model.programs):
        graph.check_module(entry)
    return writer.Model(
        name=name or model.name or re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-"),
        family=model.family,
        description=model.description or _summary(path),
        data_spec=model.data_spec,
        programs=model.programs,
        examples=model.examples or tuple(_examples(model)),
        provenance=_provenance(path),
        unsupported_operations=model.unsupported_operations,
    )


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0] or f"Exported from {path.name}."


def _provenance(path: Path) -> manifest_pb2.Provenance:
    return manifest_pb2.Provenance(
        created=timestamp_pb2.Timestamp(seconds=int(time.time())),
        library_versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        settings={"file": path.name, "file_sha256": sha256(path.read_bytes())},
    )


def _examples(model: Model) -> Iterator[Example]:
    for program in model.programs:
        needed = [given.tensor for given in program.inputs if not given.optional]
        every = [given.tensor for given in program.inputs]
        halfway = {each.name: _halfway(each) for each in program.parameters}
        yield Example(program.name, seed=1, inputs=_draw(needed, model.data_spec, seed=1))
        yield Example(
            program.name,
            seed=2,
            first_row=5,
            parameters=halfway,
            inputs=_draw(every, model.data_spec, seed=2),
        )


def _halfway(parameter: Parameter) -> float:
    middle = (parameter.minimum + parameter.default) / 2
    return middle if parameter.type == "float" else float(math.floor(middle))


def _draw(tensors: Sequence[TensorSpec], value: DataSpec, seed: int) -> dict[str, NDArray[Any]]:
    """Rows of inputs, within their bounds: normal where they are unbounded, uniform otherwise."""
    random = np.random.default_rng(seed)
    return {tensor.name: _rows(tensor, value, random) for tensor in tensors}


def _rows(tensor: TensorSpec, value: DataSpec, random: np.random.Generator) -> NDArray[Any]:
    shape, low, high = (Example.rows, *tensor.shape), tensor.minimum, tensor.maximum
    if tensor.dtype.startswith("float"):
        if low is not None and high is not None:
            return random.uniform(low, high, shape).astype(tensor.dtype)
        return np.clip(random.normal(size=shape), low, high).astype(tensor.dtype)
    if high is None:
        is_value = tensor.name == value.tensor.name
        high = max(value.num_levels, len(value.vocabulary), 2) - 1 if is_value else max(low or 0, 1)
    return random.integers(int(low or 0), int(high), shape, endpoint=True).astype(tensor.dtype)
