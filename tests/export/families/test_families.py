"""Contract tests of every family on every dataset that it supports, with tiny untrained networks."""

import json
from functools import cache
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

pytestmark = [for_each_pair, pytest.mark.slow]


@pytest.fixture
def dataset(pair: Pair) -> loading.Dataset:
    return pair.dataset()


@pytest.fixture
def artifact(pair: Pair, request: pytest.FixtureRequest) -> Path:
    """Return the directory of the pair's shared artifact."""
    models: Path = request.getfixturevalue("models" if pair.is_default else "other_models")
    return models / pair.model / "1"


@cache
def verification_report(artifact: Path) -> verify.Report:
    """Verify an artifact once for all tests."""
    return verify.verify(artifact)


def test_family_matches_its_entry_in_the_list_of_families(pair: Pair, dataset: loading.Dataset) -> None:
    family = FAMILIES[pair.family].load()
    preset = family.presets["tiny"].for_data(dataset.spec)
    programs = family.build_programs(family.build_network(dataset, preset), dataset)
    assert family.name == pair.family
    assert (
        tuple(program.name for program in programs) == family.operations == FAMILIES[pair.family].operations
    )
    assert {program.operation for program in programs} <= set(OPERATIONS)
    assert set(family.presets) - {"medium"} == {"tiny", "starter", "full"}


def test_family_gives_a_reason_for_each_unsupported_operation(pair: Pair) -> None:
    family = FAMILIES[pair.family].load()
    supported = {parse_program_name(name)[0] for name in family.operations}
    assert set(family.unsupported_operations) == set(OPERATIONS) - supported
    assert all(family.unsupported_operations.values())


def test_artifact_in_every_format_reproduces_the_modules(pair: Pair, artifact: Path) -> None:
    report = verification_report(artifact)
    assert report.failures == []
    assert {result.format for result in report.results} == set(
        FORMATS if pair.is_default else DEFAULT_FORMATS
    )
    assert {result.program for result in report.results} == set(FAMILIES[pair.family].operations)


def test_onnx_graphs_give_bitwise_equal_rows_alone_and_in_a_batch(pair: Pair, artifact: Path) -> None:
    results = [result for result in verification_report(artifact).results if result.check == "independence"]
    assert [result.difference for result in results if result.format == "onnx"] == [0.0] * len(
        FAMILIES[pair.family].operations
    )


def test_every_program_and_tensor_has_a_description(pair: Pair, artifact: Path) -> None:
    manifest = reader.read(artifact)
    assert manifest.description
    for program in manifest.programs:
        assert program.doc
        assert all(parameter.doc for parameter in program.parameters)
        assert all(entry.tensor.doc for entry in program.inputs)
        assert all(spec.doc for spec in [*program.state, *program.outputs])


def test_every_program_has_golden_rows_with_parameters(pair: Pair, artifact: Path) -> None:
    manifest = reader.read(artifact)
    for program in manifest.programs:
        golden = [entry for entry in manifest.golden_rows if _name(entry) == _name(program)]
        assert golden
        assert not program.parameters or any(entry.parameters for entry in golden)


def _name(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.variant)


def test_manifest_file_is_json_with_provenance(pair: Pair, artifact: Path) -> None:
    manifest = json.loads((artifact / reader.MANIFEST).read_text())
    assert manifest["format_version"] == 2
    assert manifest["provenance"]["dataset"] == pair.data
    assert {entry["name"] for entry in manifest["graphs"]} >= {
        program["readout"] for program in manifest["programs"]
    }


def test_pipeline_trains_measures_and_writes_an_artifact(
    pair: Pair, dataset: loading.Dataset, tmp_path: Path
) -> None:
    job = pipeline.TrainingJob(
        FAMILIES[pair.family].load(), dataset, tmp_path, preset="tiny", formats=("torchscript",)
    )
    manifest = reader.read(pipeline.run(job))
    assert manifest.quality
    assert (tmp_path / manifest.name / "1" / pipeline.SAMPLES_IMAGE).read_bytes().startswith(b"\x89PNG")
    assert manifest.provenance.settings["steps"] == "1"
