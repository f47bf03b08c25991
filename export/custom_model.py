"""Custom models: export of a model that a user defines in a Python file.

The file defines MODEL: the type of a data row, and the programs that compute rows. Programs are functions or
modules whose argument names state what they read. `python -m export export FILE` writes the artifact and
verifies it. docs/custom-models.md is the guide, examples/ has complete files.
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
    """Raised for a file that does not define a valid MODEL; the message names the line and the reason."""


@dataclass(frozen=True)
class Model:
    """The model that a Python file exports under the name MODEL.

    Attributes:
        data_spec: The type of a data row.
        programs: The operations of the model.
        name: The artifact's name; by default the name of the file.
        description: One line for users; by default the first line of the file's docstring.
        family: The kind of model.
        examples: The requests for golden rows. By default each program has two with random inputs: one with
            default parameters, one with parameters halfway between minimum and default.
        unsupported_operations: The reason for each operation that the model cannot have.
    """

    data_spec: DataSpec
    programs: tuple[Program, ...]
    name: str = ""
    description: str = ""
    family: str = "custom"
    examples: tuple[Example, ...] = ()
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)


def module(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> nn.Module:
    """Return a module that computes a function of tensors [B, ...]; its argument names bind it."""
    return type(function.__name__, (nn.Module,), {"forward": staticmethod(function)})()  # type: ignore[no-any-return]


def write(path: Path, models: Path, name: str = "", formats: Sequence[str] = DEFAULT_FORMATS) -> Path:
    """Export the MODEL of a file and verify the artifact.

    Args:
        path: A Python file that defines MODEL.
        models: The directory of all artifacts.
        name: The artifact's name; the name from MODEL or the file if empty.
        formats: The formats of each graph.

    Returns:
        The artifact's directory.

    Raises:
        CustomModelError: If the file cannot be run, or MODEL is invalid.
        GraphError: If a module is impure, or cannot be exported.
        ArtifactError: If the name cannot be used, or verification fails. No error leaves files behind.
    """
    model = load(path)
    with _locate_errors(path):
        definition = writer.Model(
            name=name or model.name or re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-"),
            family=model.family,
            description=model.description or _summary(path),
            data_spec=model.data_spec,
            programs=model.programs,
            examples=model.examples or tuple(_default_examples(model)),
            unsupported_operations=model.unsupported_operations,
        )
        for entry in definition.graphs:
            graph.check_module(entry)
        directory = writer.resolve_destination(models, definition.name)
        writer.write(definition, directory, formats, writer.Metadata(_provenance(path)))
    return directory


def load(path: Path) -> Model:
    """Run a file and return its MODEL, with all modules in evaluation mode.

    Raises:
        CustomModelError: If the file cannot be run, or MODEL is invalid.
    """
    if not path.is_file() or path.suffix != ".py":
        raise CustomModelError(f"{path}: expected a Python file (*.py) that defines MODEL, found none")
    with _locate_errors(path), _importable_directory(path):
        model = getattr(_run(path), "MODEL", None)
    if not isinstance(model, Model):
        found = "found none" if model is None else f"got a {type(model).__name__}"
        raise CustomModelError(f"{path}: expected MODEL, an export.custom_model.Model, {found}")
    _check_types(model, path)
    for program in model.programs:
        for _, part, _ in program.modules:
            part.eval()
    return model


def _check_types(model: Model, path: Path) -> None:
    if not isinstance(model.data_spec, DataSpec):
        raise CustomModelError(
            f"{path}: MODEL: data_spec: expected a DataSpec, got a {type(model.data_spec).__name__}"
        )
    if not isinstance(model.programs, tuple) or not model.programs:
        raise CustomModelError(
            f"{path}: MODEL: programs: expected a tuple of programs, got {model.programs!r:.60}"
        )
    for program in model.programs:
        if not isinstance(program, Program):
            raise CustomModelError(
                f"{path}: MODEL: programs: expected only Program objects, got a {type(program).__name__}"
            )


def _run(path: Path) -> ModuleType:
    # The name must differ from all other modules, and be an identifier for TorchScript.
    name = "custom_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    # The dataclass decorator looks up its module in sys.modules.
    sys.modules[spec.name] = loaded
    try:
        spec.loader.exec_module(loaded)
    finally:
        del sys.modules[spec.name]
    return loaded


@contextmanager
def _importable_directory(path: Path) -> Iterator[None]:
    """Let the file import modules from its own directory, as a script can."""
    sys.path.append(str(path.parent.resolve()))
    try:
        yield
    finally:
        sys.path.pop()


@contextmanager
def _locate_errors(path: Path) -> Iterator[None]:
    """Add the line of the user's file to every error, instead of a traceback through the exporter."""
    try:
        yield
    except (ArtifactError, CustomModelError):
        raise
    except Exception as error:  # The file may raise any exception.
        location, source = _find_source(error, path)
        if isinstance(error, GraphError):
            raise GraphError(f"{error}{source}") from error
        message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        hint = "; use @module to make a module of a function" if "no attribute 'forward'" in message else ""
        raise CustomModelError(f"{location}: {type(error).__name__}: {message}{hint}{source}") from error


