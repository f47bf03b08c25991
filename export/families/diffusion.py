"""Class-conditional diffusion model for images of integers.

Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models"
(EDM, 2022): a network denoises rows at every noise level sigma, and a sampler walks
from sigma 80 down to 0. One graph is one network evaluation of any sampler,

    denoised = D(x, sigma),   x' = a x + b denoised + c memory + d noise,

with coefficients computed per row from step_index, num_steps and the parameters,
so that rows of different ages, lengths and samplers share a call:

- ddim: Song et al., "Denoising Diffusion Implicit Models" (2020); eta 1 is ancestral;
- heun: Karras et al., Algorithm 1 without churn;
- dpmpp2m: Lu et al., "DPM-Solver++" (2022), multistep of second order.

Pixels are scaled to -1..1 inside; the row's memory is what its sampler keeps. A
row without a label draws its class by the classes' frequency in the training rows:
that samples the marginal better than a class "any" trained by dropping labels,
which a small network learns last.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export import replay
from export.data import Dataset
from export.families.base import Preset
from export.figure import Panel
from export.golden import Example
from export.measure import SETS, Judge, play, sampler
from export.program import Input, Noise, Parameter, Program, Steps, TensorSpec, Value
from export.replay import Player
from export.training import Network, Settings
from samovar.v1 import manifest_pb2

SAMPLERS = ("ddim", "heun", "dpmpp2m")
DDIM, HEUN, DPMPP2M = range(3)
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
LOG_SIGMA_MEAN, LOG_SIGMA_STD = -1.2, 1.2
FREQUENCIES = 16
DEFAULT_STEPS, MAX_STEPS = 20, 200


def noise_level(index: Tensor, levels: Tensor) -> Tensor:
    """sigma [B] of a schedule's level (Karras et al., Eq. 5), 0 behind the last; arguments float32 [B]."""
    fraction = index / (levels - 1).clamp(min=1)
    first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    level = (first + fraction * (last - first)).pow(RHO)
    return torch.where(index < levels, level, torch.zeros_like(level))


@dataclass(frozen=True)
class Tick:
    """One network evaluation of a sampler, as coefficients [B].

    The network is evaluated at `sigma`; then x' = x_x x + x_d D + x_m memory + x_z noise
    and memory' = m_x x + m_d D.
    """

    sigma: Tensor
    x_x: Tensor
    x_d: Tensor
    x_m: Tensor
    x_z: Tensor
    m_x: Tensor
    m_d: Tensor


def tick(step_index: Tensor, num_steps: Tensor, sampler: Tensor, eta: Tensor) -> Tick:
    """The coefficients of each row's next evaluation; int64 [B] but for eta, float32 [B]."""
    heun, multistep = sampler == HEUN, sampler == DPMPP2M
    # Heun's method evaluates twice a level but once at the last. An even number leaves one over,
    # which makes the first level a plain Euler step.
    even = heun & (num_steps % 2 == 0)
    half_steps = step_index + even.long()
    corrects = heun & (half_steps % 2 == 1) & (step_index > 0)
    index = torch.where(heun, half_steps // 2, step_index).float()
    levels = torch.where(heun, num_steps // 2 + 1, num_steps).float()
    before, now, after = (noise_level(index + offset, levels) for offset in (-1, 0, 1))
    slope = (after - now) / 2
    predicts = heun & ~corrects

    fresh = torch.where(sampler == DDIM, eta, torch.zeros_like(eta)) * after * _sine(after, now)
    kept = torch.sqrt(after.square() - fresh.square()) / now
    bent = torch.where(
        multistep & (step_index > 0) & (after > 0), _bend(before, now, after), torch.zeros_like(now)
    )
    x_x = torch.where(corrects, slope / after.clamp(min=SIGMA_MIN), kept)
    x_d = torch.where(corrects, -x_x, (1 - kept) * (1 + bent))
    return Tick(
        sigma=torch.where(corrects, after, now),
        x_x=x_x,
        x_d=x_d,
        x_m=torch.where(corrects, torch.ones_like(now), -(1 - kept) * bent),
        x_z=fresh,
        m_x=torch.where(predicts, 1 + slope / now, torch.zeros_like(now)),
        m_d=torch.where(predicts, -slope / now, torch.ones_like(now)),
    )


def _sine(after: Tensor, now: Tensor) -> Tensor:
    return torch.sqrt((1 - (after / now).square()).clamp(min=0))


def _bend(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """1 / (2 r) of DPM-Solver++(2M), with r the ratio of the last log-step to this one."""
    return torch.log(now / after.clamp(min=SIGMA_MIN / 2)) / (2 * torch.log(before / now))


class Block(nn.Module):
    """Residual block with group normalisation, modulated by the noise level and the label."""

    def __init__(self, inputs: int, outputs: int, conditions: int, dropout: float) -> None:
        super().__init__()
        self.entry = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.modulation = nn.Linear(conditions, 2 * outputs)
        self.norm = _norm(outputs)
        self.exit = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        nn.init.zeros_(_last(self.exit))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, 1)
        change: Tensor = self.exit(self.norm(self.entry(features)) * (1 + scale) + shift)
        kept: Tensor = self.skip(features)
        return kept + change


def _last(layers: nn.Sequential) -> Tensor:
    """The weight of the last layer; zero, it makes a block begin as the identity."""
    weight = layers[-1].weight
    assert isinstance(weight, Tensor)
    return weight


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, channels), channels)


