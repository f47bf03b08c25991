"""What being a family means, for every family on every data set that it is for: tiny untrained networks."""

import json
from pathlib import Path

import pytest

from export import pipeline
from export.artifacts import reader, verify
from export.datasets import loading
from export.families import FAMILIES
from export.graphs.formats import DEFAULT_FORMATS, FORMATS
from samovar.operations import OPERATIONS, parse_program_name, program_name
from samovar.v1 import manifest_pb2
from tests.support.datasets import Pair, for_each_pair

pytestmark = for_each_pair


@pytest.fixture
def dataset(pair: Pair) -> loading.Dataset:
    return pair.dataset()


@pytest.fixture
def written(pair: Pair, request: pytest.FixtureRequest) -> Path:
    """The shared artifact of the family on the data set."""
    models: Path = request.getfixturevalue("models" if pair.is_default else "other_models")
    return models / pair.model / "1"


def test_the_table_of_contents_tells_the_truth(pair: Pair, dataset: loading.Dataset) -> None:
    loaded = FAMILIES[pair.family].load()
    preset = loaded.presets["tiny"].for_data(dataset.spec)
    programs = loaded.build_programs(loaded.build_network(dataset, preset), dataset)
    assert loaded.name == pair.family
    assert (
        tuple(program.name for program in programs) == loaded.operations == FAMILIES[pair.family].operations
    )
    assert {program.operation for program in programs} <= set(OPERATIONS)
    assert set(loaded.presets) - {"medium"} == {"tiny", "starter", "full"}


def test_every_operation_is_offered_or_refused_with_a_reason(pair: Pair) -> None:
    loaded = FAMILIES[pair.family].load()
    offered = {parse_program_name(name)[0] for name in loaded.operations}
    assert set(loaded.unsupported_operations) == set(OPERATIONS) - offered
    assert all(loaded.unsupported_operations.values())


def test_every_format_reproduces_the_modules_in_any_company(pair: Pair, written: Path) -> None:
    report = verify.verify(written)
    assert report.failures == []
    assert {finding.format for finding in report.results} == set(
        FORMATS if pair.is_default else DEFAULT_FORMATS
    )
    assert {finding.program for finding in report.results} == set(FAMILIES[pair.family].operations)


def test_rows_are_bitwise_independent_in_onnx(pair: Pair, written: Path) -> None:
    findings = [f for f in verify.verify(written).results if f.check == "independence"]
    assert [f.difference for f in findings if f.format == "onnx"] == [0.0] * len(
        FAMILIES[pair.family].operations
    )


def test_every_program_is_described_for_people(pair: Pair, written: Path) -> None:
    manifest = reader.read(written)
    assert manifest.description
    for program in manifest.programs:
        assert program.doc
        assert all(parameter.doc for parameter in program.parameters)
        assert all(entry.tensor.doc for entry in program.inputs)
        assert all(spec.doc for spec in [*program.state, *program.outputs])


def test_some_golden_rows_have_parameters(pair: Pair, written: Path) -> None:
    manifest = reader.read(written)
    for program in manifest.programs:
        golden = [entry for entry in manifest.golden_rows if _name(entry) == _name(program)]
        assert golden
        assert not program.parameters or any(entry.parameters for entry in golden)


def _name(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.variant)


def test_the_manifest_is_readable_json(pair: Pair, written: Path) -> None:
    read = json.loads((written / reader.MANIFEST).read_text())
    assert read["format_version"] == 2
    assert read["provenance"]["dataset"] == pair.data
    assert {entry["name"] for entry in read["graphs"]} >= {program["readout"] for program in read["programs"]}


def test_training_measuring_and_writing_go_through(
    pair: Pair, dataset: loading.Dataset, tmp_path: Path
) -> None:
    order = pipeline.TrainingJob(
        FAMILIES[pair.family].load(), dataset, tmp_path, preset="tiny", formats=("torchscript",)
    )
    manifest = reader.read(pipeline.run(order))
    assert manifest.quality
    assert (tmp_path / manifest.name / "1" / pipeline.SAMPLES_IMAGE).read_bytes().startswith(b"\x89PNG")
    assert manifest.provenance.settings["steps"] == "1"
