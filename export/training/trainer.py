"""The training loop of all families.

AdamW (Loshchilov & Hutter 2019) with a cosine schedule and gradient clipping. The result is the exponential
moving average of the weights at the lowest validation loss. A network provides its loss, or a sequence of
objectives that each step minimizes one after the other.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from export.datasets.loading import Dataset, Split
from export.training.checkpoint import Checkpoint, State
from export.training.signals import defer_signals

_VALIDATION_BATCH_ROWS = 256
# Number of steps that the displayed mean loss covers.
_LOSS_WINDOW = 50
# The bar covers the whole run, so that the remaining time is correct whether steps or seconds end it.
_BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class TrainingError(RuntimeError):
    """Raised when training produces no usable weights."""


class Network(nn.Module):
    """A trainable module; all state that it keeps between steps is in parameters and buffers."""

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of each row; random numbers come from torch's global generator.

        Args:
            rows: Data rows, [B, *shape].
            labels: Class labels, int64 [B].

        Returns:
            The loss of each row, [B].
        """
        raise NotImplementedError

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator["Objective"]:
        """Yield the objectives of one step; each is computed after the update by the previous one."""
        yield Objective(self.loss(rows, labels), tuple(self.parameters()))


@dataclass(frozen=True)
class Objective:
    """The loss of each row [B], and the parameters that are updated to minimize it."""

    loss: Tensor
    parameters: tuple[nn.Parameter, ...]


@dataclass(frozen=True)
class Settings:
    """Training settings.

    Training ends after `steps` batches or `seconds` seconds, whichever comes first. It evaluates the
    validation loss `evaluations` times. A validation split with fewer rows is evaluated repeatedly, with
    other random numbers, until `validation_rows` rows are reached; 1 is enough for a loss without random
    numbers.
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
    """A point of the training curve: the mean loss since the previous point, and the validation loss."""

    step: int
    training_loss: float
    validation_loss: float


@dataclass(frozen=True)
class TrainingResult:
    """The result of a run: seconds over all sessions, the point of lowest validation loss, and the curve."""

    seconds: float
    best: CurvePoint
    curve: tuple[CurvePoint, ...]


def fit(
    network: Network,
    data: Dataset,
    settings: Settings,
    title: str = "  training",
    checkpoint: Checkpoint | None = None,
    on_resume: Callable[[str], None] = lambda message: None,
) -> TrainingResult:
    """Train a network in place; leave it on the CPU, in eval mode, with the best averaged weights.

    An interrupted run resumes from its checkpoint. On a CPU it then ends with the same bits as an
    uninterrupted run, unless `settings.seconds` ends it.

    Args:
        network: The network to train.
        data: Its training and validation rows.
        settings: The training settings.
        title: Title of the progress bar.
        checkpoint: Where the state of the run is saved; None saves nothing.
        on_resume: Called with a message for the user if the run resumes.

    Raises:
        TrainingError: If no validation loss is finite. The checkpoint is then removed.
        CheckpointError: If the checkpoint is damaged or belongs to another run.
        KeyboardInterrupt: If SIGINT or SIGTERM arrived; the checkpoint is saved first.
    """
    torch.manual_seed(settings.seed)
    network.to(settings.device).train()
    run = _TrainingRun(network, data, settings)
    if checkpoint and (saved := checkpoint.load()):
        run.load_state_dict(saved)
        on_resume(f"resuming at step {run.steps} of {settings.steps}, from {checkpoint.path}")
    with defer_signals() as stop, tqdm(**_bar_settings(title, run.progress)) as bar:
        while run.progress < 1 and not stop.is_set:
            run.step()
            if run.is_evaluation_due:
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
        # Resuming from this checkpoint would fail in the same way.
        if checkpoint:
            checkpoint.remove()
        raise


def _bar_settings(title: str, progress: float) -> dict[str, Any]:
    return {
        "desc": title, "initial": progress, "total": 1.0, "bar_format": _BAR_FORMAT, "dynamic_ncols": True
    }  # fmt: skip


class _TrainingRun:
    """A training run between two steps; its state_dict holds everything that later steps depend on."""

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
    def is_evaluation_due(self) -> bool:
        return self.progress >= min(1, (len(self._curve) + 1) / self._settings.evaluations)

    @property
    def summary(self) -> str:
        """The step, the mean loss of recent steps, and the best validation loss."""
        recent = self._losses[-_LOSS_WINDOW:]
        loss = sum(recent) / len(recent) if recent else self._curve[-1].training_loss
        best = f", best {self._best.validation_loss:.4g} at step {self._best.step}" if self._best else ""
        return f"step {self.steps} of {self._settings.steps}, loss {loss:.4g}{best}"

    def step(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (1 + math.cos(math.pi * self.progress)) / 2
        for objective in self._network.objectives(*self._batches.next_batch()):
            loss = objective.loss.mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=objective.parameters)  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(objective.parameters, self._settings.clip)
            # Parameters without a gradient, and their moments, do not change.
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
        """Load the best weights into the network, and move it to the CPU in eval mode."""
        if self._best is None:
            raise TrainingError(
                f"training failed: no finite validation loss after {self.steps} steps, nothing was saved; "
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
    """Batches of training rows, in a new random order each epoch; an incomplete last batch is dropped."""

    def __init__(self, split: Split, settings: Settings) -> None:
        self._rows, self._labels = _to_tensors(split, settings)
        self._size = min(settings.batch_rows, len(split))
        self._order, self._start = torch.empty(0, dtype=torch.int64), 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return the next rows [B, *shape] and labels int64 [B]."""
        if self._start + self._size > len(self._order):
            self._order, self._start = torch.randperm(len(self._rows)), 0
        indices = self._order[self._start : self._start + self._size].to(self._rows.device)
        self._start += self._size
        return self._rows[indices], self._labels[indices]

    def state_dict(self) -> State:
        return {"order": self._order, "start": self._start}

    def load_state_dict(self, state: State) -> None:
        self._order, self._start = state["order"], state["start"]


def _random_states(device: str) -> list[Tensor]:
    cuda_states = [torch.cuda.get_rng_state(device)] if device.startswith("cuda") else []
    return [torch.get_rng_state(), *cuda_states]


def _set_random_states(states: list[Tensor], device: str) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def validation_loss(network: Network, split: Split, settings: Settings) -> float:
    """Return the mean loss over a split; each call uses the same random numbers.

    A split with fewer than `settings.validation_rows` rows is evaluated repeatedly.
    """
    rows, labels = _to_tensors(split, settings)
    devices = [] if settings.device == "cpu" else [torch.device(settings.device)]
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        losses = [
            network.loss(
                rows[start : start + _VALIDATION_BATCH_ROWS], labels[start : start + _VALIDATION_BATCH_ROWS]
            )
            for _ in range(max(1, settings.validation_rows // len(rows)))
            for start in range(0, len(rows), _VALIDATION_BATCH_ROWS)
        ]
    return float(torch.cat(losses).mean())


def _to_tensors(split: Split, settings: Settings) -> tuple[Tensor, Tensor]:
    device = settings.device
    return torch.from_numpy(split.rows).to(device), torch.from_numpy(split.labels).to(device)
