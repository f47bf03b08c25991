"""The command line: light where it can be, and plain about what went wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import STARTERS, main

_SCRIPT = """
import sys
from export.__main__ import main
main({})
sys.exit(bool({{"torch", "sklearn", "matplotlib"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["list"], ["starter", "--models", "MODELS"]])
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    for name, _, _ in STARTERS:
        (tmp_path / name / "1").mkdir(parents=True)
    given = [str(tmp_path) if argument == "MODELS" else argument for argument in arguments]
    subprocess.run([sys.executable, "-c", _SCRIPT.format(given)], check=True, timeout=60)


def test_starters_that_are_there_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, _, _ in STARTERS:
        (tmp_path / name / "7").mkdir(parents=True)
    assert main(["starter", "--models", str(tmp_path)]) == 0
    assert "digits-vae is there" in capsys.readouterr().out


def test_an_interrupted_starter_counts_as_missing(tmp_path: Path) -> None:
    from export.__main__ import missing

    (tmp_path / "digits-vae" / ".1.partial").mkdir(parents=True)
    assert missing(tmp_path) == list(STARTERS)


def test_verify_prints_a_table(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifacts["vae"])]) == 0
    assert "golden rows in company" in capsys.readouterr().out


def test_verify_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "expected an artifact, but it holds no manifest.json" in capsys.readouterr().err


def test_an_unknown_data_set_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", "--data", "nothing"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_name_that_cannot_be_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vae", "--models", str(tmp_path), "--name", "No Name"]) == 1
    assert "training" not in capsys.readouterr().err
