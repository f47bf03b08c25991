"""Artifacts that must not be served: each is refused in one line, whatever was done to it."""

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

# What has to fit together: a program, its graphs and the tensors between them.
STRUCTURE = {"graphs", "init", "step", "readout", "state", "noise", "name", "version", "format_version"}
FREE = {"doc", "minimum", "maximum", "choices", "tolerance", "value", "quality"}


def repository() -> Repository:
    return Repository(Device(), ("onnx", "torchscript"), max_batch_rows=8)


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """The artifact under test, and another one."""
    return models_of(NAME, "digits-mlp")


@pytest.fixture(scope="module")
def manifest(models: Path) -> Json:
    return json.loads((models / NAME / "1" / "manifest.json").read_text())


@pytest.fixture
def artifact(models: Path, tmp_path: Path) -> Path:
    copied = tmp_path / NAME / "1"
    shutil.copytree(models / NAME / "1", copied)
    return copied


def reseal(directory: Path, manifest: Json) -> None:
    """Write a manifest with a seal that fits, as an exporter with a fault would."""
    text = json.dumps(manifest)
    (directory / "manifest.json").write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (directory / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def refusal(directory: Path) -> str:
    with pytest.raises(InvalidArtifact) as refused:
        repository().load(directory)
    message = str(refused.value)
    assert "\n" not in message
    return message


def leaves(node: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every scalar in a JSON document."""
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


def test_an_untouched_artifact_is_served(artifact: Path) -> None:
    model = repository().load(artifact)
    assert model.formats == ("onnx", "torchscript")
    assert model.spec.digest == hashlib.sha256((artifact / "manifest.json").read_bytes()).hexdigest()


def test_every_field_is_sealed(artifact: Path, manifest: Json) -> None:
    paths = list(leaves(manifest))
    assert len(paths) > 200
    for path in paths:
        document = tampered(manifest, path)
        if document != manifest:
            (artifact / "manifest.json").write_text(json.dumps(document))
            assert "changed after export" in refusal(artifact), path


def is_idle(manifest: Json, path: tuple[Any, ...]) -> bool:
    """Whether a path leads to the numbers that decide on a chain's offers: untrained, it accepts them all."""
    if "noise" not in path or path[-1] != "stream":
        return False
    noise = manifest["programs"][path[1]]["noise"][path[3]]
    return bool(noise["tensor"]["name"] == "acceptance")


def test_what_does_not_fit_together_is_refused_even_under_a_fitting_seal(
    artifact: Path, manifest: Json
) -> None:
    paths = [path for path in leaves(manifest) if STRUCTURE & set(path) and not FREE & set(path)]
    paths = [path for path in paths if not is_idle(manifest, path)]
    assert len(paths) > 100
    for path in paths:
        reseal(artifact, tampered(manifest, path))
        assert refusal(artifact), path


def edited(edit: Callable[[Json], None]) -> Callable[[Json], Json]:
    def apply(manifest: Json) -> Json:
        document = copy.deepcopy(manifest)
        edit(document)
        return document

    return apply


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda m: m.update(format_version=1), "format_version is 1, this server reads 2"),
        (lambda m: m.update(programs=[]), "it has no programs"),
        (lambda m: m.update(extra=1), "not a manifest"),
        (lambda m: m["programs"].append(m["programs"][0]), "not unique"),
        (lambda m: m["graphs"].append({**m["graphs"][0], "name": "spare"}), "spare is used by no program"),
        (lambda m: m["graphs"][0]["files"][0].update(path="../../secret"), "not a plain file name"),
        (lambda m: m["graphs"][0]["files"][0].update(path="/etc/passwd"), "not a plain file name"),
        (lambda m: m["graphs"][0]["files"].pop(), "same formats"),
        (lambda m: m.update(golden_rows=m["golden_rows"][:1]), "has no golden rows"),
        (lambda m: m["programs"][0].pop("readout"), "readout is missing"),
        (lambda m: m["programs"][0].update(operation="dream"), "no such operation"),
        (lambda m: m.pop("provenance"), "provenance is missing"),
    ],
)
def test_a_fault_is_named(artifact: Path, manifest: Json, edit: Callable[[Json], None], reason: str) -> None:
    reseal(artifact, edited(edit)(manifest))
    assert reason in refusal(artifact)


