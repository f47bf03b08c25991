"""Atomic writing of artifacts to models/<name>/<version>/.

The directory appears complete and verified under its final name, or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from google.protobuf import json_format

from export.artifacts import golden, manifest
from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, eager_interpreter
from export.artifacts.reader import VERSION, ArtifactError, sha256, versions, write_manifest
from export.artifacts.verify import verify
from export.graphs import graph
from export.graphs.formats import DEFAULT_FORMATS
from export.graphs.graph import Graph
from export.graphs.program import DataSpec, Program
from samovar.v1 import manifest_pb2

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Model:
    """The definition of a model: its programs, and the requests for its golden rows.

    `unsupported_operations` gives the reason for each operation that the model cannot have. The graphs and
    the interpreter are built once, on first use.
    """

    name: str
    family: str
    description: str
    data_spec: DataSpec
    programs: tuple[Program, ...]
    examples: tuple[Example, ...]
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def graphs(self) -> Sequence[Graph]:
        """The graphs of all programs."""
        return graph.collect(self.programs)

    @cached_property
    def interpreter(self) -> Interpreter:
        """An interpreter that runs the programs by their modules."""
        return eager_interpreter(self.data_spec, self.programs, self.graphs)


@dataclass(frozen=True)
class Metadata:
    """The parts of an artifact that no program computes; `attachments` holds further files by name."""

    provenance: manifest_pb2.Provenance = field(default_factory=manifest_pb2.Provenance)
    quality: Sequence[manifest_pb2.Quality] = ()
    attachments: Mapping[str, bytes] = field(default_factory=dict)


def resolve_destination(models: Path, name: str, version: str | None = None) -> Path:
    """Return the directory models/<name>/<version> for a new artifact.

    Args:
        models: The directory of all artifacts.
        name: The name of the model.
        version: A positive integer; the next free version if None.

    Raises:
        ArtifactError: If the name or the version is invalid, or the version exists.
    """
    if not _NAME.fullmatch(name):
        raise ArtifactError(
            f"artifact name: expected lower-case letters, digits and single hyphens, got {name!r}"
        )
    version = version or str(max(versions(models / name), default=0) + 1)
    if not VERSION.fullmatch(version):
        raise ArtifactError(f"artifact version: expected a positive integer, got {version!r}")
    _check_absent(models / name / version)
    return models / name / version


def write(
    model: Model,
    directory: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    metadata: Metadata | None = None,
) -> None:
    """Write an artifact and verify it.

    Args:
        model: The programs to write, with their golden requests.
        directory: A directory from `resolve_destination`.
        formats: The formats of each graph.
        metadata: Provenance, quality figures and further files.

    Raises:
        ArtifactError: If the directory exists, or the files do not compute what the modules compute. Nothing
            is left behind.
        GraphError: If a module cannot be exported. Nothing is left behind.
    """
    _check_absent(directory)
    metadata = metadata or Metadata()
    with _staging(directory) as staging:
        message = _manifest(model, directory.name, metadata)
        for entry, source in zip(message.graphs, model.graphs, strict=True):
            entry.files.extend(
                manifest_pb2.GraphFile(format=format, path=path.name, sha256=sha256(path.read_bytes()))
                for format, path in graph.write(source, formats, staging).items()
            )
        text = json_format.MessageToJson(message, preserving_proto_field_name=True, indent=1)
        write_manifest(text + "\n", staging)
        for name, content in metadata.attachments.items():
            (staging / name).write_bytes(content)
        failures = verify(staging).failures
        if failures:
            raise ArtifactError(
                "verification failed, so the artifact was not written:\n  " + "\n  ".join(failures)
            )


def _check_absent(directory: Path) -> None:
    if directory.exists():
        raise ArtifactError(
            f"{directory} exists already; omit the version to get the next one, or remove the directory"
        )


def _manifest(model: Model, version: str, metadata: Metadata) -> manifest_pb2.Manifest:
    """Return the manifest without the graph files."""
    message = manifest_pb2.Manifest(
        format_version=manifest.FORMAT_VERSION,
        name=model.name,
        version=version,
        family=model.family,
        description=model.description,
        provenance=metadata.provenance,
        golden_rows=(golden.record(model.interpreter, example) for example in model.examples),
        quality=metadata.quality,
        unsupported_operations=model.unsupported_operations,
    )
    message.MergeFrom(model.interpreter.manifest)
    return message


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yield a sibling directory that is renamed to the target on success and removed on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield directory
        directory.chmod(0o755)
        for path in (*directory.iterdir(), directory):
            _sync_to_disk(path)
        directory.rename(target)
        _sync_to_disk(target.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        if not any(target.parent.iterdir()):
            target.parent.rmdir()
        raise


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
