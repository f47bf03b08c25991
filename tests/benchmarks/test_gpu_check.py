"""The GPU check: its bundle, its results on disk, and a run of its parts on the CPU."""

import random
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import bundle, results, unpack
from benchmarks.gpu.base import Check, Finding, Note, Part, Verdict
from benchmarks.gpu.parts import PARTS, PartEntry
from benchmarks.gpu.results import PartResult
from benchmarks.report import Result, Table

FINDINGS: tuple[Finding, ...] = (
    Verdict("it holds", True, "3 of 3"),
    Result("speed", "1.50 (1.20–1.70)", "≥ 1"),
    Table("speeds", "speeds of | all", ["model", "speed"], [["a|b", "1"]]),
    Note("Not everything was measured."),
)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "onnxruntime_gpu-1.0-py3-none-any.whl"
    path.write_bytes(random.Random(0).randbytes(2500))
    return path


def test_pieces_that_arrive_in_any_order_are_joined(wheel: Path, tmp_path: Path) -> None:
    pieces = bundle.cut(wheel, tmp_path / "pieces", piece_bytes=1000)
    assert [piece.stat().st_size for piece in pieces] == [1000, 1000, 500]
    home = tmp_path / "home"
    assert unpack.receive([pieces[2]], home) == "missing: SHA256SUMS"
    assert unpack.receive([tmp_path / "pieces" / unpack.CHECKSUMS], home) == "missing: piece-00, piece-01"
    assert unpack.receive([pieces[1], pieces[0]], home) == "onnxruntime-gpu is complete"
    assert unpack.join(home).read_bytes() == wheel.read_bytes()


def test_damaged_piece_is_missing(wheel: Path, tmp_path: Path) -> None:
    pieces = bundle.cut(wheel, tmp_path / "pieces", piece_bytes=1000)
    pieces[1].write_bytes(bytes(1000))
    unpack.receive([*pieces, tmp_path / "pieces" / unpack.CHECKSUMS], tmp_path / "home")
    message = unpack.install_onnxruntime(tmp_path / "home")
    assert message.startswith("ONNX on CUDA is skipped: onnxruntime-gpu lacks piece-01. To include it, run")


def test_wheel_that_cannot_be_installed_only_skips_onnx(wheel: Path, tmp_path: Path) -> None:
    pieces = bundle.cut(wheel, tmp_path / "pieces", piece_bytes=1000)
    unpack.receive([*pieces, tmp_path / "pieces" / unpack.CHECKSUMS], tmp_path / "home")
    assert "skipped" in unpack.install_onnxruntime(tmp_path / "home")
    assert not (tmp_path / "home" / unpack.ONNXRUNTIME).exists()


def test_piece_that_did_not_travel_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "piece-00")
    assert unpack.main(["--home", str(tmp_path / "home"), "--receive", absent]) == 1
    assert f"{absent} is not here" in capsys.readouterr().err


def test_new_bundle_replaces_what_was_unpacked(tmp_path: Path) -> None:
    def unpacked(text: str) -> str:
        for name in (unpack.ARTIFACTS, unpack.TEST_ARTIFACTS):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "file").write_text(text)
            bundle.pack(tmp_path / name, tmp_path / "bundle")
        unpack.unpack(tmp_path / "bundle", tmp_path / "home")
        return (tmp_path / "home" / unpack.ARTIFACTS / "file").read_text()

    # An extraction that was stopped leaves a directory too.
    for name in (unpack.SITE, unpack.ARTIFACTS, unpack.TEST_ARTIFACTS):
        (tmp_path / "home" / name).mkdir(parents=True)
    (tmp_path / "bundle").mkdir()
    assert unpacked("old") == "old"
    assert unpacked("new") == "new"
    # A later call need not bring the bundle again.
    unpack.unpack(tmp_path / "nothing", tmp_path / "home")


def test_missing_bundle_is_reported_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert unpack.main(["--home", str(tmp_path / "home"), "--bundle", str(tmp_path)]) == 1
    assert "run `make gpu-bundle`" in capsys.readouterr().err


def test_archive_has_no_links_into_the_machine(tmp_path: Path) -> None:
    (tmp_path / "artifacts" / "model").mkdir(parents=True)
    (tmp_path / "artifacts" / "model" / "file").write_text("x")
    (tmp_path / "artifacts" / ".links").mkdir()
    (tmp_path / "artifacts" / ".links" / "model").symlink_to(tmp_path / "artifacts" / "model")
    with tarfile.open(bundle.pack(tmp_path / "artifacts", tmp_path)) as archive:
        assert archive.getnames() == ["artifacts", "artifacts/model", "artifacts/model/file"]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    result = PartResult("noise", "a GPU", "done", 3.0, list(FINDINGS))
    results.save(result, tmp_path)
    assert results.load("noise", tmp_path) == result
    assert results.load("engine", tmp_path) is None


@pytest.mark.parametrize(
    ("outcome", "findings", "is_green"),
    [("done", FINDINGS, True), ("timed out", FINDINGS, False), ("done", (Verdict("it", False),), False)],
)
def test_part_is_green_if_it_ended_and_all_its_verdicts_hold(
    outcome: str, findings: tuple[Finding, ...], is_green: bool
) -> None:
    assert PartResult("noise", "a GPU", outcome, findings=list(findings)).is_green is is_green


def test_page_has_every_finding() -> None:
    result = PartResult("noise", "a GPU", "failed", 3.0, list(FINDINGS), "Traceback")
    page = results.page([result], {"noise": "Noise."})
    assert "a GPU; failed after 3 s." in page
    assert "* holds  it holds: 3 of 3" in page
    assert "* speed: 1.50 (1.20–1.70) (target ≥ 1)" in page
    assert "| a/b | 1 |" in page
    assert "```\nTraceback\n```" in page


def test_unknown_part_is_rejected_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["nois"])
    assert "unknown part 'nois'; expected some of: answers" in capsys.readouterr().err


def test_part_runs_in_a_process_and_its_findings_are_kept(tmp_path: Path) -> None:
    assert command.main(["noise", "--device", "cpu", "--out", str(tmp_path)]) == 0
    result = results.load("noise", tmp_path)
    assert result is not None
    assert result.outcome == "done"
    assert "rehearsal on the CPU" in result.device
    assert any(isinstance(finding, Table) and finding.name == "gpu-noise" for finding in result.findings)
    assert "normal numbers of one step" in (tmp_path / command.PAGE).read_text().lower()


def test_part_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    options = command.parse(["noise", "--device", "cpu", "--out", str(tmp_path)])
    result = command.run_in_process(PartEntry("noise", 0.2, "Noise."), options)
    assert result.outcome == "timed out"
    assert not result.is_green


def test_error_of_a_part_is_kept_with_what_it_found_before(tmp_path: Path) -> None:
    class Broken(PartEntry):
        def load(self) -> Part:
            return find_and_fail

    options = command.parse(["noise", "--device", "cpu", "--out", str(tmp_path)])
    assert command.run_here(Broken("noise", 1.0, "Noise."), options) == 1
    result = results.load("noise", tmp_path)
    assert result is not None
    assert result.findings == [FINDINGS[0]]
    assert "ZeroDivisionError" in result.error


def find_and_fail(check: Check) -> Iterator[Finding]:
    yield FINDINGS[0]
    raise ZeroDivisionError


def test_limits_of_all_parts_are_below_eight_minutes() -> None:
    assert sum(part.seconds for part in PARTS) <= 480
    assert all(part.load() for part in PARTS)