class UNet(nn.Module):
    """Ronneberger et al. (2015): halves the image while it can, `depth` blocks a size, and back."""

    frequencies: Tensor

    def __init__(self, channels: int, height: int, preset: Preset, classes: int) -> None:
        super().__init__()
        conditions = 4 * preset.width
        self.register_buffer("frequencies", torch.logspace(-1, 1.5, FREQUENCIES))
        self.level = nn.Linear(2 * FREQUENCIES, conditions)
        self.label = nn.Embedding(classes, conditions)
        self.entry = nn.Conv2d(channels, preset.width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        widths = _widths(preset.width, height)
        for wide, deep in pairwise(widths):
            self.down.append(_blocks(wide, wide, conditions, preset))
            self.down.append(nn.Conv2d(wide, deep, 3, stride=2, padding=1))
            self.up.insert(0, _blocks(2 * wide, wide, conditions, preset))
            self.up.insert(0, nn.Conv2d(deep, wide, 3, padding=1))
        self.middle = _blocks(widths[-1], widths[-1], conditions, preset)
        self.exit = nn.Sequential(
            _norm(preset.width), nn.SiLU(), nn.Conv2d(preset.width, channels, 3, padding=1)
        )
        nn.init.zeros_(_last(self.exit))

    def forward(self, image: Tensor, level: Tensor, label: Tensor) -> Tensor:
        angles = level.unsqueeze(1) * self.frequencies
        condition = functional.silu(
            self.level(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(label)
        )
        features, skips = self.entry(image), []
        for blocks, halve in zip(self.down[0::2], self.down[1::2], strict=True):
            features = _through(blocks, features, condition)
            skips.append(features)
            features = halve(features)
        features = _through(self.middle, features, condition)
        for double, blocks in zip(self.up[0::2], self.up[1::2], strict=True):
            features = double(functional.interpolate(features, scale_factor=2.0, mode="nearest"))
            features = _through(blocks, torch.cat([features, skips.pop()], 1), condition)
        estimate: Tensor = self.exit(features)
        return estimate


def _widths(width: int, height: int) -> list[int]:
    widths = [width]
    while height % 2 == 0 and height > 4:
        widths.append(2 * width)
        height //= 2
    return widths


def _blocks(inputs: int, outputs: int, conditions: int, preset: Preset) -> nn.ModuleList:
    sizes = [inputs] + [outputs] * preset.depth
    return nn.ModuleList(Block(a, b, conditions, preset.dropout) for a, b in pairwise(sizes))


def _through(blocks: nn.Module, features: Tensor, condition: Tensor) -> Tensor:
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks:
        features = block(features, condition)
    return features


class Denoiser(Network):
    """D(x, sigma, label): the expected clean row, with EDM's preconditioning."""

    class_shares: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.value.tensor.shape, data.value.levels
        self.data_std = float(data.train.rows.std()) * 2 / (self.levels - 1)
        counts = torch.tensor(data.train.labels).bincount(minlength=len(data.value.class_labels))
        self.register_buffer("class_shares", counts / counts.sum())
        self.unet = UNet(_channels(self.shape), self.shape[0], preset, len(counts))

    def scale(self, image: Tensor) -> Tensor:
        """Integers 0..levels-1 as numbers -1..1."""
        return image.to(torch.float32) * (2 / (self.levels - 1)) - 1

    def quantise(self, scaled: Tensor) -> Tensor:
        """Numbers -1..1 as the nearest integers, uint8."""
        return ((scaled + 1) * ((self.levels - 1) / 2)).round().clamp(0, self.levels - 1).to(torch.uint8)

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """Denoised rows [B, *shape] of x [B, *shape] at sigma [B] with int64 labels [B]."""
        level, spread = _per_row(sigma, x), self.data_std
        norm = torch.sqrt(level.square() + spread**2)
        estimate = self._estimate(x / norm, sigma.log() / 4, label)
        return x * (spread / norm).square() + estimate * (level * spread / norm)

    def _estimate(self, x: Tensor, level: Tensor, label: Tensor) -> Tensor:
        grey = len(self.shape) == 2
        planes: Tensor = self.unet(x.unsqueeze(1) if grey else x.permute(0, 3, 1, 2), level, label)
        return planes.squeeze(1) if grey else planes.permute(0, 2, 3, 1)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Weighted squared error at a random noise level (Karras et al., Table 1) [B]."""
        clean = self.scale(rows)
        sigma = (LOG_SIGMA_MEAN + LOG_SIGMA_STD * torch.randn(len(rows), device=rows.device)).exp()
        denoised = self(clean + _per_row(sigma, clean) * torch.randn_like(clean), sigma, labels)
        weight = (sigma.square() + self.data_std**2) / (sigma * self.data_std).square()
        error: Tensor = (denoised - clean).square().flatten(1).mean(1)
        return weight * error


def _channels(shape: tuple[int, ...]) -> int:
    return 1 if len(shape) == 2 else shape[2]


def _per_row(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.reshape(-1, *(1 for _ in like.shape[1:]))


class Init(nn.Module):
    """Pure noise of standard deviation SIGMA_MAX, and a class where none was asked for."""

    reached: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.classes = len(denoiser.class_shares)
        self.register_buffer("reached", denoiser.class_shares.cumsum(0)[:-1])

    def forward(self, initial_noise: Tensor, label: Tensor, label_noise: Tensor) -> tuple[Tensor, ...]:
        drawn = (label_noise.unsqueeze(1) >= self.reached).long().sum(1)
        drawn_label = torch.where(label < self.classes, label, drawn)
        nothing = torch.zeros_like(initial_noise)
        return SIGMA_MAX * initial_noise, nothing, nothing.clone(), drawn_label


class Step(nn.Module):
    """One evaluation of the network and the linear update of the row's sampler."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        drawn_label: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(step_index, num_steps, sampler, eta)
        denoised = self.denoiser(x, now.sigma, drawn_label)
        x_x, x_d, x_m, x_z, m_x, m_d = (
            _per_row(numbers, x) for numbers in (now.x_x, now.x_d, now.x_m, now.x_z, now.m_x, now.m_d)
        )
        moved = x_x * x + x_d * denoised + x_m * memory + x_z * step_noise
        return moved, m_x * x + m_d * denoised, denoised, drawn_label


class Readout(nn.Module):
    """The last denoised estimate as integers: the sample at the end, a preview before."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.quantise = denoiser.quantise

    def forward(self, denoised: Tensor) -> Tensor:
        return self.quantise(denoised)


class Family:
    """The diffusion model as the exporter sees it."""

    name = "diffusion"
    description = (
        "Class-conditional diffusion model (EDM, Karras et al. 2022) with DDIM, Heun and DPM-Solver++(2M)."
    )
    operations = ("sample",)
    refusals: Mapping[str, str] = {}
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=8, depth=1, training=Settings(steps=1), judge=Settings(steps=1), measured_rows=20
        ),
        "starter": Preset(width=32, depth=1, training=Settings(steps=1000, batch_rows=128)),
        "full": Preset(
            width=96,
            depth=2,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=256, learning_rate=5e-4),
        ),
    }

    def network(self, data: Dataset, preset: Preset) -> Denoiser:
        """An untrained denoiser, preconditioned by the spread of the training rows."""
        return Denoiser(data, preset)

    def programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, by three samplers."""
        assert isinstance(network, Denoiser)
        return (_sample(network, data.value),)

    def examples(self, data: Dataset) -> tuple[Example, ...]:
        """The default request, and one for each other sampler."""
        labels = torch.arange(3).numpy()
        return (
            Example("sample", seed=1),
            Example(
                "sample",
                seed=2,
                first_row=5,
                parameters={"sampler": HEUN, "steps": 9},
                inputs={"label": labels},
            ),
            Example(
                "sample",
                seed=3,
                parameters={"sampler": DDIM, "steps": 12, "eta": 1},
                inputs={"label": labels},
            ),
        )

    def quality(self, player: Player, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
        """How samples compare with test rows, and whether they show the label that they were asked for."""
        judge = Judge.train(data, preset.judge)
        labels = np.arange(preset.measured_rows) % len(data.value.class_labels)
        labelled = play(player, "sample", _labelled(player, labels), "labelled samples")["image"]
        return [
            *judge.similarity(sampler(player), preset.measured_rows),
            judge.agreement(labelled, labels),
        ]

    def panels(self, player: Player, data: Dataset) -> list[Panel]:
        """Test rows and samples, a line for each class."""
        classes = min(10, len(data.value.class_labels))
        labels = np.repeat(np.arange(classes), 10)
        order = np.concatenate([np.flatnonzero(data.test.labels == label)[:10] for label in range(classes)])
        return [
            Panel("test images", data.test.rows[order]),
            Panel(
                f"samples, {DEFAULT_STEPS} steps", player.play("sample", _labelled(player, labels))["image"]
            ),
        ]


def _labelled(player: Player, labels: NDArray[np.int64]) -> replay.Rows:
    return replay.request(player.program("sample"), SETS, range(len(labels)), inputs={"label": labels})


def _sample(denoiser: Denoiser, value: Value) -> Program:
    image, shape = value.tensor, value.tensor.shape
    return Program(
        operation="sample",
        init=Init(denoiser),
        step=Step(denoiser),
        readout=Readout(denoiser),
        outputs=(image,),
        doc="Denoise pure noise step by step; one step is one evaluation of the network.",
        state=(
            TensorSpec("x", shape=shape, doc="the noisy image, scaled to -1..1"),
            TensorSpec("memory", shape=shape, doc="what the sampler keeps from its last step"),
            TensorSpec("denoised", shape=shape, doc="the expected clean image, scaled to -1..1"),
            TensorSpec("drawn_label", "int64", doc="index of the class, drawn where none was asked for"),
        ),
        steps=Steps(parameter="steps"),
        parameters=_sampler_parameters(),
        inputs=(_label(value),),
        noise=(
            Noise("initial_noise", "normal", shape, 0, "where the walk begins"),
            Noise(
                "step_noise", "normal", shape, 1, "fresh noise of each step, used by ddim with eta above 0"
            ),
            Noise("label_noise", "uniform", (), 2, "draws the class where none was asked for"),
        ),
        previewable=True,
    )


def _sampler_parameters() -> tuple[Parameter, ...]:
    return (
        Parameter(
            "steps", "integer", DEFAULT_STEPS, 1, MAX_STEPS,
            doc="network evaluations; heun: two a level, one at the last, an even number begins by Euler",
        ),
        Parameter.choice("sampler", SAMPLERS, "how to walk; dpmpp2m needs the fewest steps", "dpmpp2m"),
        Parameter("eta", "float", 0, 0, 1, doc="share of fresh noise in steps of ddim: 0 none, 1 ancestral"),
    )  # fmt: skip


def _label(value: Value) -> Input:
    classes = len(value.class_labels)
    doc = f"index of the class label, or {classes} to draw it by the classes' frequency"
    return Input(TensorSpec("label", "int64", (), 0, classes, doc), optional=True, default=classes)


FAMILY = Family()