def test_a_flipped_byte_in_a_graph_is_named(artifact: Path) -> None:
    graph = artifact / "decode.onnx"
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 1
    graph.write_bytes(data)
    assert "decode.onnx does not have the SHA-256" in refusal(artifact)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("decode.onnx", "is not an ONNX graph"),
        ("decode.pt", "is not a TorchScript file"),
        ("decode.pt2", "is not a torch.export program"),
    ],
)
def test_a_graph_that_is_none_is_refused(artifact: Path, manifest: Json, name: str, reason: str) -> None:
    (artifact / name).write_bytes(b"PK nonsense")
    document = copy.deepcopy(manifest)
    for graph in document["graphs"]:
        for file in graph["files"]:
            if file["path"] == name:
                file["sha256"] = hashlib.sha256(b"PK nonsense").hexdigest()
    reseal(artifact, document)
    with pytest.raises(InvalidArtifact, match=f"{name} {reason}"):
        Repository(Device(), tuple(RUNTIMES), max_batch_rows=8).load(artifact)


def test_other_weights_do_not_pass_the_golden_rows(artifact: Path, manifest: Json) -> None:
    document = copy.deepcopy(manifest)
    files = {file["path"]: file for graph in document["graphs"] for file in graph["files"]}
    shutil.copy(artifact / "encode.onnx", artifact / "score_init.onnx")
    files["score_init.onnx"]["sha256"] = files["encode.onnx"]["sha256"]
    reseal(artifact, document)
    assert "score_init.onnx" in refusal(artifact)


@pytest.mark.parametrize("missing", ["manifest.json", "manifest.sha256", "decode.onnx"])
def test_a_missing_file_is_named(artifact: Path, missing: str) -> None:
    (artifact / missing).unlink()
    assert missing in refusal(artifact)


def test_a_linked_graph_is_refused(artifact: Path) -> None:
    graph = artifact / "decode.onnx"
    graph.rename(artifact.parent / "elsewhere.onnx")
    graph.symlink_to(artifact.parent / "elsewhere.onnx")
    assert "decode.onnx is missing" in refusal(artifact)


def test_only_formats_that_are_asked_for_are_served(artifact: Path) -> None:
    model = Repository(Device(), ("torchscript",), max_batch_rows=8).load(artifact)
    assert model.formats == ("torchscript",)


def absent(path: Path, spec: GraphSpec, device: Device) -> Graph:
    """A runtime that this machine lacks."""
    raise RuntimeUnavailable("there is no such provider")


def test_a_format_that_this_device_cannot_run_is_left_out(
    artifact: Path, caplog: pytest.LogCaptureFixture
) -> None:
    formats = ("onnx", "torchscript")
    served = Repository(Device(), formats, 8, {**RUNTIMES, "onnx": absent}).load(artifact)
    assert served.formats == ("torchscript",)
    assert caplog.messages == [f"{NAME}/1 is not served as onnx: there is no such provider"]
    with pytest.raises(InvalidArtifact, match="onnx: there is no such provider; torchscript: there is no"):
        Repository(Device(), formats, 8, dict.fromkeys(formats, absent)).load(artifact)


def test_cuda_graphs_that_would_have_no_effect_are_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    device = Device(cuda_graphs=True)
    Repository(device, ("torchscript", "onnx"), 8)
    assert not caplog.messages
    Repository(device, ("onnx", "torchscript"), 8)
    assert "--cuda-graphs has no effect on ONNX" in caplog.text


def test_a_bad_artifact_is_named_and_the_others_are_served(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(models, tmp_path / "models")
    bad = tmp_path / "models" / NAME / "2"
    shutil.copytree(models / NAME / "1", bad)
    (tmp_path / "models" / ".half-written" / "1").mkdir(parents=True)
    with serving(tmp_path / "models") as server, samovar.Client(server.address) as client:
        served = [(model.name, model.version) for model in client.models()]
    assert served == [(directory.name, "1") for directory in sorted(models.iterdir())]
    refusals = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(refusals) == 1
    assert str(bad) in refusals[0]
    assert "version is '1', the directory is '2'" in refusals[0]