def _find_source(error: BaseException, path: Path) -> tuple[str, str]:
    """Return the location in the file that raised or passed on an error, and its source line if known."""
    if isinstance(error, SyntaxError) and _is_same(error.filename or "", path):
        return f"{path}:{error.lineno}", f"\n    {(error.text or '').strip()}"
    frames: list[traceback.FrameSummary] = []
    cause: BaseException | None = error
    while cause is not None:
        frames += [
            frame for frame in traceback.extract_tb(cause.__traceback__) if _is_same(frame.filename, path)
        ]
        cause = cause.__cause__ or cause.__context__
    if not frames:
        return str(path), ""
    return f"{path}:{frames[-1].lineno}", f"\n    line {frames[-1].lineno}: {frames[-1].line}"


def _is_same(filename: str, path: Path) -> bool:
    return Path(filename).resolve() == path.resolve()


def _summary(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0] or f"Exported from {path.name}."


def _provenance(path: Path) -> manifest_pb2.Provenance:
    return manifest_pb2.Provenance(
        created=timestamp_pb2.Timestamp(seconds=int(time.time())),
        library_versions={name: importlib.metadata.version(name) for name in _LIBRARIES},
        settings={"file": path.name, "file_sha256": sha256(path.read_bytes())},
    )


def _default_examples(model: Model) -> Iterator[Example]:
    for program in model.programs:
        required = [entry.tensor for entry in program.inputs if not entry.optional]
        all_inputs = [entry.tensor for entry in program.inputs]
        yield Example(program.name, seed=1, inputs=_random_inputs(required, model.data_spec, seed=1))
        yield Example(
            program.name,
            seed=2,
            first_row=5,
            parameters={parameter.name: _halfway(parameter) for parameter in program.parameters},
            inputs=_random_inputs(all_inputs, model.data_spec, seed=2),
        )


def _halfway(parameter: Parameter) -> float:
    middle = (parameter.minimum + parameter.default) / 2
    return middle if parameter.type == "float" else float(math.floor(middle))


def _random_inputs(tensors: Sequence[TensorSpec], data_spec: DataSpec, seed: int) -> dict[str, NDArray[Any]]:
    """Return random rows of each tensor: uniform if it is bounded on both sides, else clipped normal."""
    generator = np.random.default_rng(seed)
    return {tensor.name: _random_rows(tensor, data_spec, generator) for tensor in tensors}


def _random_rows(tensor: TensorSpec, data_spec: DataSpec, generator: np.random.Generator) -> NDArray[Any]:
    shape, low, high = (Example.rows, *tensor.shape), tensor.minimum, tensor.maximum
    if tensor.dtype.startswith("float"):
        if low is not None and high is not None:
            return generator.uniform(low, high, shape).astype(tensor.dtype)
        return np.clip(generator.normal(size=shape), low, high).astype(tensor.dtype)
    if high is None:
        is_data = tensor.name == data_spec.tensor.name
        high = max(data_spec.num_levels, len(data_spec.vocabulary), 2) - 1 if is_data else max(low or 0, 1)
    return generator.integers(int(low or 0), int(high), shape, endpoint=True).astype(tensor.dtype)
