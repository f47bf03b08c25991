"""Artifacts on disk: read and validated.

No graph is opened here: the digest of a file shows that it is the exported one, and the replay of golden
rows that it computes what it should.
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
    """Read and validate the artifact directory models/<name>/<version>.

    Raises:
        InvalidArtifact: lists every violation, in one line.
    """
    text, digest = _read_manifest(directory)
    validation.check_format_version(text)
    message = _parse(text)
    violations = list(validation.violations(message, directory)) or list(_changed_files(message, directory))
    if violations:
        raise InvalidArtifact("; ".join(violations))
    return message, manifest.model_spec(message, directory, digest)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(directory: Path) -> tuple[str, str]:
    """Return the text of the manifest and its digest, once it agrees with the checksum file."""
    try:
        data = (directory / MANIFEST).read_bytes()
        text = data.decode("utf-8")
        checksum = (directory / CHECKSUM).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArtifact(f"cannot read the manifest: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    if checksum != [digest, MANIFEST]:
        raise InvalidArtifact(f"{MANIFEST} does not match {CHECKSUM}: it was changed after export")
    return text, digest


def _parse(text: str) -> manifest_pb2.Manifest:
    try:
        return json_format.Parse(text, manifest_pb2.Manifest())
    except json_format.ParseError as error:
        reason = " ".join(str(error).split())
        raise InvalidArtifact(f"{MANIFEST} is not a manifest: {reason}") from error


def _changed_files(message: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    for graph in message.graphs:
        for file in graph.files:
            if sha256(directory / file.path) != file.sha256:
                yield f"{file.path} does not have the SHA-256 in the manifest: it was changed after export"
