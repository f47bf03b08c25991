"""RealNVP: a normalising flow, for points and for images of integers.

Dinh, Sohl-Dickstein & Bengio, "Density estimation using Real NVP" (2017): an
invertible map f takes a row x to a latent z ~ N(0, I), and

    log p(x) = log N(f(x); 0, I) + log |det df/dx|.

A coupling keeps the coordinates of a mask and moves the others by a scale and a
shift computed from the kept ones, so the determinant is a product of scales; the
masks alternate. Scales are bounded, so that the inverse is exact to rounding
(Behrmann et al., "Understanding and mitigating exploding inverses", 2021).

The score of a point is its exact log-density. An image of integers has the mass
of its unit cube, and the density at uniform draws from it gives a lower bound
(uniform dequantisation, Theis, van den Oord & Bethge 2016).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset
from export.evaluation.figures import Drawing, Heatmap, Panel, Scatter
from export.evaluation.sample_quality import (
    SampleEvaluator,
    bits_per_dimension,
    density,
    negative_log_density,
    play,
    sampler,
    two_sample_test,
)
from export.families.base import Preset
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, TensorSpec
from export.probability import importance_weighting
from export.probability.batch_invariant_ops import total
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

HIDDEN_LAYERS = 2
# Of each layer. Wider bounds cut thin wedges into a density, where held-out rows then fall.
LARGEST_LOG_SCALE = 1.0
# How far ranks are kept from 0 and 1, where their logits have steep ends.
MARGIN = 1e-3
# A logistic variable times this has the variance of a standard normal one.
LOGIT_SCALE = math.sqrt(3) / math.pi
# Shares of levels are those of the training rows, of so many rows of all pixels, and of uniform noise.
PRIOR_ROWS, UNIFORM_SHARE = 20, 1e-3
MEASURED_DRAWS = 100
DEQUANTISATIONS = ("middle", "draw")
DRAW = DEQUANTISATIONS.index("draw")
PICTURED = 100
# The picture of a density: -LIMIT..LIMIT on both axes, in so many cells each.
LIMIT, CELLS = 2.5, 200


class Bijection(nn.Module):
    """An invertible map of rows [..., D]."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The image y [..., D], and log-slopes [..., D] whose sum is log |det dy/dx|."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """The row x [..., D] that is mapped to y."""
        raise NotImplementedError


