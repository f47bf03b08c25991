"""One training loop for every family.

AdamW with a cosine schedule and gradient clipping; an exponential moving average
of the weights is what is kept, taken where the validation loss was lowest. Knows
nothing of the network but its loss, or the losses that it descends in turn.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from export.datasets.loading import Dataset, Split
from export.training.checkpoint import Checkpoint, State
from export.training.signals import defer_signals

_CHUNK_ROWS = 256
# Of how many steps the mean loss is shown.
_RECENT = 50
# Time left is that of the whole run, whether steps or seconds end it.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class TrainingError(RuntimeError):
    """A run from which no network came."""


class Network(nn.Module):
    """A module that can be trained; what it carries from step to step are parameters and buffers."""

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row [B], of rows [B, *shape] and int64 labels [B]; it draws its own noise."""
        raise NotImplementedError

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator["Objective"]:
        """What one step descends, in turn, each computed after the one before has been descended."""
        yield Objective(self.loss(rows, labels), tuple(self.parameters()))


@dataclass(frozen=True)
class Objective:
    """A loss of each row [B], and the only parameters that may move to lower it."""

    loss: Tensor
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Settings:
    """How to train: `steps` batches, or as many as fit into `seconds` when those are fewer.

    Validation rows are looked at again, with other random numbers, until they are `validation_rows`:
    once is enough for a loss that draws none.
    """

    steps: int
    batch_rows: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.995
    clip: float = 1.0
    evaluations: int = 15
    validation_rows: int = 1300
    seconds: float = math.inf
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class CurvePoint:
    """Of a training curve: the mean loss of the steps since the last point, and the validation loss."""

    step: int
    training_loss: float
    validation_loss: float


@dataclass(frozen=True)
class TrainingResult:
    """What became of a run; `best` is where the validation loss was lowest, `seconds` are of all sessions."""

    seconds: float
    best: CurvePoint
    curve: tuple[CurvePoint, ...]


def fit(
    network: Network,
    data: Dataset,
    settings: Settings,
    title: str = "  training",
    checkpoint: Checkpoint | None = None,
) -> TrainingResult:
    """Train a network in place and leave it in eval mode with the best averaged weights, on the CPU.

    With a checkpoint, a run that was interrupted goes on where it stopped and, unless `seconds`
    end it, ends as if it had not been: on a CPU, to the bit. TrainingError, and no checkpoint, when no
    validation loss is a number.
    """
    torch.manual_seed(settings.seed)
    network.to(settings.device).train()
    run = _Run(network, data, settings)
    if checkpoint and (saved := checkpoint.load()):
        run.load_state_dict(saved)
        print(f"  going on at step {run.steps} of {settings.steps}, from {checkpoint.path}", flush=True)
    with defer_signals() as interrupt, tqdm(**_bar(title, run.progress)) as bar:
        while run.progress < 1 and not interrupt.is_set:
            run.step()
            if run.evaluation_due:
                run.evaluate()
            bar.set_postfix_str(run.summary, refresh=False)
            bar.update(run.progress - bar.n)
            if checkpoint and checkpoint.is_due:
                checkpoint.save(run.state_dict())
        if checkpoint:
            checkpoint.save(run.state_dict())
    try:
        return run.finish()
    except TrainingError:
        # The same command would find nothing else there.
        if checkpoint:
            checkpoint.remove()
        raise


def _bar(title: str, progress: float) -> dict[str, Any]:
    return {"desc": title, "initial": progress, "total": 1.0, "bar_format": _BAR, "dynamic_ncols": True}


