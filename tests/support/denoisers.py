"""Denoisers in closed form, in the place of trained networks."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from export.artifacts.interpreter import Interpreter, eager_interpreter
from export.datasets import loading
from export.families.base import Preset
from export.families.diffusion import FAMILY
from export.families.diffusion.denoiser import Denoiser, Perceptron
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings

PRESET = Preset(width=4, depth=1, training=Settings(steps=1))


class Exact(Perceptron):
    """F of an exact denoiser of points, whatever the label; its divergence is autograd's."""

    spread = 1.0

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        """The expected clean point [B, 2] under noise of a variance [B, 1]."""
        raise NotImplementedError

    def forward(self, point: Tensor, level: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * level).exp().unsqueeze(1)
        norm = torch.sqrt(sigma.square() + self.spread**2)
        x = point * norm
        return (
            (self.denoise(x, sigma.square()) - x * (self.spread / norm).square()) * norm / sigma / self.spread
        )

    def divergence(self, point: Tensor, level: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        estimate = self(point, level, label)
        with torch.enable_grad():
            leaf = point.clone().requires_grad_()
            made = self(leaf, level, label)
            slopes = [torch.autograd.grad(made[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in (0, 1)]
        return estimate, slopes[0] + slopes[1]


class Normal(Exact):
    """Of one normal distribution."""

    mean: Tensor
    covariance: Tensor

    def __init__(self, mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("covariance", torch.tensor(covariance))

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        noisy = self.covariance + variance.unsqueeze(2) * torch.eye(2)
        rest: Tensor = torch.linalg.solve(noisy, (x - self.mean).unsqueeze(2)).squeeze(2)
        return self.mean + rest @ self.covariance


class Pair(Exact):
    """Of two normal distributions of standard deviation STD around CENTRE and its mirror image."""

    STD, CENTRE = 0.3, (0.6, -0.9)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        centre, whole = torch.tensor(self.CENTRE), self.STD**2 + variance
        side = torch.tanh(x @ centre / whole.squeeze(1)).unsqueeze(1)
        return (self.STD**2 * x + variance * side * centre) / whole

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """In nats [N]."""
        squares = [np.square(x - sign * np.array(self.CENTRE)).sum(1) for sign in (1, -1)]
        logs = np.logaddexp(*(-square / (2 * self.STD**2) for square in squares))
        return np.asarray(logs - math.log(4 * math.pi * self.STD**2))

    def sample(self, count: int) -> np.ndarray:
        """Points float32 [count, 2]."""
        chance = np.random.default_rng(0)
        signs = chance.choice([-1, 1], (count, 1))
        return (signs * self.CENTRE + self.STD * chance.standard_normal((count, 2))).astype(np.float32)


class Hasty(Pair):
    """The same, but that it goes too far."""

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        return 1.2 * super().denoise(x, variance)


def interpreter(network: Exact) -> Interpreter:
    """The programs of a diffusion model of points with this network."""
    rows = np.array([[-1, -1], [1, 1]], np.float32)
    part = loading.Split(rows, np.array([0, 1]))
    value = DataSpec("vector", TensorSpec("point", shape=(2,), doc="the plane"), class_labels=("a", "b"))
    dataset = loading.Dataset("toy", value, part, part, part, "")
    denoiser = Denoiser(dataset, PRESET)
    denoiser.network = network
    network.spread = denoiser.data_std
    return eager_interpreter(value, FAMILY.build_programs(denoiser.eval(), dataset))
