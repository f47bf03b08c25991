"""Energy-based model, for points and for images of integers.

A base density q is tilted by a network f (exponential tilting):

    p(x) = exp(-E(x)) / Z,   E(x) = -log q(x) + f(x).

f is learned by noise-contrastive estimation (Gutmann & Hyvarinen, "Noise-contrastive
estimation of unnormalized statistical models", 2012) with q as the noise: -f(x) - log(NOISE_SHARE)
are the log-odds that x is data, so that Z comes out near 1. What it is, is estimated all the same:
by quadrature in two dimensions, by annealed importance sampling on the path from q to p in more.

Points have the wide normal distribution as base. Images are scaled to -1..1, and their density is
that of images with normal noise of standard deviation SMOOTHING on every pixel: a smooth one,
which chains can walk on. From there the expected clean image is one step down the gradient,
x - SMOOTHING^2 grad E(x) (Saremi & Hyvarinen, "Neural empirical Bayes", 2019: walk and jump). The
base is a mixture of one normal distribution for each class. No score is of the integers themselves.

The gradient of E is written out, layer by layer, so that it is part of the graphs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export import langevin, replay
from export.data import Dataset
from export.families.base import Preset
from export.figure import Drawing, Heatmap, Panel, Scatter
from export.golden import Example
from export.langevin import Landscape, Path, Place
from export.measure import SETS, Judge, negative_log_density, play, two_sample_test
from export.mixture import Mixture
from export.program import Input, Noise, Parameter, Program, Score, Steps, TensorSpec, Value
from export.replay import Player
from export.training import Network, Settings
from samovar.v1 import manifest_pb2

NOISE_SHARE = 2
POINT_NOISE = 1.5
SMOOTHING = 0.1
# Of the base beyond the rows it is fitted to: the network needs noise on every side of the data.
WIDENING = 0.1
RANK = 48
FEATURES = 128
STARTS = ("noise", "given")
GIVEN = STARTS.index("given")
BLURS = ("none", "draw")
DRAW = BLURS.index("draw")
# Of chains: on images in shares of SMOOTHING^2, which is the square of their finest structure.
STEP_SHARE, POINT_STEP_SIZE = 0.4, 0.005
IMAGE_STEPS, POINT_STEPS, MAX_STEPS = 300, 1000, 10_000
TEMPERATURES = 300
# Of chains that are measured and drawn, and the ages at which they are drawn.
CHAINS, PICTURED = 1000, 100
PROGRESS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300)
# The picture of a density: -LIMIT..LIMIT on both axes, in so many cells each.
LIMIT, CELLS = 2.5, 200
# The square over which a density of points is integrated, -LIMIT..LIMIT, and its cells on each side.
GRID_LIMIT, GRID_CELLS = 6.0, 400


class Layer(nn.Module):
    """A differentiable function that knows its own chain rule."""

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by the input x, from the gradient by the output."""
        raise NotImplementedError


class Dense(Layer):
    """A linear layer [B, inputs] -> [B, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient @ self.linear.weight


class Convolution(Layer):
    """A 3x3 convolution of planes of a known size, padded by one."""

    def __init__(self, inputs: int, outputs: int, size: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        # What a stride leaves over at the far edges, without which the planes would come back smaller.
        self.left_over = tuple((length - 1) % stride for length in size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(x)
        return y

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        forward = self.convolution
        return functional.conv_transpose2d(
            gradient, forward.weight, None, forward.stride, 1, output_padding=self.left_over
        )


class Swish(Layer):
    """SiLU, x sigmoid(x) (Elfwing et al. 2018): smooth, as a chain's ground has to be."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        share = x.sigmoid()
        return gradient * share * (1 + x * (1 - share))


class Planes(Layer):
    """Pixels [B, D] as planes [B, channels, height, width]."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (*shape, 1)[:3]

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape).permute(0, 3, 1, 2)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.permute(0, 2, 3, 1).flatten(1)


class Flat(Layer):
    """Planes [B, channels, height, width] as features [B, channels * height * width]."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def pull(self, x: Tensor, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, *self.shape)


