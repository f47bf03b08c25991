"""Closed-form denoisers that replace trained networks in tests."""

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


class ExactNetwork(Perceptron):
    """F of an exact denoiser of points, for any label; the divergence is computed by autograd."""

    data_std = 1.0

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        """Return the expected clean points [B, 2] of x [B, 2] under noise of a variance [B, 1]."""
        raise NotImplementedError

    def forward(self, point: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp().unsqueeze(1)
        norm = torch.sqrt(sigma.square() + self.data_std**2)
        x = point * norm
        skipped = x * (self.data_std / norm).square()
        return (self.denoise(x, sigma.square()) - skipped) * norm / sigma / self.data_std

    def forward_with_divergence(self, point: Tensor, c_noise: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        output = self(point, c_noise, label)
        with torch.enable_grad():
            leaf = point.clone().requires_grad_()
            outputs = self(leaf, c_noise, label)
            diagonal = [
                torch.autograd.grad(outputs[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in (0, 1)
            ]
        return output, diagonal[0] + diagonal[1]


class NormalNetwork(ExactNetwork):
    """Exact network for data from one normal distribution."""

    mean: Tensor
    covariance: Tensor

    def __init__(self, mean: Sequence[float], covariance: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("covariance", torch.tensor(covariance))

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        noisy = self.covariance + variance.unsqueeze(2) * torch.eye(2)
        solution: Tensor = torch.linalg.solve(noisy, (x - self.mean).unsqueeze(2)).squeeze(2)
        return self.mean + solution @ self.covariance


class NormalPairNetwork(ExactNetwork):
    """Exact network for an equal mixture of two normal distributions, around CENTER and -CENTER."""

    STD, CENTER = 0.3, (0.6, -0.9)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        center, noisy_variance = torch.tensor(self.CENTER), self.STD**2 + variance
        side = torch.tanh(x @ center / noisy_variance.squeeze(1)).unsqueeze(1)
        return (self.STD**2 * x + variance * side * center) / noisy_variance

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Return the log-density in nats [N] of points [N, 2]."""
        squares = [np.square(x - sign * np.array(self.CENTER)).sum(1) for sign in (1, -1)]
        logs = np.logaddexp(*(-square / (2 * self.STD**2) for square in squares))
        return np.asarray(logs - math.log(4 * math.pi * self.STD**2))

    def sample(self, count: int) -> np.ndarray:
        """Return points float32 [count, 2]."""
        generator = np.random.default_rng(0)
        signs = generator.choice([-1, 1], (count, 1))
        return (signs * self.CENTER + self.STD * generator.standard_normal((count, 2))).astype(np.float32)


class OvershootingNetwork(NormalPairNetwork):
    """The same data, but the denoised point is 20 % too far from the origin."""

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        return 1.2 * super().denoise(x, variance)


def build_interpreter(network: ExactNetwork) -> Interpreter:
    """Return an interpreter of the diffusion programs for points, with this network."""
    rows = np.array([[-1, -1], [1, 1]], np.float32)
    split = loading.Split(rows, np.array([0, 1]))
    data_spec = DataSpec("vector", TensorSpec("point", shape=(2,), doc="the plane"), class_labels=("a", "b"))
    dataset = loading.Dataset("points", data_spec, split, split, split, "")
    denoiser = Denoiser(dataset, PRESET)
    denoiser.network = network
    network.data_std = denoiser.data_std
    return eager_interpreter(data_spec, FAMILY.build_programs(denoiser.eval(), dataset))
