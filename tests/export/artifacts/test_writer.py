"""Artifacts: whole or not at all, and whatever is changed afterwards is noticed."""

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


class Centre(nn.Module):
    """Breaks the contract: every row sees the others."""

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


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return writer.write(model_of(Double()), tmp_path, formats=("torchscript",))


def change_manifest(written: Path, change: Callable[[manifest_pb2.Manifest], None]) -> None:
    manifest = reader.read(written)
    change(manifest)
    reader.write_manifest(json_format.MessageToJson(manifest), written)


def test_versions_count_up(written: Path) -> None:
    second = writer.write(model_of(Double()), written.parent.parent, formats=("torchscript",))
    assert (written.name, second.name) == ("1", "2")
    assert reader.versions(written.parent) == [1, 2]


def test_an_artifact_is_never_overwritten(written: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="exists already"):
        writer.write(model_of(Double()), written.parent.parent, version="1")


@pytest.mark.parametrize(
    ("name", "version"), [("Two Words", "1"), ("../up", "1"), ("pair", "0"), ("pair", "1.0")]
)
def test_names_and_versions_that_servers_refuse_are_refused(name: str, version: str, tmp_path: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="expected a"):
        writer.resolve_destination(tmp_path, name, version)


def test_a_failure_midway_leaves_nothing(tmp_path: Path) -> None:
    """The graph file is written, then verification finds that rows are not independent."""
    with pytest.raises(reader.ArtifactError, match="golden rows in company"):
        writer.write(model_of(Centre()), tmp_path, formats=("torchscript",))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"gain": 3}, "expected gain from 0 to 2, got 3"),
        ({"loss": 1}, "expected parameters among gain, got 'loss'"),
    ],
)
def test_golden_requests_that_a_server_would_refuse_are_refused(
    parameters: dict[str, float], said: str, tmp_path: Path
) -> None:
    model = model_of(Double())
    gain = Parameter("gain", "float", 1, 0, 2, doc="multiplies")
    program = dataclasses.replace(model.programs[0], readout=Amplifier(), parameters=(gain,))
    example = dataclasses.replace(model.examples[0], parameters=parameters)
    with pytest.raises(ProgramError, match=said):
        writer.write(dataclasses.replace(model, programs=(program,), examples=(example,)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_other_versions(written: Path) -> None:
    with pytest.raises(reader.ArtifactError):
        writer.write(model_of(Centre()), written.parent.parent, formats=("torchscript",))
    assert [path.name for path in written.parent.iterdir()] == ["1"]


def test_a_written_artifact_verifies(written: Path) -> None:
    report = verify.verify(written)
    assert report.failures == []
    assert "decode   torchscript  golden rows" in verify.format_report(report)


def test_a_flipped_byte_is_noticed(written: Path) -> None:
    path = written / "decode.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert verify.verify(written).failures == [
        "decode.pt: its SHA-256 is not the one in the manifest; export it again"
    ]


def test_an_edited_manifest_is_noticed(written: Path) -> None:
    path = written / reader.MANIFEST
    path.write_text(path.read_text().replace("A test.", "A toast."))
    assert verify.verify(written).failures == [
        "manifest.json: it is not what manifest.sha256 was made for: it was changed after export"
    ]


def test_a_missing_file_is_noticed(written: Path) -> None:
    (written / "decode.pt").unlink()
    assert verify.verify(written).failures == ["decode.pt: the manifest names it, but it is missing"]


def test_a_changed_golden_value_is_noticed(written: Path) -> None:
    def change(manifest: manifest_pb2.Manifest) -> None:
        output = manifest.golden_rows[0].outputs["y"]
        output.data = (golden.array(output) + np.float32(0.5)).tobytes()

    change_manifest(written, change)
    failures = verify.verify(written).failures
    assert len(failures) == 2
    assert "expected a difference of at most 0.001, got 0.5" in failures[0]


def test_a_golden_value_that_is_not_a_number_is_noticed(written: Path) -> None:
    def change(manifest: manifest_pb2.Manifest) -> None:
        output = manifest.golden_rows[0].outputs["y"]
        output.data = np.full(6, np.nan, np.float32).tobytes()

    change_manifest(written, change)
    assert verify.verify(written).failures


def test_a_path_out_of_the_directory_is_noticed(written: Path) -> None:
    shutil.copy(written / "decode.pt", written.parent / "decode.pt")

    def change(manifest: manifest_pb2.Manifest) -> None:
        manifest.graphs[0].files[0].path = "../decode.pt"

    change_manifest(written, change)
    assert verify.verify(written).failures == ["../decode.pt: expected a file name inside the artifact"]


def test_a_program_without_golden_rows_is_noticed(written: Path) -> None:
    change_manifest(written, lambda manifest: manifest.ClearField("golden_rows"))
    assert verify.verify(written).failures == ["decode: expected golden rows, found none"]


@pytest.mark.parametrize("content", [None, "{", '{"nme": "x"}'])
def test_what_is_no_manifest_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / reader.MANIFEST).write_text(content)
    with pytest.raises(reader.ArtifactError, match=r"holds no manifest.json|expected a manifest"):
        verify.verify(tmp_path)
