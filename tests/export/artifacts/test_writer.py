"""Artifacts: written completely or not at all, and every later change is detected."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from torch import Tensor, nn

from export.artifacts import golden, reader, verify, writer
from export.artifacts.golden import Example
from export.artifacts.writer import Model
from export.graphs.program import DataSpec, Input, Parameter, Program, ProgramError, TensorSpec
from samovar.v1 import manifest_pb2

X = TensorSpec("x", shape=(2,))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Center(nn.Module):
    """Violates the contract: each row depends on the other rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Amplifier(nn.Module):
    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * gain.unsqueeze(1)


def model_of(module: nn.Module, rows: int = 3) -> Model:
    program = Program("decode", module.eval(), (TensorSpec("y", shape=(2,)),), "Test.", inputs=(Input(X),))
    example = Example(
        "decode", rows=rows, inputs={"x": np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)}
    )
    return Model("pair", "none", "A test.", DataSpec("vector", X), (program,), (example,))


def write(model: Model, models: Path, version: str | None = None) -> Path:
    directory = writer.resolve_destination(models, model.name, version)
    writer.write(model, directory, ("torchscript",))
    return directory


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write(model_of(Double()), tmp_path)


def change_manifest(written: Path, change: Callable[[manifest_pb2.Manifest], None]) -> None:
    manifest = reader.read(written)
    change(manifest)
    reader.write_manifest(json_format.MessageToJson(manifest), written)


def test_write_without_version_takes_next_version(written: Path) -> None:
    second = write(model_of(Double()), written.parent.parent)
    assert (written.name, second.name) == ("1", "2")
    assert reader.versions(written.parent) == [1, 2]


def test_resolve_destination_rejects_existing_version(written: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="exists already"):
        writer.resolve_destination(written.parent.parent, "pair", version="1")


def test_write_rejects_existing_directory(written: Path) -> None:
    """Another process can have written the version since the destination was resolved."""
    before = (written / reader.MANIFEST).read_bytes()
    with pytest.raises(reader.ArtifactError, match="exists already"):
        writer.write(model_of(Double()), written, ("torchscript",))
    assert (written / reader.MANIFEST).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "version"), [("Two Words", "1"), ("../up", "1"), ("pair", "0"), ("pair", "1.0")]
)
def test_resolve_destination_rejects_invalid_name_or_version(name: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="expected "):
        writer.resolve_destination(tmp_path, name, version)


def test_write_failing_verification_leaves_no_files(tmp_path: Path) -> None:
    """The graph file is written before verification finds that rows depend on each other."""
    with pytest.raises(reader.ArtifactError, match="golden rows in a mixed batch"):
        write(model_of(Center()), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gain": 3}, "parameter 'gain': expected a value from 0 to 2, got 3"),
        ({"loss": 1}, "unknown parameter 'loss'; expected one of: gain"),
    ],
)
def test_write_rejects_golden_request_that_a_server_would_reject(
    parameters: dict[str, float], message: str, tmp_path: Path
) -> None:
    model = model_of(Double())
    gain = Parameter("gain", "float", 1, 0, 2, doc="multiplies")
    program = dataclasses.replace(model.programs[0], readout=Amplifier(), parameters=(gain,))
    example = dataclasses.replace(model.examples[0], parameters=parameters)
    with pytest.raises(ProgramError, match=message):
        write(dataclasses.replace(model, programs=(program,), examples=(example,)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_write_failure_leaves_other_versions(written: Path) -> None:
    with pytest.raises(reader.ArtifactError):
        write(model_of(Center()), written.parent.parent)
    assert [path.name for path in written.parent.iterdir()] == ["1"]


def test_verify_accepts_written_artifact(written: Path) -> None:
    report = verify.verify(written)
    assert report.failures == []
    assert "decode   torchscript  golden rows" in verify.format_report(report)


def test_verify_detects_changed_graph_file(written: Path) -> None:
    path = written / "decode.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify.verify(written).failures == [
        "decode.pt: its SHA-256 does not match the manifest; export it again"
    ]


def test_verify_detects_changed_manifest(written: Path) -> None:
    path = written / reader.MANIFEST
    path.write_text(path.read_text().replace("A test.", "A toast."))
    assert verify.verify(written).failures == [
        "manifest.json: its SHA-256 does not match manifest.sha256: the manifest was changed after export; "
        "export it again"
    ]


def test_verify_detects_missing_graph_file(written: Path) -> None:
    (written / "decode.pt").unlink()
    assert verify.verify(written).failures == [
        "decode.pt: the manifest lists this file, but it is missing; export it again"
    ]


def test_verify_detects_changed_golden_output(written: Path) -> None:
    def change(manifest: manifest_pb2.Manifest) -> None:
        output = manifest.golden_rows[0].outputs["y"]
        output.data = (golden.to_array(output) + np.float32(0.5)).tobytes()

    change_manifest(written, change)
    failures = verify.verify(written).failures
    assert len(failures) == 2
    assert "expected a difference of at most 0.001, got 0.5" in failures[0]


def test_verify_detects_golden_output_that_is_nan(written: Path) -> None:
    def change(manifest: manifest_pb2.Manifest) -> None:
        output = manifest.golden_rows[0].outputs["y"]
        output.data = np.full(6, np.nan, np.float32).tobytes()

    change_manifest(written, change)
    assert verify.verify(written).failures


def test_verify_rejects_graph_path_outside_directory(written: Path) -> None:
    shutil.copy(written / "decode.pt", written.parent / "decode.pt")

    def change(manifest: manifest_pb2.Manifest) -> None:
        manifest.graphs[0].files[0].path = "../decode.pt"

    change_manifest(written, change)
    assert verify.verify(written).failures == [
        "../decode.pt: expected the name of a file inside the artifact directory"
    ]


def test_verify_rejects_program_without_golden_rows(written: Path) -> None:
    change_manifest(written, lambda manifest: manifest.ClearField("golden_rows"))
    assert verify.verify(written).failures == ["decode: expected golden rows, found none"]


@pytest.mark.parametrize("content", [None, "{", '{"nme": "x"}'])
def test_verify_rejects_missing_or_invalid_manifest(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / reader.MANIFEST).write_text(content)
    with pytest.raises(reader.ArtifactError, match=r"it has no manifest.json|expected a manifest"):
        verify.verify(tmp_path)
