"""Training that is interrupted goes on, and ends as if it had not been."""

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
    """Everything that has a state: dropout, batch statistics, noise of its own; and it can break down."""

    def __init__(self, breaks_at: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.breaks_at, self.calls = breaks_at, 0

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == self.breaks_at:
            raise KeyboardInterrupt
        moved: Tensor = self.layers(rows + 0.1 * torch.randn_like(rows))
        return (moved - rows).square().mean(1)


@pytest.fixture
def points() -> Dataset:
    rows = np.random.default_rng(0).normal(size=(60, 2)).astype(np.float32)
    part = Split(rows, np.zeros(60, np.int64))
    value = DataSpec("vector", TensorSpec("point", shape=(2,)))
    return Dataset("points", value, part[:20], part[20:40], part[40:], "no digest")


def fit(
    points: Dataset, directory: Path, breaks_at: int = 0, every: float = 0
) -> tuple[trainer.TrainingResult, dict[str, Tensor]]:
    torch.manual_seed(1)
    net = Net(breaks_at)
    outcome = trainer.fit(net, points, SETTINGS, checkpoint=Checkpoint(directory, {"run": "1"}, every))
    return outcome, net.state_dict()


def steps(directory: Path) -> int:
    saved = Checkpoint(directory, {"run": "1"}).load()
    return saved["steps"] if saved else -1


@pytest.mark.parametrize("breaks_at", [2, 11, 12, 23])
def test_an_interrupted_run_ends_like_one_that_was_not(
    points: Dataset, tmp_path: Path, breaks_at: int
) -> None:
    """Mid-epoch and at its end, before the first evaluation and after the last but one."""
    expected, weights = fit(points, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(points, tmp_path / "broken", breaks_at)
    assert steps(tmp_path / "broken") == breaks_at - 1
    outcome, resumed = fit(points, tmp_path / "broken")
    assert (outcome.best, outcome.curve) == (expected.best, expected.curve)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_what_was_lost_since_the_last_checkpoint_is_done_again(points: Dataset, tmp_path: Path) -> None:
    _, weights = fit(points, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(points, tmp_path / "broken", breaks_at=20, every=1000)
    assert steps(tmp_path / "broken") == -1
    _, resumed = fit(points, tmp_path / "broken", every=1000)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_a_finished_run_is_not_trained_again(points: Dataset, tmp_path: Path) -> None:
    """Whoever interrupts the measuring, or finds a fault in it, does not train for that once more."""
    expected, weights = fit(points, tmp_path)
    outcome, again = fit(points, tmp_path, breaks_at=1)
    assert outcome.curve == expected.curve
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


def test_the_curve_is_the_mean_loss_between_evaluations(points: Dataset, tmp_path: Path) -> None:
    outcome, _ = fit(points, tmp_path)
    assert [point.step for point in outcome.curve] == [5, 10, 14, 19, 23]
    assert outcome.best == min(outcome.curve, key=lambda point: point.validation_loss)
    assert all(0 < point.training_loss < 10 for point in outcome.curve)


def test_the_bar_shows_the_loss_before_the_first_evaluation(
    points: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(Net(breaks_at=4), points, SETTINGS)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"training:  13%\|.*<.*, step 3 of 23, loss \d\.\d+ *$", last), last


def test_the_bar_of_a_run_that_time_ends_comes_to_its_end(
    points: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(SETTINGS, steps=10**9, seconds=0.3)
    trainer.fit(Net(), points, settings)
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"training: 100%\|.*, step \d+ of 1000000000, loss \d.*, best \d", last), last


class Lost(Net):
    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return super().loss(rows, labels) * float("nan")


def test_losses_that_are_no_numbers_are_said_to_be_and_what_to_do(points: Dataset, tmp_path: Path) -> None:
    """Its checkpoint is gone: going on from there would end in the same way."""
    kept = Checkpoint(tmp_path / "model", {"run": "1"}, 0)
    said = r"after 23 steps no validation loss was a finite .* --learning-rate below 0\.002 or .* --seed"
    with pytest.raises(trainer.TrainingError, match=said):
        trainer.fit(Lost(), points, SETTINGS, checkpoint=kept)
    assert list(tmp_path.iterdir()) == []
    fit(points, tmp_path / "model")
    assert steps(tmp_path / "model") == 23


def test_another_run_may_not_go_on(tmp_path: Path) -> None:
    Checkpoint(tmp_path, {"steps": "10", "seed": "0"}).save({"steps": 3})
    with pytest.raises(CheckpointError, match=r"another run \(seed: 0 there, 1 here\); .*--fresh"):
        Checkpoint(tmp_path, {"steps": "10", "seed": "1"}).load()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, {})
    kept.save({"steps": 3})
    kept.path.write_bytes(kept.path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"cannot be read .*--fresh"):
        kept.load()


def test_a_save_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path, {})
    kept.save({"steps": 3})
    with pytest.raises(AttributeError):
        kept.save({"steps": lambda: 4})
    assert kept.load() == {"steps": 3}
    assert [path.name for path in kept.path.parent.iterdir()] == [kept.path.name]


def signalled(seen: list[bool], *numbers: int) -> None:
    with defer_signals() as interrupt:
        for number in numbers:
            os.kill(os.getpid(), number)
            seen.append(interrupt.is_set)


def test_a_signal_waits_for_the_end_of_the_block() -> None:
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        signalled(seen, signal.SIGTERM)
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_does_not_wait() -> None:
    seen: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        signalled(seen, signal.SIGINT, signal.SIGTERM)
    assert seen == [True]


class Stopping(mlp.Family):
    """Interrupted when its training is over."""

    def build_programs(self, network: trainer.Network, data: Dataset) -> tuple[Program, ...]:
        raise KeyboardInterrupt


@pytest.fixture
def tiny(digits: Dataset, tmp_path: Path) -> pipeline.TrainingJob:
    return pipeline.TrainingJob(mlp.FAMILY, digits, tmp_path, preset="tiny", formats=("onnx",), steps=4)


def test_the_checkpoint_is_gone_when_the_artifact_is_there(tiny: pipeline.TrainingJob) -> None:
    written = pipeline.run(tiny)
    assert [path.name for path in written.parent.iterdir()] == ["1"]


def test_the_seed_is_recorded(tiny: pipeline.TrainingJob) -> None:
    assert reader.read(pipeline.run(dataclasses.replace(tiny, seed=3))).provenance.seed == 3


def test_an_interrupted_recipe_says_where_it_goes_on(
    tiny: pipeline.TrainingJob, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupted = dataclasses.replace(tiny, family=Stopping())
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(interrupted)
    assert [path.name for path in (tiny.models / "digits-mlp").iterdir()] == [checkpoint.DIRECTORY]
    with pytest.raises(CheckpointError, match="seed: 0 there, 1 here"):
        pipeline.run(dataclasses.replace(tiny, seed=1))
    pipeline.run(tiny)
    assert "going on at step 4 of 4" in capsys.readouterr().out


class Exploding(mlp.Family):
    """Its loss is no number."""

    def build_network(self, data: Dataset, preset: Preset) -> Classifier:
        classifier = super().build_network(data, preset)
        with torch.no_grad():
            classifier.head.bias.fill_(float("nan"))
        return classifier


def test_a_failed_training_leaves_nothing_and_can_be_repeated(tiny: pipeline.TrainingJob) -> None:
    exploding = dataclasses.replace(tiny, family=Exploding())
    for learning_rate in (None, 1e-4):
        with pytest.raises(trainer.TrainingError, match="no validation loss was a finite number"):
            pipeline.run(dataclasses.replace(exploding, learning_rate=learning_rate))
        assert list(tiny.models.iterdir()) == []
    manifest = reader.read(pipeline.run(dataclasses.replace(tiny, learning_rate=1e-4)))
    assert manifest.provenance.settings["learning_rate"] == "0.0001"


def test_a_failed_training_leaves_the_artifacts_that_there_are(tiny: pipeline.TrainingJob) -> None:
    written = pipeline.run(tiny)
    with pytest.raises(trainer.TrainingError):
        pipeline.run(dataclasses.replace(tiny, family=Exploding()))
    assert [path.name for path in written.parent.iterdir()] == ["1"]


def test_a_fresh_start_forgets(tiny: pipeline.TrainingJob, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(dataclasses.replace(tiny, family=Stopping()))
    pipeline.run(dataclasses.replace(tiny, seed=1, fresh=True))
    assert "going on" not in capsys.readouterr().out