class EmpiricalCdf(Bijection):
    """Each dequantised pixel 0..levels to the logit of its rank among the training rows' own (its CDF).

    After it every pixel alone is nearly normal, so that what is left to learn is how pixels hang
    together; where a pixel is always dark, that alone would take couplings a quarter of a bit
    (the first of the iterations of Chen & Gopinath, "Gaussianization", 2000).
    """

    below: Tensor
    above: Tensor
    mass: Tensor
    first: Tensor

    def __init__(self, rows: NDArray[np.uint8], levels: int) -> None:
        super().__init__()
        self.levels = levels
        mass = _masses(rows.reshape(len(rows), -1), levels)
        below = torch.cat([torch.zeros(len(mass), 1, dtype=mass.dtype), mass.cumsum(1)[:, :-1]], 1)
        above = torch.cat([mass.flip(1).cumsum(1).flip(1)[:, 1:], torch.zeros_like(mass[:, :1])], 1)
        self.register_buffer("below", below.to(torch.float32).flatten())
        self.register_buffer("above", above.to(torch.float32).flatten())
        self.register_buffer("mass", mass.to(torch.float32).flatten())
        self.register_buffer("first", torch.arange(len(mass)) * levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = x.floor().long().clamp(0, self.levels - 1)
        index, part = level + self.first, x - level
        # The rank and its complement each from its own table: a difference from 1 would lose its digits.
        log_rank, log_rest = (
            (MARGIN + (1 - 2 * MARGIN) * (table[index] + self.mass[index] * share)).log()
            for table, share in ((self.below, part), (self.above, 1 - part))
        )
        slope = math.log(LOGIT_SCALE * (1 - 2 * MARGIN)) + self.mass[index].log()
        return LOGIT_SCALE * (log_rank - log_rest), slope - log_rank - log_rest

    def inverse(self, y: Tensor) -> Tensor:
        logit = y / LOGIT_SCALE
        rank, rest = ((side.sigmoid() - MARGIN) / (1 - 2 * MARGIN) for side in (logit, -logit))
        is_low = logit < 0
        level = self._level(rank, rest, is_low)
        index = level + self.first
        from_below = (rank - self.below[index]) / self.mass[index]
        from_above = 1 - (rest - self.above[index]) / self.mass[index]
        return level + torch.where(is_low, from_below, from_above)

    def _level(self, rank: Tensor, rest: Tensor, is_low: Tensor) -> Tensor:
        """The last level that begins at or below a rank, by bisection."""
        level = torch.zeros_like(is_low, dtype=torch.int64)
        for bit in reversed(range((self.levels - 1).bit_length())):
            higher = (level + (1 << bit)).clamp(max=self.levels - 1)
            index = higher + self.first
            # ONNX Runtime chooses between numbers only.
            is_passed = (is_low & (rank >= self.below[index])) | (~is_low & (rest <= self.above[index - 1]))
            level = torch.where(is_passed, higher, level)
        return level


def _masses(rows: NDArray[np.uint8], levels: int) -> Tensor:
    """The share of each level of each pixel, float64 [D, levels], smoothed by the pixels' common shares."""
    counts = np.stack([np.bincount(pixel, minlength=levels) for pixel in rows.T])
    common = counts.sum(0) / counts.sum()
    smooth = (counts + PRIOR_ROWS * common) / (len(rows) + PRIOR_ROWS)
    return torch.from_numpy((1 - UNIFORM_SHARE) * smooth + UNIFORM_SHARE / levels)


class Affine(Bijection):
    """A scale and a shift of every coordinate (Kingma & Dhariwal, "Glow", 2018), at first the identity."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(dimensions))
        self.shift = nn.Parameter(torch.zeros(dimensions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale = _bounded(self.scale)
        return x * log_scale.exp() + self.shift, log_scale.expand_as(x)

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.shift) * (-_bounded(self.scale)).exp()


class Coupling(Bijection):
    """Keeps the coordinates where `kept` is 1, and scales and shifts the others by functions of them."""

    kept: Tensor

    def __init__(self, kept: Tensor, preset: Preset) -> None:
        super().__init__()
        self.register_buffer("kept", kept)
        self.network = _perceptron(len(kept), preset)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._log_scale_and_shift(x)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = self._log_scale_and_shift(y)
        return (y - shift) * (-log_scale).exp()

    def _log_scale_and_shift(self, row: Tensor) -> tuple[Tensor, Tensor]:
        moved = 1 - self.kept
        scale, shift = self.network(row * self.kept).chunk(2, -1)
        return _bounded(scale) * moved, shift * moved


def _bounded(scale: Tensor) -> Tensor:
    return LARGEST_LOG_SCALE * torch.tanh(scale / LARGEST_LOG_SCALE)


def _perceptron(dimensions: int, preset: Preset) -> nn.Sequential:
    widths = [dimensions] + [preset.width] * HIDDEN_LAYERS
    hidden = [
        module
        for a, b in pairwise(widths)
        for module in (nn.Linear(a, b), nn.SiLU(), nn.Dropout(preset.dropout))
    ]
    last = nn.Linear(preset.width, 2 * dimensions)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*hidden, last)


def masks(shape: tuple[int, ...], count: int) -> list[Tensor]:
    """The kept coordinates [D] of each coupling, float32 of 0 and 1: every second one keeps the other half.

    Along an axis, every second coordinate; between pairs of couplings the pattern
    goes through the checkerboard of all axes and each axis of more than one coordinate.
    """
    axes = np.indices(shape)
    patterns = [axes.sum(0)]
    if len(shape) > 1:
        patterns += [axis for axis in axes if len(np.unique(axis)) > 1]
    return [
        torch.from_numpy((patterns[number // 2 % len(patterns)] + number) % 2).flatten().to(torch.float32)
        for number in range(count)
    ]


class RealNVP(Network):
    """The flow from rows in coordinates [..., D] to latents: couplings with affine maps between them.

    For points the coordinates are the values; for images they are dequantised
    pixels, in which an integer i is the interval i..i+1.
    """

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels = data.spec.tensor.shape, data.spec.num_levels
        self.dimensions = math.prod(self.shape)
        layers: list[Bijection] = [EmpiricalCdf(data.train.rows, self.levels)] if self.levels else []
        for kept in masks(self.shape, preset.depth):
            layers += [Coupling(kept, preset), Affine(self.dimensions)]
        self.layers = nn.ModuleList(layers)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [..., D] of rows [..., D], and log-slopes [..., D] whose sum is the log-determinant."""
        slopes = torch.zeros_like(x)
        for layer in self._bijections():
            x, more = layer(x)
            slopes = slopes + more
        return x, slopes

    def decode(self, latent: Tensor) -> Tensor:
        """The rows [..., D] that have these latents [..., D]."""
        for layer in reversed(list(self._bijections())):
            latent = layer.inverse(latent)
        return latent

    def log_density(self, x: Tensor) -> Tensor:
        """log p(x) in nats [...] of rows [..., D]."""
        latent, slopes = self.encode(x)
        terms = slopes - 0.5 * latent.square() - 0.5 * math.log(2 * math.pi)
        return total(terms)

    def value(self, x: Tensor) -> Tensor:
        """Rows [B, D] as values [B, *shape]: points as they are, pixels as the integers that hold them."""
        if self.levels:
            x = x.floor().clamp(0, self.levels - 1).to(torch.uint8)
        return x.reshape(-1, *self.shape)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Negative log-density, of pixels at a uniform draw of each, in nats per dimension [B]."""
        x = rows.flatten(1).to(torch.float32)
        if self.levels:
            x = x + torch.rand_like(x)
        return -self.log_density(x) / self.dimensions

    def _bijections(self) -> Iterator[Bijection]:
        for layer in self.layers:
            assert isinstance(layer, Bijection)
            yield layer


class _Part(nn.Module):
    """A module of a program: a function of the trained flow."""

    def __init__(self, flow: RealNVP) -> None:
        super().__init__()
        self.flow = flow


class Sample(_Part):
    """A latent of the base distribution -> its value."""

    def forward(self, latent: Tensor, temperature: Tensor) -> Tensor:
        return self.flow.value(self.flow.decode(latent * temperature.unsqueeze(1)))


class Decode(_Part):
    """latent -> its value."""

    def forward(self, latent: Tensor) -> Tensor:
        return self.flow.value(self.flow.decode(latent))


class EncodePoint(_Part):
    """point -> its latent."""

    def forward(self, point: Tensor) -> Tensor:
        return self.flow.encode(point)[0]


class EncodeImage(_Part):
    """image -> the latent of the middle of its unit cube, or of a draw from it."""

    def forward(self, image: Tensor, dequantisation: Tensor, pixel_noise: Tensor) -> Tensor:
        drawn = (dequantisation == DRAW).unsqueeze(1)
        offset = torch.where(drawn, pixel_noise.flatten(1), torch.full_like(pixel_noise, 0.5).flatten(1))
        return self.flow.encode(image.flatten(1).to(torch.float32) + offset)[0]


class ReconstructPoint(_Part):
    """point -> the point after a round trip, and how far it came from its start."""

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        again = self.flow.decode(self.flow.encode(point)[0])
        return self.flow.value(again), (again - point).abs().amax(1)


class ReconstructImage(_Part):
    """image -> the image after a round trip, and how far its pixels came from their mid-points.

    As a share of all levels, for it is the rounding of numbers of their size.
    """

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        middle = image.flatten(1).to(torch.float32) + 0.5
        again = self.flow.decode(self.flow.encode(middle)[0])
        return self.flow.value(again), (again - middle).abs().amax(1) / self.flow.levels


class ScorePoint(_Part):
    """point -> its log-density."""

    def forward(self, point: Tensor) -> Tensor:
        return self.flow.log_density(point)


class ScoreImageInit(nn.Module):
    """Sums without a draw."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return importance_weighting.nothing(image.flatten(1)[:, 0].to(torch.float32))


class ScoreImageStep(_Part):
    """Add the densities at draws from the image's unit cube to the running sums."""

    def forward(
        self,
        image: Tensor,
        log_sum: Tensor,
        log_sum_of_squares: Tensor,
        pixel_noise: Tensor,
        draws: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        corner = image.flatten(1).to(torch.float32).unsqueeze(1)
        log_weights = self.flow.log_density(corner + pixel_noise.flatten(2))
        return importance_weighting.add((log_sum, log_sum_of_squares), log_weights, draws, step_index)


# Of the starter and of medium.
POINTS = Preset(
    width=64,
    depth=12,
    training=Settings(steps=8000, batch_rows=256),
    evaluation_rows=10_000,
)


class Family:
    """The flow as the exporter sees it."""

    name = "realnvp"
    description = "Normalising flow of affine couplings (RealNVP, Dinh et al. 2017)."
    operations: tuple[str, ...] = ("sample", "reconstruct", "encode", "decode", "score")
    unsupported_operations: Mapping[str, str] = {
        "energy": "score gives the log-density itself, normalised",
        "classify": "it has learned no labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=2, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=192,
            depth=12,
            dropout=0.25,
            training=Settings(steps=1600),
            by_kind={"vector": POINTS},
        ),
        "medium": Preset(
            width=384,
            depth=8,
            dropout=0.05,
            training=Settings(steps=4000, learning_rate=1e-3),
            by_kind={"vector": POINTS},
        ),
        "full": Preset(
            width=1024,
            depth=16,
            dropout=0.2,
            training=Settings(steps=30_000, batch_rows=128, learning_rate=5e-4),
            by_kind={
                "vector": Preset(
                    width=128,
                    depth=16,
                    training=Settings(steps=40_000, batch_rows=512),
                    evaluation_rows=10_000,
                )
            },
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> RealNVP:
        """An untrained flow, beginning as the identity."""
        return RealNVP(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, reconstruct, encode, decode and score."""
        assert isinstance(network, RealNVP)
        value, points = data.spec, data.spec.kind == "vector"
        return (
            _sample(network, value.tensor),
            _reconstruct_point(network, value) if points else _reconstruct_image(network, value),
            _encode_point(network, value) if points else _encode_image(network, value),
            _decode(network, value.tensor),
            _score_point(network, value) if points else _score_image(network, value),
        )

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests with and without parameters, on the first rows of the test part."""
        value, points = data.spec, data.spec.kind == "vector"
        rows = {value.tensor.name: data.test.rows[:3]}
        latents = torch.linspace(-2, 2, 3 * math.prod(value.tensor.shape)).reshape(3, -1).numpy()
        drawn = (
            Example("encode", seed=3, parameters={"dequantisation": DRAW}, inputs=rows),
            Example("score", seed=4, parameters={"draws": 25}, inputs=rows),
        )
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"temperature": 0.7}),
            *(Example(operation, inputs=rows) for operation in ("reconstruct", "encode", "score")),
            Example("decode", inputs={"latent": latents}),
            *(() if points else drawn),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """The density of test rows, and how samples compare with them."""
        draw, count = sampler(interpreter), preset.evaluation_rows
        rows = data.test.rows[:count]
        if data.spec.kind == "vector":
            return [
                negative_log_density(_scores(interpreter, rows), f"In {data.spec.tensor.doc}."),
                two_sample_test(data, draw, count),
            ]
        bounds = [
            bits_per_dimension(_scores(interpreter, rows, {"draws": draws}), rows[0].size, draws)
            for draws in (MEASURED_DRAWS, 1)
        ]
        return [*bounds, *SampleEvaluator.train(data, preset.evaluator).similarity(draw, count)]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples, with the density of points, or samples nearer to the mode."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows, LIMIT),
                Scatter("samples", _samples(interpreter, len(data.test)), LIMIT),
                Heatmap("density", density(interpreter, "score", LIMIT, CELLS), LIMIT),
            ]
        return [
            Panel("test images", data.test.rows[:PICTURED]),
            Panel("samples", _samples(interpreter, PICTURED)),
            Panel("samples, temperature 0.7", _samples(interpreter, PICTURED, {"temperature": 0.7})),
        ]


def _samples(
    interpreter: Interpreter, count: int, parameters: Mapping[str, float] | None = None
) -> NDArray[np.generic]:
    rows = make_rows(interpreter.program("sample"), 0, range(count), parameters)
    return interpreter.run("sample", rows)[interpreter.manifest.data_spec.tensor.name]


def _scores(
    interpreter: Interpreter, values: NDArray[np.generic], parameters: Mapping[str, float] | None = None
) -> NDArray[np.float32]:
    program, given = interpreter.program("score"), {interpreter.manifest.data_spec.tensor.name: values}
    rows = make_rows(program, 0, range(len(values)), parameters, given)
    return play(interpreter, "score", rows, "log-density of test rows")[program.score.nats_output]


def _latent(flow: RealNVP) -> TensorSpec:
    return TensorSpec("latent", shape=(flow.dimensions,), doc="standard normal under the model")


def _sample(flow: RealNVP, tensor: TensorSpec) -> Program:
    return Program(
        operation="sample",
        readout=Sample(flow),
        outputs=(tensor,),
        doc="Draw latents from the base distribution and decode them.",
        parameters=(
            Parameter(
                "temperature", "float", 1, 0, 2, doc="standard deviation of the latents; 1 is the model's own"
            ),
        ),
        noise=(Noise("latent", "normal", (flow.dimensions,), 0, "standard normal"),),
    )


def _decode(flow: RealNVP, tensor: TensorSpec) -> Program:
    return Program(
        operation="decode",
        readout=Decode(flow),
        outputs=(tensor,),
        doc="The value of a latent: the inverse of encode.",
        inputs=(Input(_latent(flow)),),
    )


def _reconstruct_point(flow: RealNVP, value: DataSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=ReconstructPoint(flow),
        outputs=(value.tensor, _largest_error("largest difference of a coordinate from what was given")),
        doc="Encode a point and decode its latent, which gives it back to rounding.",
        inputs=(Input(value.tensor),),
    )


def _reconstruct_image(flow: RealNVP, value: DataSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=ReconstructImage(flow),
        outputs=(
            value.tensor,
            _largest_error("largest difference of a pixel from its mid-point, as a share of all levels"),
        ),
        doc="Encode the mid-points of an image's pixels and decode the latent, which gives the image back.",
        inputs=(Input(value.tensor),),
    )


def _largest_error(doc: str) -> TensorSpec:
    return TensorSpec("largest_error", minimum=0, doc=doc)


def _encode_point(flow: RealNVP, value: DataSpec) -> Program:
    return Program(
        operation="encode",
        readout=EncodePoint(flow),
        outputs=(_latent(flow),),
        doc="The one latent of a point.",
        inputs=(Input(value.tensor),),
    )


def _encode_image(flow: RealNVP, value: DataSpec) -> Program:
    return Program(
        operation="encode",
        readout=EncodeImage(flow),
        outputs=(_latent(flow),),
        doc="The latent of an image whose integers i become numbers between i and i + 1.",
        parameters=(
            Parameter.choice(
                "dequantisation",
                DEQUANTISATIONS,
                "middle: i + 1/2; draw: uniform between i and i + 1, by seed",
            ),
        ),
        inputs=(Input(value.tensor),),
        noise=(Noise("pixel_noise", "uniform", value.tensor.shape, 0, "what is added to every pixel"),),
    )


def _score_point(flow: RealNVP, value: DataSpec) -> Program:
    return Program(
        operation="score",
        readout=ScorePoint(flow),
        outputs=(TensorSpec("log_density", doc="log-density of the point, in nats"),),
        doc="Exact log-density of a point.",
        inputs=(Input(value.tensor),),
        score=Score("exact", flow.dimensions, value.tensor.doc, "log_density"),
    )


def _score_image(flow: RealNVP, value: DataSpec) -> Program:
    shape, space = value.tensor.shape, f"integers 0..{flow.levels - 1}"
    doc = "dequantisation bound on the log-mass of the image, in nats"
    return Program(
        operation="score",
        init=ScoreImageInit(),
        step=ScoreImageStep(flow),
        readout=importance_weighting.Bound(),
        outputs=(TensorSpec("log_likelihood", doc=doc), importance_weighting.STANDARD_ERROR),
        doc="Lower bound on the log-mass of an image, from the density at uniform draws from its unit cube.",
        state=importance_weighting.STATE,
        steps=importance_weighting.STEPS,
        parameters=(importance_weighting.draws("draws from the unit cube of each image"),),
        inputs=(Input(value.tensor),),
        noise=(
            Noise(
                "pixel_noise",
                "uniform",
                (importance_weighting.DRAWS_PER_STEP, *shape),
                0,
                "what each draw adds to every pixel",
            ),
        ),
        score=Score("lower_bound", flow.dimensions, space, "log_likelihood", "standard_error", "draws"),
    )


FAMILY = Family()
