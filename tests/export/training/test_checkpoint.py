"""Checkpoints: an interrupted training resumes, and ends with the same result as an uninterrupted one."""

import dataclasses
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export import pipeline
from export.artifacts import reader
from export.datasets.loading import Dataset, Split
from export.families import mlp
from export.families.base import Preset
from export.families.classifier import Classifier
from export.graphs.program import DataSpec, Program, TensorSpec
from export.training import checkpoint, trainer
from export.training.checkpoint import Checkpoint, CheckpointError
from export.training.signals import defer_signals
from export.training.trainer import Settings

SETTINGS = Settings(steps=23, batch_rows=8, evaluations=5)


class Net(trainer.Network):
    """A network with all kinds of state: dropout, batch statistics, random noise.

    It raises KeyboardInterrupt at its training step number `interrupt_at`.
    """

    def __init__(self, interrupt_at: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.interrupt_at, self.num_calls = interrupt_at, 0

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        self.num_calls += self.training
        if self.training and self.num_calls == self.interrupt_at:
            raise KeyboardInterrupt
        outputs: Tensor = self.layers(rows + 0.1 * torch.randn_like(rows))
        return (outputs - rows).square().mean(1)


@pytest.fixture
def points() -> Dataset:
    rows = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    split = Split(rows, np.zeros(60, np.int64))
    data_spec = DataSpec("vector", TensorSpec("point", shape=(2,)))
    return Dataset("points", data_spec, split[:20], split[20:40], split[40:], "no digest")


def fit(
    points: Dataset, directory: Path, interrupt_at: int = 0, save_interval_seconds: float = 0
) -> tuple[trainer.TrainingResult, dict[str, Tensor]]:
    torch.manual_seed(1)
    net = Net(interrupt_at)
    saved = Checkpoint(directory, {"run": "1"}, save_interval_seconds)
    result = trainer.fit(net, points, SETTINGS, checkpoint=saved)
    return result, net.state_dict()


def saved_steps(directory: Path) -> int:
    saved = Checkpoint(directory, {"run": "1"}).load()
    return saved["steps"] if saved else -1


@pytest.mark.parametrize("interrupt_at", [2, 11, 12, 23])
def test_fit_interrupted_ends_with_same_bits_after_resuming(
    points: Dataset, tmp_path: Path, interrupt_at: int
) -> None:
    """Interrupts within an epoch and at its end, before the first and before the last evaluation."""
    expected, weights = fit(points, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(points, tmp_path / "interrupted", interrupt_at)
    assert saved_steps(tmp_path / "interrupted") == interrupt_at - 1
    result, resumed = fit(points, tmp_path / "interrupted")
    assert (result.best, result.curve) == (expected.best, expected.curve)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_fit_repeats_steps_since_last_checkpoint(points: Dataset, tmp_path: Path) -> None:
    _, weights = fit(points, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(points, tmp_path / "interrupted", interrupt_at=20, save_interval_seconds=1000)
    assert saved_steps(tmp_path / "interrupted") == -1
    _, resumed = fit(points, tmp_path / "interrupted", save_interval_seconds=1000)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_fit_does_not_train_finished_run_again(points: Dataset, tmp_path: Path) -> None:
    """An interrupt or an error while quality is measured does not cost the training."""
    expected, weights = fit(points, tmp_path)
    result, again = fit(points, tmp_path, interrupt_at=1)
    assert result.curve == expected.curve
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_curve_holds_mean_loss_between_evaluations(points: Dataset, tmp_path: Path) -> None:
    result, _ = fit(points, tmp_path)
    assert [point.step for point in result.curve] == [5, 10, 14, 19, 23]
    assert result.best == min(result.curve, key=lambda point: point.validation_loss)
    assert all(0 < point.training_loss < 10 for point in result.curve)


def test_progress_bar_shows_loss_before_first_evaluation(
    points: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Net(interrupt_at=4), points, SETTINGS)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"training:  13%\|.*<.*, step 3 of 23, loss \d\.\d+ *$", last), last


def test_progress_bar_is_complete_when_time_ends_run(
    points: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(SETTINGS, steps=10**9, seconds=0.3)
    trainer.fit(Net(), points, settings)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"training: 100%\|.*, step \d+ of 1000000000, loss \d.*, best \d", last), last


class NanLoss(Net):
    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return super().loss(rows, labels) * float("nan")


def test_fit_with_nan_loss_fails_with_advice_and_removes_checkpoint(points: Dataset, tmp_path: Path) -> None:
    """A run that resumed from the checkpoint would fail in the same way."""
    saved = Checkpoint(tmp_path / "model", {"run": "1"}, 0)
    message = r"no finite validation loss after 23 steps.* --learning-rate below 0\.002 or .* --seed"
    with pytest.raises(trainer.TrainingError, match=message):
        trainer.fit(NanLoss(), points, SETTINGS, checkpoint=saved)
    assert list(tmp_path.iterdir()) == []
    fit(points, tmp_path / "model")
    assert saved_steps(tmp_path / "model") == 23


def test_checkpoint_load_rejects_another_run(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"steps": "10", "seed": "0"}).save({"steps": 3})
    message = r"another run: seed is 0 in the checkpoint and 1 now; .*--no-resume"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path, {"steps": "10", "seed": "1"}).load()


