"""The command line: light where it can be, plain about what went wrong, and safe to interrupt."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export.__main__ import main
from export.commands import jobs, train_all
from export.training.checkpoint import DIRECTORY, Checkpoint

_SCRIPT = """
import sys
from export.__main__ import main
main({})
sys.exit(bool({{"torch", "sklearn", "matplotlib", "tqdm"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["list"], ["starter", "--models", "MODELS"]])
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    for name in jobs.STARTERS:
        (tmp_path / name / "1").mkdir(parents=True)
    given = [str(tmp_path) if argument == "MODELS" else argument for argument in arguments]
    subprocess.run([sys.executable, "-c", _SCRIPT.format(given)], check=True, timeout=60)


def test_list_says_what_suits_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    for job in jobs.jobs():
        assert f"{job.data} ({job.seconds / 60:.1f} min)" in said


def test_starters_that_are_there_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in jobs.STARTERS:
        (tmp_path / name / "7").mkdir(parents=True)
    assert main(["starter", "--models", str(tmp_path)]) == 0
    assert "digits-vae is there" in capsys.readouterr().out


def test_an_interrupted_artifact_counts_as_missing(tmp_path: Path) -> None:
    job = jobs.jobs(["digits-vae"])[0]
    (tmp_path / "digits-vae" / ".1.partial").mkdir(parents=True)
    (tmp_path / "digits-vae" / DIRECTORY).mkdir(parents=True)
    assert not job.is_made(tmp_path)
    (tmp_path / "digits-vae" / "1").mkdir()
    assert job.is_made(tmp_path)


def test_the_longest_come_first() -> None:
    seconds = [job.seconds for job in jobs.jobs()]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.timeout(300)
def test_all_goes_on_past_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One is there, one is made, one finds the checkpoint of another run."""
    (tmp_path / "digits-vae" / "1").mkdir(parents=True)
    Checkpoint(tmp_path / "digits-cnn", {"seed": "5"}).save({})
    names = ["digits-vae", "digits-mlp", "digits-cnn"]
    settings = ["--preset", "tiny", "--format", "torchscript", "--models", str(tmp_path), "--jobs", "2"]
    assert main(["all", *names, *settings]) == 1
    said = capsys.readouterr()
    assert "digits-vae is there" in said.out
    assert "digits-mlp: done in" in said.err
    assert "digits-cnn: FAILED with status 1" in said.err
    assert "seed: 5 there, 0 here" in said.err
    assert "python -m export all digits-cnn" in said.err
    assert "accuracy: " in said.out
    assert "\r" not in said.err
    assert (tmp_path / "digits-mlp" / "1" / "training.json").is_file()


def test_data_that_cannot_be_had_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dreams = jobs.Job("dreams-mlp", "mlp", "dreams", "no_such_package")
    (digits,) = jobs.jobs(["digits-mlp"])
    assert train_all.missing([dreams, digits], tmp_path) == [digits]
    assert "comes with the package no_such_package, which is not installed" in capsys.readouterr().out


def test_an_unknown_artifact_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "digits-nothing"]) == 1
    assert "expected names of digits-vae, " in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_ctrl_c_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "export", "train", "mlp", "--models", str(tmp_path), "--threads", "1"]
    command += ["--preset", "tiny", "--steps", "300", "--format", "torchscript"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while b"training:" not in said:
            said += os.read(process.stderr.fileno(), 1000)
        process.send_signal(signal.SIGINT)
        said += process.stderr.read()
    assert process.returncode == 130
    assert b"the same command goes on" in said
    assert [path.name for path in (tmp_path / "digits-mlp").iterdir()] == [DIRECTORY]
    again = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert "going on at step" in again.stdout
    assert [path.name for path in (tmp_path / "digits-mlp").iterdir()] == ["1"]


def test_verify_prints_a_table(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifacts["vae"])]) == 0
    assert "golden rows in company" in capsys.readouterr().out


def test_verify_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "expected an artifact, but it holds no manifest.json" in capsys.readouterr().err


def test_an_unknown_data_set_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", "--data", "nothing"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_data_that_a_family_is_not_for_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mlp", "--data", "moons"]) == 1
    assert "expected one of digits as --data for mlp" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["0", "-0.1", "nan", "inf", "fast"])
def test_a_learning_rate_is_a_number_above_0(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "mlp", f"--learning-rate={given}"])
    assert f"expected a number above 0, got {given}" in capsys.readouterr().err


def test_a_name_that_cannot_be_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vae", "--models", str(tmp_path), "--name", "No Name"]) == 1
    assert "training" not in capsys.readouterr().err
