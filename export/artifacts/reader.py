"""An artifact's directory: its layout, and how it is read back, as a manifest and programs to run."""

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
    """A directory that is not, or cannot become, an artifact."""


def versions(directory: Path) -> list[int]:
    """The versions of a model that are on disk."""
    entries = directory.iterdir() if directory.is_dir() else iter(())
    return sorted(int(entry.name) for entry in entries if VERSION.fullmatch(entry.name))


def read(directory: Path) -> manifest_pb2.Manifest:
    """The manifest of an artifact; ArtifactError when there is none or it cannot be read."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{directory}: expected an artifact, but it holds no {MANIFEST}")
    try:
        return json_format.Parse(path.read_text(), manifest_pb2.Manifest())
    except (json_format.ParseError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: expected a manifest of the artifact contract: {error}") from error


def load(directory: Path, manifest: manifest_pb2.Manifest, format: str) -> Interpreter:
    """The programs of an artifact run by its files in one format."""
    graphs = {
        entry.name: graph.load(directory / file.path, format)
        for entry in manifest.graphs
        for file in entry.files
        if file.format == format
    }
    return Interpreter(manifest, graphs)


def checksum_matches(directory: Path) -> bool:
    """Whether the manifest is the one that its checksum was made for."""
    path = directory / CHECKSUM
    return path.is_file() and path.read_text().split()[:1] == [sha256((directory / MANIFEST).read_bytes())]


def sha256(data: bytes) -> str:
    """The digest by which files and data are named."""
    return hashlib.sha256(data).hexdigest()


def write_manifest(text: str, directory: Path) -> None:
    """The manifest, and beside it the digest by which a server knows that nobody edited it."""
    (directory / MANIFEST).write_text(text)
    (directory / CHECKSUM).write_text(f"{sha256(text.encode())}  {MANIFEST}\n")
