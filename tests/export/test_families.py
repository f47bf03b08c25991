"""What being a family means, for every family: tiny untrained networks."""

import json
from pathlib import Path

import pytest

from export import data, layout, recipe, verify
from export.families import FAMILIES
from export.formats import FORMATS
from export.program import OPERATIONS, program_name
from samovar.v1 import manifest_pb2


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def usual(family: str) -> data.Dataset:
    """The data set that the family is for."""
    return data.load(FAMILIES[family].data[0])


def test_the_table_of_contents_tells_the_truth(family: str, usual: data.Dataset) -> None:
    loaded = FAMILIES[family].load()
    preset = loaded.presets["tiny"].suiting(usual.value)
    programs = loaded.programs(loaded.network(usual, preset), usual)
    assert loaded.name == family
    assert tuple(program.name for program in programs) == loaded.operations == FAMILIES[family].operations
    assert {program.operation for program in programs} <= set(OPERATIONS)
    assert set(loaded.presets) - {"medium"} == {"tiny", "starter", "full"}


def test_what_is_refused_is_not_offered(family: str) -> None:
    loaded = FAMILIES[family].load()
    assert not set(loaded.refusals) & set(loaded.operations)
    assert set(loaded.refusals) <= set(OPERATIONS)


def test_every_format_reproduces_the_modules_in_any_company(family: str, artifacts: dict[str, Path]) -> None:
    report = verify.verify(artifacts[family])
    assert report.failures == []
    assert {finding.format for finding in report.findings} == set(FORMATS)
    assert {finding.program for finding in report.findings} == set(FAMILIES[family].operations)


def test_rows_are_bitwise_independent_in_onnx(family: str, artifacts: dict[str, Path]) -> None:
    findings = [f for f in verify.verify(artifacts[family]).findings if f.check == "independence"]
    assert [f.difference for f in findings if f.format == "onnx"] == [0.0] * len(FAMILIES[family].operations)


def test_every_program_is_described_for_people(family: str, artifacts: dict[str, Path]) -> None:
    manifest = layout.read(artifacts[family])
    assert manifest.description
    for program in manifest.programs:
        assert program.doc
        assert all(parameter.doc for parameter in program.parameters)
        assert all(entry.tensor.doc for entry in program.inputs)
        assert all(spec.doc for spec in [*program.state, *program.outputs])


def test_some_golden_rows_have_parameters(family: str, artifacts: dict[str, Path]) -> None:
    manifest = layout.read(artifacts[family])
    for program in manifest.programs:
        golden = [entry for entry in manifest.golden_rows if _name(entry) == _name(program)]
        assert golden
        assert not program.parameters or any(entry.parameters for entry in golden)


def _name(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.method)


def test_the_manifest_is_readable_json(family: str, artifacts: dict[str, Path]) -> None:
    written = json.loads((artifacts[family] / layout.MANIFEST).read_text())
    assert written["format_version"] == 1
    assert written["provenance"]["dataset"] == FAMILIES[family].data[0]
    assert {entry["name"] for entry in written["graphs"]} >= {
        program["readout"] for program in written["programs"]
    }


def test_training_measuring_and_writing_go_through(family: str, usual: data.Dataset, tmp_path: Path) -> None:
    order = recipe.Recipe(FAMILIES[family].load(), usual, tmp_path, preset="tiny", formats=("torchscript",))
    manifest = layout.read(recipe.make(order))
    assert manifest.quality
    assert (tmp_path / manifest.name / "1" / recipe.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert manifest.provenance.settings["steps"] == "1"
