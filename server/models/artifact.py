"""An artifact on disk: read it whole, doubt it, and say what it promises.

Nothing here opens a graph: that a file is the one that was exported is checked by
its digest, that it computes what it should by the repository's golden rows.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import json_format

from samovar.v1 import manifest_pb2
from server.core.errors import InvalidArtifact
from server.core.spec import ModelSpec
from server.models import manifest, validation

MANIFEST = "manifest.json"
CHECKSUM = "manifest.sha256"


def read(directory: Path) -> tuple[manifest_pb2.Manifest, ModelSpec]:
    """The manifest of an artifact directory models/<name>/<version>, and what it promises.

    Raises ArtifactRefused, in one line, when anything about it is wrong.
    """
    text, digest = _read_sealed(directory)
    message = _parse(text)
    problems = list(validation.problems(message, directory)) or list(_changed_files(message, directory))
    if problems:
        raise InvalidArtifact("; ".join(problems))
    return message, manifest.model_spec(message, directory, digest)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_sealed(directory: Path) -> tuple[str, str]:
    try:
        data = (directory / MANIFEST).read_bytes()
        text = data.decode("utf-8")
        seal = (directory / CHECKSUM).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"cannot read the manifest: {error}") from None
    digest = hashlib.sha256(data).hexdigest()
    if seal != [digest, MANIFEST]:
        raise InvalidArtifact(
            f"{MANIFEST} is not the file that {CHECKSUM} was made for: it was changed after export"
        )
    return text, digest


def _parse(text: str) -> manifest_pb2.Manifest:
    try:
        return json_format.Parse(text, manifest_pb2.Manifest())
    except json_format.ParseError as error:
        raise InvalidArtifact(f"{MANIFEST} is not a manifest: {' '.join(str(error).split())}") from None


def _changed_files(message: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    for graph in message.graphs:
        for file in graph.files:
            if sha256(directory / file.path) != file.sha256:
                yield f"{file.path} does not have the SHA-256 in the manifest: it was changed after export"