def test_checkpoint_load_rejects_damaged_file(tmp_path: Path) -> None:
    saved = Checkpoint(tmp_path, {})
    saved.save({"steps": 3})
    saved.path.write_bytes(saved.path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint: .*--no-resume"):
        saved.load()


def test_checkpoint_save_failure_leaves_previous_file(tmp_path: Path) -> None:
    saved = Checkpoint(tmp_path, {})
    saved.save({"steps": 3})
    with pytest.raises(AttributeError):
        saved.save({"steps": lambda: 4})
    assert saved.load() == {"steps": 3}
    assert [path.name for path in saved.path.parent.iterdir()] == [saved.path.name]


def send_signals(flags: list[bool], *numbers: int) -> None:
    with defer_signals() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            flags.append(stop.is_set)


def test_defer_signals_raises_at_end_of_block() -> None:
    flags: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        send_signals(flags, signal.SIGTERM)
    assert flags == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_defer_signals_raises_immediately_on_second_signal() -> None:
    flags: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        send_signals(flags, signal.SIGINT, signal.SIGTERM)
    assert flags == [True]


class InterruptedFamily(mlp.Family):
    """A family that is interrupted after its training."""

    def build_programs(self, network: trainer.Network, data: Dataset) -> tuple[Program, ...]:
        raise KeyboardInterrupt


@pytest.fixture
def tiny(digits: Dataset, tmp_path: Path) -> pipeline.TrainingJob:
    return pipeline.TrainingJob(mlp.FAMILY, digits, tmp_path, preset="tiny", formats=("onnx",), steps=4)


@pytest.mark.slow
def test_run_removes_checkpoint_when_artifact_is_written(tiny: pipeline.TrainingJob) -> None:
    directory = pipeline.run(tiny)
    assert [path.name for path in directory.parent.iterdir()] == ["1"]


@pytest.mark.slow
def test_run_records_seed(tiny: pipeline.TrainingJob) -> None:
    assert reader.read(pipeline.run(dataclasses.replace(tiny, seed=3))).provenance.seed == 3


@pytest.mark.slow
def test_run_reports_progress_and_prints_nothing(
    tiny: pipeline.TrainingJob, capsys: pytest.CaptureFixture[str]
) -> None:
    messages: list[str] = []
    pipeline.run(tiny, messages.append)
    assert messages[0].startswith("accuracy: ")
    assert messages[-1] == "writing and verifying the graphs ..."
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_run_interrupted_reports_where_it_resumes(tiny: pipeline.TrainingJob) -> None:
    interrupted = dataclasses.replace(tiny, family=InterruptedFamily())
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(interrupted)
    assert [path.name for path in (tiny.models / "digits-mlp").iterdir()] == [checkpoint.DIRECTORY]
    with pytest.raises(CheckpointError, match="seed is 0 in the checkpoint and 1 now"):
        pipeline.run(dataclasses.replace(tiny, seed=1))
    messages: list[str] = []
    pipeline.run(tiny, messages.append)
    assert messages[0].startswith("resuming at step 4 of 4, from ")


class NanFamily(mlp.Family):
    """A family whose loss is NaN."""

    def build_network(self, data: Dataset, preset: Preset) -> Classifier:
        classifier = super().build_network(data, preset)
        with torch.no_grad():
            classifier.head.bias.fill_(float("nan"))
        return classifier


@pytest.mark.slow
def test_run_failed_leaves_no_files_and_can_be_repeated(tiny: pipeline.TrainingJob) -> None:
    failing = dataclasses.replace(tiny, family=NanFamily())
    for learning_rate in (None, 1e-4):
        with pytest.raises(trainer.TrainingError, match="no finite validation loss"):
            pipeline.run(dataclasses.replace(failing, learning_rate=learning_rate))
        assert list(tiny.models.iterdir()) == []
    manifest = reader.read(pipeline.run(dataclasses.replace(tiny, learning_rate=1e-4)))
    assert manifest.provenance.settings["learning_rate"] == "0.0001"


@pytest.mark.slow
def test_run_failed_leaves_existing_artifacts(tiny: pipeline.TrainingJob) -> None:
    directory = pipeline.run(tiny)
    with pytest.raises(trainer.TrainingError):
        pipeline.run(dataclasses.replace(tiny, family=NanFamily()))
    assert [path.name for path in directory.parent.iterdir()] == ["1"]


@pytest.mark.slow
def test_run_without_resume_discards_checkpoint(tiny: pipeline.TrainingJob) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(dataclasses.replace(tiny, family=InterruptedFamily()))
    messages: list[str] = []
    pipeline.run(dataclasses.replace(tiny, seed=1, resume=False), messages.append)
    assert not any("resuming" in message for message in messages)
