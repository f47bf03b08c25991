"""Artifacts as they are written: models/<name>/<version>/, atomically.

Knows the layout and the manifest; no family. The directory appears complete and
verified under its name, or not at all.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format

from export.artifacts import golden, manifest
from export.artifacts.golden import Example
from export.artifacts.interpreter import eager_interpreter
from export.artifacts.reader import VERSION, ArtifactError, sha256, versions, write_manifest
from export.artifacts.verify import verify
from export.graphs import graph
from export.graphs.formats import DEFAULT_FORMATS
from export.graphs.program import DataSpec, Program
from samovar.v1 import manifest_pb2

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Model:
    """What an artifact holds: a family's programs, and what is known of them.

    `refusals` gives the reason for each operation that the model cannot truthfully have.
    """

    name: str
    family: str
    description: str
    data_spec: DataSpec
    programs: tuple[Program, ...]
    examples: tuple[Example, ...]
    provenance: manifest_pb2.Provenance = field(default_factory=manifest_pb2.Provenance)
    quality: tuple[manifest_pb2.Quality, ...] = ()
    attachments: Mapping[str, bytes] = field(default_factory=dict)
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)


def write(
    model: Model, models: Path, version: str | None = None, formats: Sequence[str] = DEFAULT_FORMATS
) -> Path:
    """Write models/<name>/<version>/ and verify it; returns the directory.

    Without a version, the next free one. ArtifactError when it exists already or
    what was written does not compute what the modules do; nothing is left behind.
    """
    target = resolve_destination(models, model.name, version)
    with _staging(target) as directory:
        write_manifest(_write_files(model, target.name, formats, directory), directory)
        for name, picture in model.attachments.items():
            (directory / name).write_bytes(picture)
        report = verify(directory)
        if report.failures:
            raise ArtifactError("the artifact was not written:\n  " + "\n  ".join(report.failures))
    return target


def resolve_destination(models: Path, name: str, version: str | None = None) -> Path:
    """Where an artifact would be written; ArtifactError when it cannot be."""
    if not _NAME.fullmatch(name):
        raise ArtifactError(f"expected a name of lower-case letters, digits and single hyphens, got {name!r}")
    chosen = version or str(max(versions(models / name), default=0) + 1)
    if not VERSION.fullmatch(chosen):
        raise ArtifactError(f"expected a positive integer as the version, got {chosen!r}")
    target = models / name / chosen
    if target.exists():
        raise ArtifactError(
            f"{target} exists already; leave the version out to get the next one, or remove it"
        )
    return target


def _write_files(model: Model, version: str, formats: Sequence[str], directory: Path) -> str:
    eager = eager_interpreter(model.data_spec, model.programs)
    whole = manifest_pb2.Manifest(
        format_version=manifest.FORMAT_VERSION,
        name=model.name,
        version=version,
        family=model.family,
        description=model.description,
        provenance=model.provenance,
        golden_rows=(golden.record(eager, example) for example in model.examples),
        quality=model.quality,
        unsupported_operations=model.unsupported_operations,
    )
    whole.MergeFrom(eager.manifest)
    for message, entry in zip(whole.graphs, graph.collect(model.programs), strict=True):
        message.files.extend(
            manifest_pb2.GraphFile(format=format, path=path.name, sha256=sha256(path.read_bytes()))
            for format, path in graph.write(entry, formats, directory).items()
        )
    return json_format.MessageToJson(whole, preserving_proto_field_name=True, indent=1) + "\n"


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A sibling directory that becomes the target when the block ends, and vanishes when it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield directory
        directory.chmod(0o755)
        for path in (*directory.iterdir(), directory):
            _flush(path)
        directory.rename(target)
        _flush(target.parent)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        if not any(target.parent.iterdir()):
            target.parent.rmdir()
        raise


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
