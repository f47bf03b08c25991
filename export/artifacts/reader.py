"""Artifact directories: their layout, and how to read them as a manifest and runnable programs."""

import hashlib
import re
from pathlib import Path

from google.protobuf import json_format

from export.artifacts.interpreter import Interpreter
from export.graphs import graph
from samovar.v1 import manifest_pb2

MANIFEST = "manifest.json"
# In the format of sha256sum, so that `sha256sum -c manifest.sha256` checks it too.
CHECKSUM = "manifest.sha256"
VERSION = re.compile(r"[1-9][0-9]*")


class ArtifactError(ValueError):
    """Raised for a directory that is not an artifact, and for an artifact that cannot be written."""


def versions(directory: Path) -> list[int]:
    """Return the versions in a model's directory, in ascending order; empty if there is no directory."""
    entries = directory.iterdir() if directory.is_dir() else iter(())
    return sorted(int(entry.name) for entry in entries if VERSION.fullmatch(entry.name))


def read(directory: Path) -> manifest_pb2.Manifest:
    """Read the manifest of an artifact.

    Raises:
        ArtifactError: If there is no manifest, or it cannot be parsed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{directory}: expected an artifact directory, but it has no {MANIFEST}; "
            "give MODELS/NAME/VERSION, for example models/digits-vae/1"
        )
    try:
        return json_format.Parse(path.read_text(), manifest_pb2.Manifest())
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{path}: expected a manifest of the artifact format, but it cannot be parsed: {error}"
        ) from error


def load(directory: Path, manifest: manifest_pb2.Manifest, format: str) -> Interpreter:
    """Return an interpreter that runs the programs of an artifact by its graph files in one format.

    Raises:
        GraphError: If a file cannot be loaded, or its graph is impure.
    """
    graphs = {
        entry.name: graph.load(directory / file.path, format)
        for entry in manifest.graphs
        for file in entry.files
        if file.format == format
    }
    return Interpreter(manifest, graphs)


def checksum_matches(directory: Path) -> bool:
    """Return whether the manifest is unchanged since it was written."""
    path = directory / CHECKSUM
    return path.is_file() and path.read_text().split()[:1] == [sha256((directory / MANIFEST).read_bytes())]


def sha256(data: bytes) -> str:
    """Return the SHA-256 hex digest of some bytes."""
    return hashlib.sha256(data).hexdigest()


def write_manifest(text: str, directory: Path) -> None:
    """Write the manifest and its checksum, by which a server detects later changes."""
    (directory / MANIFEST).write_text(text)
    (directory / CHECKSUM).write_text(f"{sha256(text.encode())}  {MANIFEST}\n")