class Tilt(nn.Module):
    """The network f from rows [B, D] to numbers [B], at first 0."""

    def __init__(self, layers: Sequence[Layer], features: int) -> None:
        super().__init__()
        last = Dense(features, 1)
        nn.init.zeros_(last.linear.weight)
        nn.init.zeros_(last.linear.bias)
        self.layers = nn.ModuleList([*layers, last])

    @classmethod
    def of_points(cls, dimensions: int, preset: Preset) -> "Tilt":
        """A perceptron of `depth` hidden layers."""
        widths = [dimensions] + [preset.width] * preset.depth
        layers = [layer for a, b in pairwise(widths) for layer in (Dense(a, b), Swish())]
        return cls(layers, preset.width)

    @classmethod
    def of_images(cls, shape: tuple[int, ...], preset: Preset) -> "Tilt":
        """Convolutions that halve the image `depth` times and double the planes, and a hidden layer."""
        height, width, channels = (*shape, 1)[:3]
        layers: list[Layer] = [
            Planes(shape),
            Convolution(channels, preset.width, (height, width), 1),
            Swish(),
        ]
        planes = preset.width
        for _ in range(preset.depth):
            layers += [Convolution(planes, 2 * planes, (height, width), 2), Swish()]
            height, width, planes = (height + 1) // 2, (width + 1) // 2, 2 * planes
        layers += [Flat((planes, height, width)), Dense(planes * height * width, FEATURES), Swish()]
        return cls(layers, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) [B] and its gradient [B, D], by the chain rule written out."""
        passed: list[tuple[Layer, Tensor]] = []
        for layer in self.layers:
            assert isinstance(layer, Layer)
            passed.append((layer, x))
            x = layer(x)
        gradient = torch.ones_like(x)
        for layer, given in reversed(passed):
            gradient = layer.pull(given, gradient)
        return x.squeeze(1), gradient


class EnergyModel(Network):
    """E over coordinates [B, D]: the values of points, and pixels scaled to -1..1 with noise on them."""

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.value.tensor.shape, data.value.levels
        self.dimensions = math.prod(self.shape)
        self.smoothing = SMOOTHING if self.levels else 0.0
        self.chains = preset.measured_rows
        self.base = self._base(data)
        self.tilt = (
            Tilt.of_images(self.shape, preset) if self.levels else Tilt.of_points(self.dimensions, preset)
        )

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """E(x) [B] in nats and its gradient [B, D]."""
        (base, base_gradient), (tilt, tilt_gradient) = self.base.energy(x), self.tilt.energy(x)
        return base + tilt, base_gradient + tilt_gradient

    def coordinates(self, rows: Tensor) -> Tensor:
        """Rows [B, *shape] as coordinates [B, D], without noise."""
        flat = rows.flatten(1).to(torch.float32)
        return flat * (2 / (self.levels - 1)) - 1 if self.levels else flat

    def value(self, x: Tensor) -> Tensor:
        """Coordinates [B, D] as values [B, *shape]: points as they are, pixels as the nearest integers."""
        if self.levels:
            top = self.levels - 1
            x = ((x + 1) * (top / 2)).round().clamp(0, top).to(torch.uint8)
        return x.reshape(-1, *self.shape)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """How badly f tells each row from the noise drawn for it, in nats [B]."""
        clean = self.coordinates(rows)
        x = clean + self.smoothing * torch.randn_like(clean)
        noise = self.base.sample(NOISE_SHARE * len(x))
        return contrastive_loss(self.tilt(x), self.tilt(noise).reshape(NOISE_SHARE, -1))

    def _base(self, data: Dataset) -> Mixture:
        if not self.levels:
            return Mixture.wide(self.dimensions, POINT_NOISE)
        rows = self.coordinates(torch.from_numpy(data.train.rows))
        return Mixture.of_classes(
            rows, torch.from_numpy(data.train.labels), RANK, math.hypot(self.smoothing, WIDENING)
        )


def contrastive_loss(on_data: Tensor, on_noise: Tensor) -> Tensor:
    """Cross-entropy of telling data from noise [B], by f on data [B] and on its noise [NOISE_SHARE, B]."""
    log_share = math.log(NOISE_SHARE)
    return functional.softplus(on_data + log_share) + functional.softplus(-on_noise - log_share).sum(0)


@dataclass(frozen=True)
class Normaliser:
    """An estimate of log Z in nats with its standard error, and one that errs to the other side."""

    log_z: float
    standard_error: float
    reverse: float


def normaliser(model: EnergyModel) -> Normaliser:
    """log Z of a trained model: by quadrature in two dimensions, by annealed importance sampling in more."""
    if model.dimensions == 2:
        return _quadrature(model)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _annealed(model)


@torch.no_grad()
def _quadrature(model: EnergyModel) -> Normaliser:
    """Midpoint sums over a square; their error is taken from a grid of half as many lines."""
    fine, coarse = (_log_sum(model, cells) for cells in (GRID_CELLS, GRID_CELLS // 2))
    return Normaliser(fine, abs(fine - coarse), fine)


def _log_sum(model: EnergyModel, cells: int) -> float:
    axis = ((torch.arange(cells) + 0.5) / cells * 2 - 1) * GRID_LIMIT
    lines = torch.cartesian_prod(axis, axis).reshape(cells, cells, 2)
    energies = torch.cat([model.energy(line)[0] for line in lines]).double()
    return float((-energies).logsumexp(0) + 2 * math.log(2 * GRID_LIMIT / cells))


def _annealed(model: EnergyModel) -> Normaliser:
    """Chains from the base to the model, and, from where they would be likely to end, back again."""
    path = Path(model.base, model.tilt)
    times, eta = torch.linspace(0, 1, TEMPERATURES + 1), default_step_size(model)
    ends, log_weights = path.walk(model.base.sample(model.chains), times, eta, "  annealing: forwards")
    log_z, standard_error = langevin.log_mean(log_weights)
    shares = (log_weights - log_weights.max()).exp()
    likely = ends[torch.multinomial(shares, model.chains, replacement=True)]
    settled, _ = path.walk(likely, torch.ones(TEMPERATURES + 1), eta, "  annealing: settling")
    _, back = path.walk(settled, times.flip(0), eta, "  annealing: backwards")
    return Normaliser(log_z, standard_error, -langevin.log_mean(back)[0])


def default_step_size(model: EnergyModel) -> float:
    """Of a chain: of the order of the square of the finest structure."""
    return STEP_SHARE * model.smoothing**2 if model.smoothing else POINT_STEP_SIZE


class _Part(nn.Module):
    """A module of a program: a function of the trained model."""

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model


class _Start(_Part):
    """Where a chain begins: at a draw of the base or at the given row, always at its known coordinates."""

    def begin(
        self, given: Tensor, known: Tensor, start: Tensor, noises: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        component, factor, rest = noises
        clean, fixed = self.model.coordinates(given), known.flatten(1) == 1
        from_given = fixed | (start == GIVEN).unsqueeze(1)
        x = torch.where(
            from_given, clean + self.model.smoothing * rest, self.model.base.draw(component, factor, rest)
        )
        energy, gradient = self.model.energy(x)
        return x, energy, _free(gradient, known), torch.zeros_like(energy), clean


class StartPoint(_Start):
    """Noise, or a point -> a chain's first state."""

    def forward(
        self,
        point: Tensor,
        known: Tensor,
        start: Tensor,
        component_noise: Tensor,
        factor_noise: Tensor,
        start_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.begin(point, known, start, (component_noise, factor_noise, start_noise))


class StartImage(_Start):
    """Noise, or an image -> a chain's first state."""

    def forward(
        self,
        image: Tensor,
        known: Tensor,
        start: Tensor,
        component_noise: Tensor,
        factor_noise: Tensor,
        start_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.begin(image, known, start, (component_noise, factor_noise, start_noise))


def _free(vector: Tensor, known: Tensor) -> Tensor:
    """A vector [B, D] without its part along known coordinates."""
    return torch.where(known.flatten(1) == 1, torch.zeros_like(vector), vector)


class AdjustedStep(nn.Module):
    """A MALA step, within the coordinates that are not known."""

    def __init__(self, landscape: Landscape) -> None:
        super().__init__()
        self.landscape = landscape

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        energy: Tensor,
        gradient: Tensor,
        accepted: Tensor,
        clean: Tensor,
        known: Tensor,
        step_size: Tensor,
        step_noise: Tensor,
        acceptance_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        proposed = langevin.propose(x, gradient, step_size, _free(step_noise, known))
        there = _place(self.landscape, proposed, known)
        place, moved = langevin.adjust(Place(x, energy, gradient), there, step_size, acceptance_noise)
        return *place, accepted + moved.to(accepted.dtype), clean


class UnadjustedStep(nn.Module):
    """A Langevin step that is always taken, within the coordinates that are not known."""

    def __init__(self, landscape: Landscape) -> None:
        super().__init__()
        self.landscape = landscape

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        gradient: Tensor,
        accepted: Tensor,
        clean: Tensor,
        known: Tensor,
        step_size: Tensor,
        noise_scale: Tensor,
        step_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        noise = noise_scale.unsqueeze(1) * _free(step_noise, known)
        moved = langevin.propose(x, gradient, step_size, noise)
        return *_place(self.landscape, moved, known), accepted + 1, clean


def _place(landscape: Landscape, x: Tensor, known: Tensor) -> Place:
    energy, gradient = landscape.energy(x)
    return Place(x, energy, _free(gradient, known))


class UnadjustedReadout(_Part):
    """A chain's state -> its value and energy."""

    def forward(
        self, x: Tensor, energy: Tensor, gradient: Tensor, clean: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        expected = x - self.model.smoothing**2 * gradient
        return self.model.value(torch.where(known.flatten(1) == 1, clean, expected)), energy


class AdjustedReadout(UnadjustedReadout):
    """A chain's state -> its value and energy, and the share of proposals that it accepted."""

    def forward(  # type: ignore[override]  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        energy: Tensor,
        gradient: Tensor,
        clean: Tensor,
        known: Tensor,
        accepted: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, ...]:
        value, reached = super().forward(x, energy, gradient, clean, known)
        return value, reached, accepted / step_index.clamp(min=1)


class _Energy(_Part):
    """A row -> its energy, and the length of the energy's gradient."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = self.model.energy(self.model.coordinates(rows))
        return energy, langevin.total(gradient.square()).sqrt()


class EnergyOfPoint(_Energy):
    """point -> energy, gradient norm."""

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(point)


class EnergyOfImage(_Energy):
    """image -> energy, gradient norm."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(image)


class ScorePoint(_Part):
    """point -> -E - log Z, and the standard error of log Z."""

    def __init__(self, model: EnergyModel, known: Normaliser) -> None:
        super().__init__(model)
        self.known = known

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        energy, _ = self.model.energy(point)
        return -energy - self.known.log_z, torch.zeros_like(energy) + self.known.standard_error


class ScoreImage(_Part):
    """image, or a draw around it -> -E - log Z, its standard error, and what the way back makes of it."""

    def __init__(self, model: EnergyModel, known: Normaliser) -> None:
        super().__init__(model)
        self.known = known

    def forward(self, image: Tensor, blur: Tensor, blur_noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        drawn = self.model.smoothing * (blur == DRAW).to(blur_noise.dtype).unsqueeze(1) * blur_noise
        energy, _ = self.model.energy(self.model.coordinates(image) + drawn)
        error = torch.zeros_like(energy) + self.known.standard_error
        return -energy - self.known.log_z, error, -energy - self.known.reverse


class Family:
    """The energy-based model as the exporter sees it."""

    name = "ebm"
    description = (
        "Energy-based model: a base density tilted by a network, learned by noise-contrastive estimation "
        "(Gutmann & Hyvarinen 2012)."
    )
    operations: tuple[str, ...] = ("sample", "sample:langevin", "energy", "score")
    refusals: Mapping[str, str] = {
        "encode": "it has no latents; energy says how likely a row is",
        "decode": "it has no latents; sample walks from noise to a row",
        "reconstruct": "it has no latents to go through; sample with start=given walks on from a row",
        "classify": "it has learned the rows of all classes together",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), judge=Settings(steps=1), measured_rows=20
        ),
        "starter": Preset(
            width=32,
            depth=2,
            training=Settings(steps=3000, weight_decay=0.1),
            kinds={
                "vector": Preset(
                    width=128,
                    depth=3,
                    training=Settings(steps=10_000, batch_rows=256, weight_decay=0, ema_decay=0.999),
                    measured_rows=10_000,
                )
            },
        ),
        "medium": Preset(
            width=24,
            depth=3,
            training=Settings(steps=6000, seconds=900, learning_rate=1e-3),
        ),
        "full": Preset(
            width=64,
            depth=3,
            training=Settings(steps=40_000, batch_rows=128, learning_rate=1e-3, ema_decay=0.999),
            measured_rows=1000,
            kinds={
                "vector": Preset(
                    width=256,
                    depth=3,
                    training=Settings(steps=40_000, batch_rows=512, weight_decay=0, ema_decay=0.999),
                    measured_rows=10_000,
                )
            },
        ),
    }

    def network(self, data: Dataset, preset: Preset) -> EnergyModel:
        """An untrained model, beginning as its base."""
        return EnergyModel(data, preset)

    def programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample by MALA and by unadjusted Langevin steps, energy and score; log Z is estimated here."""
        assert isinstance(network, EnergyModel)
        value, points = data.value, data.value.kind == "vector"
        start = StartPoint(network) if points else StartImage(network)
        return (
            _sample(network, value, start),
            _sample_unadjusted(network, value, start),
            _energy(network, value),
            _score_point(network, value) if points else _score_image(network, value),
        )

    def examples(self, data: Dataset) -> tuple[Example, ...]:
        """Chains from noise and from rows, free and with known coordinates; energies and scores of rows."""
        name, rows = data.value.tensor.name, data.test.rows[:3]
        given, known = {name: rows}, {name: rows, "known": first_half(rows)}
        start, few = {"start": GIVEN}, {"steps": 12}
        drawn = (Example("score", seed=6, parameters={"blur": DRAW}, inputs=given),)
        return (
            Example("sample", seed=1, parameters=few),
            Example("sample", seed=2, first_row=5, parameters={**few, **start}, inputs=given),
            Example("sample", seed=3, parameters=few, inputs=known),
            Example("sample:langevin", seed=4, parameters=few),
            Example("sample:langevin", seed=5, parameters={**few, **start, "noise_scale": 0.5}, inputs=known),
            Example("energy", inputs=given),
            Example("score", inputs=given),
            *(drawn if data.value.kind == "image" else ()),
        )

    def quality(self, player: Player, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
        """The density of test rows, the estimates of log Z, and how samples compare with test rows."""
        rows = data.test.rows[: preset.measured_rows]
        if data.value.kind == "vector":
            scores = _scores(player, rows)
            doc = f"Estimate, with Z by quadrature. In {data.value.tensor.doc}."
            return [
                negative_log_density(scores["log_density"], doc),
                _log_normaliser(player, rows, scores, "log_density", "log Z"),
                two_sample_test(data, _sampler(player), min(CHAINS, preset.measured_rows)),
                _acceptance(player),
            ]
        scores = _scores(player, rows, {"blur": DRAW})
        doc = f"Estimate, with Z by annealed importance sampling. Of {player.program('score').score.space}."
        still = _scores(player, rows)
        return [
            negative_log_density(scores["log_density"], doc),
            _log_normaliser(player, rows, still, "log_density", "log Z, forwards"),
            _log_normaliser(player, rows, still, "log_density_reverse", "log Z, backwards"),
            *Judge.train(data, preset.judge).similarity(_sampler(player), preset.measured_rows),
            _acceptance(player),
        ]

    def panels(self, player: Player, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples, with the density of points, or the progress of chains and inpainting."""
        if data.value.kind == "vector":
            return [
                Scatter("test points", data.test.rows[:CHAINS], LIMIT),
                Scatter("samples", _chains(player, CHAINS)["point"], LIMIT),
                Heatmap("density", _density(player), LIMIT),
            ]
        images = data.test.rows[:PICTURED]
        halves = {"image": images, "known": first_half(images)}
        progress = np.stack([_chains(player, 10, {"steps": steps})["image"] for steps in PROGRESS], 1)
        return [
            Panel("test images", images),
            Panel("samples", _chains(player, PICTURED)["image"]),
            Panel(f"chains after {', '.join(map(str, PROGRESS))} steps", np.concatenate(list(progress))),
            Panel(
                "upper halves of the test images, inpainted", _chains(player, PICTURED, {}, halves)["image"]
            ),
        ]


def first_half(rows: NDArray[np.generic]) -> NDArray[np.uint8]:
    """A mask, uint8 like rows [N, length, ...], that is 1 in the first half: of images, the upper one."""
    known = np.zeros(rows.shape, np.uint8)
    known[:, : rows.shape[1] // 2] = 1
    return known


def _chains(
    player: Player,
    count: int,
    parameters: Mapping[str, float] | None = None,
    inputs: Mapping[str, NDArray[np.generic]] | None = None,
    seed: int = SETS,
) -> replay.Tensors:
    rows = replay.request(player.program("sample"), seed, range(count), parameters, inputs)
    return player.play("sample", rows)


def _sampler(player: Player) -> Callable[[int, int], NDArray[np.generic]]:
    """Sets of samples as in `measure.sampler`, but all chains of a set in one batch: they are long."""

    def draw(count: int, number: int) -> NDArray[np.generic]:
        return _chains(player, count, seed=number)[player.manifest.value.tensor.name]

    return draw


def _scores(
    player: Player, rows: NDArray[np.generic], parameters: Mapping[str, float] | None = None
) -> replay.Tensors:
    given = {player.manifest.value.tensor.name: rows}
    asked = replay.request(player.program("score"), 0, range(len(rows)), parameters, given)
    return play(player, "score", asked, "scores of test rows")


def _log_normaliser(
    player: Player, rows: NDArray[np.generic], scores: replay.Tensors, output: str, name: str
) -> manifest_pb2.Quality:
    given = {player.manifest.value.tensor.name: rows[:1]}
    asked = replay.request(player.program("energy"), 0, range(1), inputs=given)
    energy = player.play("energy", asked)["energy"][0]
    return manifest_pb2.Quality(
        name=name,
        value=float(-energy - scores[output][0]),
        unit="nats",
        standard_error=float(scores["standard_error"][0]),
        doc=player.program("score").doc,
    )


def _acceptance(player: Player) -> manifest_pb2.Quality:
    shares = _chains(player, PICTURED)["acceptance"]
    return manifest_pb2.Quality(
        name="acceptance",
        value=float(shares.mean()),
        standard_error=float(shares.std(ddof=1) / math.sqrt(len(shares))),
        doc=f"Share of MALA proposals that are accepted at the default step size, over {len(shares)} chains.",
    )


def _density(player: Player) -> NDArray[np.float32]:
    axis = ((np.arange(CELLS) + 0.5) / CELLS * 2 - 1) * LIMIT
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    rows = replay.request(player.program("score"), 0, range(len(grid)), inputs={"point": grid})
    log_density = player.play("score", rows)["log_density"].reshape(CELLS, CELLS)
    return np.asarray(np.exp(log_density), np.float32)


def _sample(model: EnergyModel, value: Value, start: _Start) -> Program:
    return Program(
        operation="sample",
        init=start,
        step=AdjustedStep(model),
        readout=AdjustedReadout(model),
        outputs=(
            value.tensor,
            _reached(model),
            TensorSpec("acceptance", minimum=0, maximum=1, doc="share of the proposals that were accepted"),
        ),
        doc="Walk by Metropolis-adjusted Langevin steps, whose stationary density is exactly the model's. "
        + _reading(model),
        state=_state(model),
        steps=Steps(parameter="steps"),
        parameters=_chain_parameters(model),
        inputs=_given(value),
        noise=(*_chain_noise(model), Noise("acceptance_noise", "uniform", (), 4, "decides on a proposal")),
        previewable=True,
    )


def _sample_unadjusted(model: EnergyModel, value: Value, start: _Start) -> Program:
    noise_scale = Parameter(
        "noise_scale",
        "float",
        1,
        0,
        2,
        doc="multiplies the noise: 1 is the model's own, 0 descends the energy",
    )
    return Program(
        operation="sample",
        method="langevin",
        init=start,
        step=UnadjustedStep(model),
        readout=UnadjustedReadout(model),
        outputs=(value.tensor, _reached(model)),
        doc="Walk by unadjusted steps, x - step_size gradient + noise_scale sqrt(2 step_size) noise, "
        "whose stationary density is off by a term in step_size. " + _reading(model),
        state=_state(model),
        steps=Steps(parameter="steps"),
        parameters=(*_chain_parameters(model), noise_scale),
        inputs=_given(value),
        noise=_chain_noise(model),
        previewable=True,
    )


def _reading(model: EnergyModel) -> str:
    if not model.smoothing:
        return "The point is the chain's last state."
    return (
        "The chain walks on noisy images; the image is the expected clean one given the chain's last state, "
        "rounded."
    )


def _reached(model: EnergyModel) -> TensorSpec:
    where = ", a noisy image" if model.smoothing else ""
    return TensorSpec("energy", doc=f"energy of the chain's last state{where}, in nats, unnormalised")


def _state(model: EnergyModel) -> tuple[TensorSpec, ...]:
    whole = (model.dimensions,)
    return (
        TensorSpec("x", shape=whole, doc=f"where the chain is: {_space(model)}"),
        TensorSpec("energy", doc="its energy there, in nats"),
        TensorSpec("gradient", shape=whole, doc="the energy's gradient there, 0 along known coordinates"),
        TensorSpec("accepted", doc="number of steps on which it moved"),
        TensorSpec("clean", shape=whole, doc="the given row, in the chain's scale"),
    )


def _space(model: EnergyModel) -> str:
    if not model.smoothing:
        return "the point itself"
    return f"pixels scaled to -1..1 with normal noise of standard deviation {model.smoothing:g} on each"


def _chain_parameters(model: EnergyModel) -> tuple[Parameter, ...]:
    steps = IMAGE_STEPS if model.smoothing else POINT_STEPS
    largest = 2 * model.smoothing**2 if model.smoothing else 0.1
    unit = "pixels scaled to -1..1" if model.smoothing else "coordinates"
    return (
        Parameter("steps", "integer", steps, 1, MAX_STEPS, doc="evaluations of the energy and its gradient"),
        Parameter(
            "step_size", "float", default_step_size(model), 1e-6, largest,
            doc=f"eta, in squared {unit}: the noise of a step has variance 2 eta",
        ),
        Parameter.choice(
            "start", STARTS, "noise: at a draw of the base density; given: at the given row"
        ),
    )  # fmt: skip


def _given(value: Value) -> tuple[Input, Input]:
    tensor = value.tensor
    doc = "where the chain starts, when start is given; what stays, where known is 1; otherwise unused"
    known_doc = "1 for what is given and stays as it is, while the chain moves the rest, given that"
    return (
        Input(
            TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.minimum, tensor.maximum, doc),
            optional=True,
        ),
        Input(TensorSpec("known", "uint8", tensor.shape, 0, 1, known_doc), optional=True),
    )


def _chain_noise(model: EnergyModel) -> tuple[Noise, ...]:
    whole = (model.dimensions,)
    return (
        Noise("component_noise", "uniform", (), 0, "picks the component of the base density"),
        Noise("factor_noise", "normal", (model.base.rank,), 1, "the draw of the base along its factors"),
        Noise("start_noise", "normal", whole, 2, "the rest of that draw, and the noise on a given image"),
        Noise("step_noise", "normal", whole, 3, "the noise of each step"),
    )


def _energy(model: EnergyModel, value: Value) -> Program:
    points = value.kind == "vector"
    where = "the point" if points else "the image as it is, scaled, without noise on it"
    return Program(
        operation="energy",
        readout=EnergyOfPoint(model) if points else EnergyOfImage(model),
        outputs=(
            TensorSpec(
                "energy", doc=f"energy of {where}, in nats: lower is likelier, only differences count"
            ),
            TensorSpec("gradient_norm", minimum=0, doc="length of the energy's gradient there"),
        ),
        doc="Unnormalised negative log-density of a row.",
        inputs=(Input(value.tensor),),
        score=Score("unnormalized", model.dimensions, _scored(model, value), "energy"),
    )


def _scored(model: EnergyModel, value: Value) -> str:
    return _space(model) if model.smoothing else value.tensor.doc


def _score_point(model: EnergyModel, value: Value) -> Program:
    known = normaliser(model)
    return Program(
        operation="score",
        readout=ScorePoint(model, known),
        outputs=(
            TensorSpec("log_density", doc="-E - log Z of the point, in nats"),
            TensorSpec(
                "standard_error", minimum=0, doc="of log Z, in nats: its change on a grid half as fine"
            ),
        ),
        doc=f"Log-density of a point, -E - log Z, with log Z = {known.log_z:.4f} by quadrature over "
        f"{GRID_CELLS} x {GRID_CELLS} cells within -{GRID_LIMIT:g}..{GRID_LIMIT:g}: exact to the grid.",
        inputs=(Input(value.tensor),),
        score=Score("estimate", model.dimensions, _scored(model, value), "log_density", "standard_error"),
    )


def _score_image(model: EnergyModel, value: Value) -> Program:
    known = normaliser(model)
    return Program(
        operation="score",
        readout=ScoreImage(model, known),
        outputs=(
            TensorSpec("log_density", doc="-E - log Z, in nats, of a noisy image and not of integers"),
            TensorSpec("standard_error", minimum=0, doc="of log Z, in nats, the same for every row"),
            TensorSpec(
                "log_density_reverse", doc="the same with log Z from chains that walk back to the base"
            ),
        ),
        doc="Log-density, among noisy images, of an image as it is or of one with noise on it. "
        f"log Z = {known.log_z:.3f} +- {known.standard_error:.3f} by annealed importance sampling, which "
        f"errs downwards, and {known.reverse:.3f} on the way back, which errs upwards if those chains had "
        f"settled ({model.chains} chains, {TEMPERATURES} temperatures).",
        parameters=(
            Parameter.choice(
                "blur",
                BLURS,
                "none: at the image itself; draw: at the image with a draw of the noise, by seed, whose mean "
                "over rows is a proper score",
            ),
        ),
        inputs=(Input(value.tensor),),
        noise=(Noise("blur_noise", "normal", (model.dimensions,), 0, "standard normal"),),
        score=Score("estimate", model.dimensions, _scored(model, value), "log_density", "standard_error"),
    )


FAMILY = Family()
