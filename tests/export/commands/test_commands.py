"""The command line: fast without torch, clear errors, and safe to interrupt."""

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


@pytest.mark.parametrize("arguments", [["list"], ["train-starters", "--models", "MODELS"]])
def test_commands_without_work_import_no_heavy_packages(arguments: list[str], tmp_path: Path) -> None:
    for name in jobs.STARTERS:
        (tmp_path / name / "1").mkdir(parents=True)
    arguments = [str(tmp_path) if argument == "MODELS" else argument for argument in arguments]
    subprocess.run([sys.executable, "-c", _SCRIPT.format(arguments)], check=True)


def test_list_prints_datasets_and_minutes_of_each_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    output = capsys.readouterr().out
    for job in jobs.select_jobs():
        assert f"{job.dataset} ({job.seconds / 60:.1f} min)" in output


@pytest.mark.parametrize("command", ["train-starters", "starter"])
def test_train_starters_skips_existing_models(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in jobs.STARTERS:
        (tmp_path / name / "7").mkdir(parents=True)
    assert main([command, "--models", str(tmp_path)]) == 0
    assert "digits-vae exists" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "old", "new"),
    [
        ([], "starter ", "train-starters"),
        ([], "write ", "export"),
        (["train"], "--fresh", "--no-resume"),
        (["all"], "--fresh", "--no-resume"),
    ],
)
def test_help_shows_new_names_only(
    arguments: list[str], old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith(new) for line in lines)
    assert not any(line.startswith(old) for line in lines)


def test_job_of_interrupted_training_has_no_artifact(tmp_path: Path) -> None:
    job = jobs.select_jobs(["digits-vae"])[0]
    (tmp_path / "digits-vae" / ".1.partial").mkdir(parents=True)
    (tmp_path / "digits-vae" / DIRECTORY).mkdir(parents=True)
    assert not job.has_artifact(tmp_path)
    (tmp_path / "digits-vae" / "1").mkdir()
    assert job.has_artifact(tmp_path)


def test_select_jobs_returns_longest_first() -> None:
    seconds = [job.seconds for job in jobs.select_jobs()]
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.slow
def test_all_continues_after_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One artifact exists, one is trained, one has a checkpoint of another run."""
    (tmp_path / "digits-vae" / "1").mkdir(parents=True)
    Checkpoint(tmp_path / "digits-cnn", {"seed": "5"}).save({})
    names = ["digits-vae", "digits-mlp", "digits-cnn"]
    settings = ["--preset", "tiny", "--format", "torchscript", "--models", str(tmp_path), "--jobs", "2"]
    assert main(["all", *names, *settings]) == 1
    output = capsys.readouterr()
    assert "digits-vae exists" in output.out
    assert "digits-mlp: finished in" in output.err
    assert "digits-cnn: FAILED with exit status 1" in output.err
    assert f"log: {tmp_path / '.logs' / 'digits-cnn.log'}" in output.err
    assert "seed is 5 in the checkpoint and 0 now" in output.err
    assert "python -m export all digits-cnn" in output.err
    assert "accuracy: " in output.out
    assert "\r" not in output.err
    assert (tmp_path / "digits-mlp" / "1" / "training.json").is_file()
    assert f"Wrote {tmp_path / 'digits-mlp' / '1'}" in (tmp_path / ".logs" / "digits-mlp.log").read_text()


def test_all_skips_dataset_whose_package_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unavailable = jobs.Job("unavailable-mlp", "mlp", "unavailable", "no_such_package")
    (digits,) = jobs.select_jobs(["digits-mlp"])
    assert train_all.select_missing([unavailable, digits], tmp_path) == [digits]
    assert "needs the package no_such_package, which is not installed" in capsys.readouterr().out


def test_all_rejects_unknown_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["all", "digits-nothing"]) == 1
    assert "unknown artifact 'digits-nothing'; expected one of: digits-vae, " in capsys.readouterr().err


@pytest.mark.slow
def test_train_interrupted_by_ctrl_c_resumes_from_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "mlp", "--models", str(tmp_path), "--threads", "1", "--preset", "tiny"]
    arguments += ["--steps", "300", "--format", "torchscript"]
    command = [sys.executable, "-m", "export", *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        output = b""
        while b"training:" not in output:
            output += os.read(process.stderr.fileno(), 1000)
        process.send_signal(signal.SIGINT)
        output += process.stderr.read()
    assert process.returncode == 130
    assert b"repeat the command to resume" in output
    assert [path.name for path in (tmp_path / "digits-mlp").iterdir()] == [DIRECTORY]
    assert main(arguments) == 0
    assert "resuming at step" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "digits-mlp").iterdir()] == ["1"]


def test_verify_prints_table(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(artifacts["vae"])]) == 0
    assert "golden rows in a mixed batch" in capsys.readouterr().out


def test_verify_reports_missing_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "expected an artifact directory, but it has no manifest.json" in capsys.readouterr().err


def test_train_rejects_unknown_dataset_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vae", "--data", "nothing"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_train_rejects_dataset_of_other_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "mlp", "--data", "moons"]) == 1
    assert "unknown dataset 'moons' for mlp; expected one of: digits" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-0.1", "nan", "inf", "fast"])
def test_train_rejects_learning_rate_that_is_not_positive(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["train", "mlp", f"--learning-rate={value}"])
    assert f"expected a number above 0, got {value}" in capsys.readouterr().err


def test_train_rejects_invalid_name_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "vae", "--models", str(tmp_path), "--name", "No Name"]) == 1
    assert "training" not in capsys.readouterr().err
