"""Invalid artifacts: each is rejected with its violations in one line."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import samovar
from server.core.errors import InvalidArtifact, RuntimeUnavailable
from server.core.spec import GraphSpec
from server.models.repository import Repository
from server.runtime import RUNTIMES, Device, Graph
from tests.support.live_server import serving

Json = Any
NAME = "digits-vae"

# Fields that must be consistent: programs, graphs and the tensors between them.
STRUCTURE = {"graphs", "init", "step", "readout", "state", "noise", "name", "version", "format_version"}
FREE = {"doc", "data_spec", "minimum", "maximum", "choices", "tolerance", "value", "quality"}


def repository() -> Repository:
    return Repository(Device(), ("onnx", "torchscript"), max_batch_rows=8)


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """A directory with the artifact under test, and another one."""
    return models_of(NAME, "digits-mlp")


@pytest.fixture(scope="module")
def manifest(models: Path) -> Json:
    return json.loads((models / NAME / "1" / "manifest.json").read_text())


@pytest.fixture
def artifact(models: Path, tmp_path: Path) -> Path:
    copied = tmp_path / NAME / "1"
    shutil.copytree(models / NAME / "1", copied)
    return copied


def rewrite_manifest(directory: Path, manifest: Json) -> None:
    """Write a manifest with its checksum, as a faulty exporter would."""
    text = json.dumps(manifest)
    (directory / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def rejection(directory: Path) -> str:
    with pytest.raises(InvalidArtifact) as raised:
        repository().load(directory)
    message = str(raised.value)
    assert "\n" not in message
    return message


def leaves(node: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every scalar in a JSON document."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = False
    for key, child in children:
        found = True
        yield from leaves(child, (*path, key))
    if not found:
        yield path


def changed(value: Json) -> Json:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}x" if isinstance(value, str) else value


def tampered(manifest: Json, path: tuple[Any, ...]) -> Json:
    document = copy.deepcopy(manifest)
    *parents, last = path
    node = document
    for key in parents:
        node = node[key]
    node[last] = changed(node[last])
    return document


def test_valid_artifact_is_loaded_in_all_formats(artifact: Path) -> None:
    model = repository().load(artifact)
    assert model.formats == ("onnx", "torchscript")
    assert model.spec.digest == hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest()


def test_change_of_any_field_is_rejected_by_the_checksum(artifact: Path, manifest: Json) -> None:
    paths = list(leaves(manifest))
    assert len(paths) > 200
    for path in paths:
        document = tampered(manifest, path)
        if document != manifest:
            (artifact / "manifest.json").write_text(json.dumps(document))
            assert "changed after export" in rejection(artifact), path


def has_no_effect(manifest: Json, path: tuple[Any, ...]) -> bool:
    """Return whether a path leads to the acceptance noise, which an untrained chain ignores."""
    if "noise" not in path or path[-1] != "stream":
        return False
    noise = manifest["programs"][path[1]]["noise"][path[3]]
    return bool(noise["tensor"]["name"] == "acceptance")


def test_inconsistent_manifest_with_valid_checksum_is_rejected(artifact: Path, manifest: Json) -> None:
    paths = [path for path in leaves(manifest) if STRUCTURE & set(path) and not FREE & set(path)]
    paths = [path for path in paths if not has_no_effect(manifest, path)]
    assert len(paths) > 100
    for path in paths:
        rewrite_manifest(artifact, tampered(manifest, path))
        assert rejection(artifact), path


def edited(edit: Callable[[Json], None]) -> Callable[[Json], Json]:
    def apply(manifest: Json) -> Json:
        document = copy.deepcopy(manifest)
        edit(document)
        return document

    return apply


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (
            lambda m: m.update(format_version=1),
            "format_version is 1, expected 2; export the model again: python -m export train vae",
        ),
        (lambda m: m.update(programs=[]), "programs are missing"),
        (lambda m: m.update(extra=1), "not a manifest"),
        (lambda m: m["programs"].append(m["programs"][0]), "not unique"),
        (lambda m: m["graphs"].append({**m["graphs"][0], "name": "spare"}), "spare is used by no program"),
        (lambda m: m["graphs"][0]["files"][0].update(path="../../secret"), "expected a plain name"),
        (lambda m: m["graphs"][0]["files"][0].update(path="/etc/passwd"), "expected a plain name"),
        (lambda m: m["graphs"][0]["files"].pop(), "same formats"),
        (lambda m: m.update(golden_rows=m["golden_rows"][:1]), "has no golden rows"),
        (lambda m: m["programs"][0].pop("readout"), "readout is missing"),
        (lambda m: m["programs"][0].update(operation="dream"), "unknown operation 'dream'"),
        (lambda m: m.pop("provenance"), "provenance is missing"),
    ],
)
def test_violation_is_reported(
    artifact: Path, manifest: Json, edit: Callable[[Json], None], reason: str
) -> None:
    rewrite_manifest(artifact, edited(edit)(manifest))
    assert reason in rejection(artifact)


def test_flipped_byte_in_graph_file_is_reported(artifact: Path) -> None:
    graph = artifact / "decode.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    assert "decode.onnx does not have the SHA-256" in rejection(artifact)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decode.onnx", "is not an ONNX graph"),
        ("decode.pt", "is not a TorchScript file"),
        ("decode.pt2", "is not a torch.export program"),
    ],
)
def test_file_of_another_format_is_rejected(artifact: Path, manifest: Json, name: str, reason: str) -> None:
    (artifact / name).write_bytes(b"PK nonsense")
    document = copy.deepcopy(manifest)
    for graph in document["graphs"]:
        for file in graph["files"]:
            if file["path"] == name:
                file["sha256"] = hashlib.sha256(b"PK nonsense").hexdigest()
    rewrite_manifest(artifact, document)
    with pytest.raises(InvalidArtifact, match=f"{name} {reason}"):
        Repository(Device(), tuple(RUNTIMES), max_batch_rows=8).load(artifact)


def test_graph_of_another_program_is_rejected(artifact: Path, manifest: Json) -> None:
    document = copy.deepcopy(manifest)
    files = {file["path"]: file for graph in document["graphs"] for file in graph["files"]}
    shutil.copy(artifact / "encode.onnx", artifact / "score_init.onnx")
    files["score_init.onnx"]["sha256"] = files["encode.onnx"]["sha256"]
    rewrite_manifest(artifact, document)
    assert "score_init.onnx" in rejection(artifact)


@pytest.mark.parametrize("missing", ["manifest.json", "manifest.sha256", "decode.onnx"])
def test_missing_file_is_reported(artifact: Path, missing: str) -> None:
    (artifact / missing).unlink()
    assert missing in rejection(artifact)


def test_symlinked_graph_is_rejected(artifact: Path) -> None:
    graph = artifact / "decode.onnx"
    graph.rename(artifact.parent / "elsewhere.onnx")
    graph.symlink_to(artifact.parent / "elsewhere.onnx")
    assert "decode.onnx is missing, or not a regular file" in rejection(artifact)


def test_only_requested_formats_are_loaded(artifact: Path) -> None:
    model = Repository(Device(), ("torchscript",), max_batch_rows=8).load(artifact)
    assert model.formats == ("torchscript",)


def unavailable(path: Path, spec: GraphSpec, device: Device) -> Graph:
    """A runtime that this machine does not have."""
    raise RuntimeUnavailable("there is no such provider")


def test_format_without_runtime_is_skipped_with_warning(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    formats = ("onnx", "torchscript")
    served = Repository(Device(), formats, 8, {**RUNTIMES, "onnx": unavailable}).load(artifact)
    assert served.formats == ("torchscript",)
    assert caplog.messages == [f"{NAME}/1 is not served as onnx: there is no such provider"]
    with pytest.raises(InvalidArtifact, match="onnx: there is no such provider; torchscript: there is no"):
        Repository(Device(), formats, 8, dict.fromkeys(formats, unavailable)).load(artifact)


def test_invalid_artifact_is_logged_and_others_are_served(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models, tmp_path / "models")
    bad = tmp_path / "models" / NAME / "2"
    shutil.copytree(models / NAME / "1", bad)
    (tmp_path / "models" / ".half-written" / "1").mkdir(parents=True)
    with serving(tmp_path / "models") as server, samovar.Client(server.address) as client:
        served = [(model.name, model.version) for model in client.models()]
    assert served == [(directory.name, "1") for directory in sorted(models.iterdir())]
    rejections = [record.getMessage() for record in caplog.records if str(bad) in record.getMessage()]
    assert len(rejections) == 1
    assert "version is '1', expected the directory's name '2'" in rejections[0]