class _Run:
    """A training run between two steps; all that the next ones depend on is in its state_dict."""

    def __init__(self, network: Network, data: Dataset, settings: Settings) -> None:
        self._network, self._data, self._settings = network, data, settings
        self._started = time.monotonic()
        self._batches = _Batches(data.train, settings)
        self._optimizer = torch.optim.AdamW(
            network.parameters(),
            settings.learning_rate,
            settings.betas,
            weight_decay=settings.weight_decay,
        )
        self._average = AveragedModel(
            network,
            multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay),  # type: ignore[no-untyped-call]
        )
        self.steps, self.progress = 0, 0.0
        self._losses: list[float] = []
        self._curve: list[CurvePoint] = []
        self._best: CurvePoint | None = None
        self._best_weights: State = {}

    @property
    def evaluation_due(self) -> bool:
        return self.progress >= min(1, (len(self._curve) + 1) / self._settings.evaluations)

    @property
    def summary(self) -> str:
        """The step, the mean loss of the last few, and the best validation loss so far."""
        recent = self._losses[-_RECENT:]
        loss = sum(recent) / len(recent) if recent else self._curve[-1].training_loss
        best = f", best {self._best.validation_loss:.4g} at step {self._best.step}" if self._best else ""
        return f"step {self.steps} of {self._settings.steps}, loss {loss:.4g}{best}"

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (1 + math.cos(math.pi * self.progress)) / 2
        for objective in self._network.objectives(*self._batches.draw()):
            loss = objective.loss.mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=objective.parameters)  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(objective.parameters, self._settings.clip)
            # Parameters without a gradient stay, and so do their moments.
            self._optimizer.step()
        self._average.update_parameters(self._network)
        self._losses.append(float(loss.detach()))
        self.steps += 1
        self.progress = min(1, max(self.steps / self._settings.steps, self._seconds / self._settings.seconds))

    def evaluate(self) -> None:
        average = self._average.module
        assert isinstance(average, Network)
        average.eval()
        loss = validation_loss(average, self._data.validation, self._settings)
        point = CurvePoint(self.steps, sum(self._losses) / len(self._losses), loss)
        self._losses.clear()
        self._curve.append(point)
        if loss < (self._best.validation_loss if self._best else math.inf):
            self._best, self._best_weights = point, copy.deepcopy(average.state_dict())

    def finish(self) -> TrainingResult:
        """Leave the network with the best weights."""
        if self._best is None:
            raise TrainingError(
                f"after {self.steps} steps no validation loss was a finite number, and nothing was kept; "
                f"train again with a --learning-rate below {self._settings.learning_rate:g} or another --seed"
            )
        self._network.load_state_dict(self._best_weights)
        self._network.to("cpu").eval().requires_grad_(False)
        return TrainingResult(self._seconds, self._best, tuple(self._curve))

    def state_dict(self) -> State:
        return {
            "steps": self.steps,
            "progress": self.progress,
            "seconds": self._seconds,
            "network": self._network.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "batches": self._batches.state_dict(),
            "random": _random_states(self._settings.device),
            "losses": self._losses,
            "curve": [astuple(point) for point in self._curve],
            "best": self._best and astuple(self._best),
            "best_weights": self._best_weights,
        }

    def load_state_dict(self, state: State) -> None:
        self.steps, self.progress = state["steps"], state["progress"]
        self._started = time.monotonic() - state["seconds"]
        self._network.load_state_dict(state["network"])
        self._average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._batches.load_state_dict(state["batches"])
        self._losses = list(state["losses"])
        self._curve = [CurvePoint(*point) for point in state["curve"]]
        self._best = CurvePoint(*state["best"]) if state["best"] else None
        self._best_weights = state["best_weights"]
        _set_random_states(state["random"], self._settings.device)

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._started


class _Batches:
    """Training rows in a new random order every epoch; the few that would not fill a batch are left out."""

    def __init__(self, part: Split, settings: Settings) -> None:
        self._rows, self._labels = _tensors(part, settings)
        self._size = min(settings.batch_rows, len(part))
        self._order, self._start = torch.empty(0, dtype=torch.int64), 0

    def draw(self) -> tuple[Tensor, Tensor]:
        """The next rows [B, *shape] and labels [B]."""
        if self._start + self._size > len(self._order):
            self._order, self._start = torch.randperm(len(self._rows)), 0
        chosen = self._order[self._start : self._start + self._size].to(self._rows.device)
        self._start += self._size
        return self._rows[chosen], self._labels[chosen]

    def state_dict(self) -> State:
        return {"order": self._order, "start": self._start}

    def load_state_dict(self, state: State) -> None:
        self._order, self._start = state["order"], state["start"]


def _random_states(device: str) -> list[Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.startswith("cuda") else []
    return [torch.get_rng_state(), *on_device]


def _set_random_states(states: list[Tensor], device: str) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def validation_loss(network: Network, held_out: Split, settings: Settings) -> float:
    """Mean loss over held-out rows, over again when they are few, with the same random numbers every time."""
    rows, labels = _tensors(held_out, settings)
    devices = [] if settings.device == "cpu" else [torch.device(settings.device)]
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        losses = [
            network.loss(rows[start : start + _CHUNK_ROWS], labels[start : start + _CHUNK_ROWS])
            for _ in range(max(1, settings.validation_rows // len(rows)))
            for start in range(0, len(rows), _CHUNK_ROWS)
        ]
    return float(torch.cat(losses).mean())


def _tensors(part: Split, settings: Settings) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.rows).to(settings.device), torch.from_numpy(part.labels).to(settings.device)
