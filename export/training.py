"""One training loop for every family.

AdamW with a cosine schedule and gradient clipping; an exponential moving average
of the weights is what is kept, taken where the validation loss was lowest. Knows
nothing of the network but its loss, or the losses that it descends in turn.
"""

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from export.data import Dataset, Part

_VALIDATION_ROWS = 1300
_CHUNK_ROWS = 256


class Network(nn.Module):
    """A module that can be trained."""

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
    """How to train: `steps` batches, or as many as fit into `seconds` when those are fewer."""

    steps: int
    batch_rows: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.995
    clip: float = 1.0
    evaluations: int = 15
    seconds: float = math.inf
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What became of a run; `best_step` is where the validation loss was lowest."""

    seconds: float
    best_step: int
    validation_loss: float


def fit(network: Network, data: Dataset, settings: Settings, title: str = "  training") -> Outcome:
    """Train a network in place and leave it in eval mode with the best averaged weights, on the CPU."""
    started = time.monotonic()
    torch.manual_seed(settings.seed)
    network.to(settings.device).train()
    run = _Run(network, settings, started)
    batches = _batches(data.train, settings)
    with tqdm(total=settings.steps, desc=title, unit="step", dynamic_ncols=True) as bar:
        while run.progress < 1:
            loss = run.step(*next(batches))
            bar.update()
            if run.evaluation_due:
                run.evaluate(data.validation)
                bar.set_postfix_str(f"loss {loss:.4g}, held out {run.best_loss:.4g} at step {run.best_step}")
    network.load_state_dict(run.best_weights)
    network.to("cpu").eval().requires_grad_(False)
    return Outcome(time.monotonic() - started, run.best_step, run.best_loss)


class _Run:
    """The state of a training run."""

    def __init__(self, network: Network, settings: Settings, started: float) -> None:
        self._network, self._settings, self._started = network, settings, started
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
        self._steps = 0
        self._evaluated = 0
        self.best_loss, self.best_step = math.inf, 0
        self.best_weights: dict[str, Any] = {}

    @property
    def progress(self) -> float:
        elapsed = time.monotonic() - self._started
        return max(self._steps / self._settings.steps, elapsed / self._settings.seconds)

    @property
    def evaluation_due(self) -> bool:
        return self.progress >= (self._evaluated + 1) / self._settings.evaluations or self.progress >= 1

    def step(self, rows: Tensor, labels: Tensor) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * (1 + math.cos(math.pi * min(self.progress, 1))) / 2
        for objective in self._network.objectives(rows, labels):
            loss = objective.loss.mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward(inputs=objective.parameters)  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(objective.parameters, self._settings.clip)
            # Parameters without a gradient stay, and so do their moments.
            self._optimizer.step()
        self._average.update_parameters(self._network)
        self._steps += 1
        return float(loss.detach())

    def evaluate(self, held_out: Part) -> None:
        self._evaluated += 1
        average = self._average.module
        assert isinstance(average, Network)
        average.eval()
        loss = validation_loss(average, held_out, self._settings)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self._steps
            self.best_weights = copy.deepcopy(average.state_dict())


def validation_loss(network: Network, held_out: Part, settings: Settings) -> float:
    """Mean loss over held-out rows, over again when they are few, with the same random numbers every time."""
    rows, labels = _tensors(held_out, settings)
    devices = [] if settings.device == "cpu" else [torch.device(settings.device)]
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(settings.seed)
        losses = [
            network.loss(rows[start : start + _CHUNK_ROWS], labels[start : start + _CHUNK_ROWS])
            for _ in range(max(1, _VALIDATION_ROWS // len(rows)))
            for start in range(0, len(rows), _CHUNK_ROWS)
        ]
    return float(torch.cat(losses).mean())


def _tensors(part: Part, settings: Settings) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.rows).to(settings.device), torch.from_numpy(part.labels).to(settings.device)


def _batches(part: Part, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    rows, labels = _tensors(part, settings)
    size = min(settings.batch_rows, len(part))
    while True:
        order = torch.randperm(len(part)).to(settings.device)
        for start in range(0, len(part) // size * size, size):
            chosen = order[start : start + size]
            yield rows[chosen], labels[chosen]
