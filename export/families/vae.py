"""Variational autoencoder for images of integers.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2013): a row x has a latent
z ~ N(0, I) and p(x | z); the encoder gives q(z | x) = N(mean, std^2), and

    log p(x) >= E_q[log p(x | z)] - KL(q || N(0, I)).

The score is the importance-weighted bound with K draws, tighter as K grows.
Pixels given z are independent mixtures of discretised logistics (Salimans et al.,
"PixelCNN++", 2017) with a trace of the uniform, a normalised mass on integers.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export import importance, replay
from export.data import Dataset
from export.families.base import Preset
from export.figure import Panel
from export.golden import Example
from export.measure import Judge, bits_per_dimension, play, sampler
from export.program import Input, Noise, Parameter, Program, Score, TensorSpec
from export.replay import Player
from export.training import Network, Settings
from samovar.v1 import manifest_pb2

LATENT_DIMENSIONS = 16
COMPONENTS = 3
TRAINING_DRAWS = 5
MEASURED_DRAWS = 500
PICTURED = 100
UNIFORM_SHARE = 1e-4


class PixelMixture:
    """Independent mixtures of M discretised logistics on 0..levels-1, from free parameters [..., 3 * M]."""

    def __init__(self, parameters: Tensor, levels: int) -> None:
        weights, means, scales = parameters.reshape(*parameters.shape[:-1], -1, 3).unbind(-1)
        self._top = levels - 1
        self._weights = weights.softmax(-1)
        self._means = (means / 2 + 1) * self._top / 2
        self._scales = scales.clamp(-5, 5).exp() * levels / 16

    def log_mass(self, pixels: Tensor) -> Tensor:
        """Log-mass of integer pixels [...], in nats."""
        value = pixels.unsqueeze(-1).to(self._means.dtype)
        above = (value + 0.5 - self._means) / self._scales
        below = (value - 0.5 - self._means) / self._scales
        above = torch.where(value >= self._top, torch.full_like(above, 1e4), above)
        below = torch.where(value <= 0, torch.full_like(below, -1e4), below)
        # A difference of sigmoids is taken where they are small, which keeps its digits.
        mirrored = below > 0
        upper = torch.where(mirrored, -below, above).sigmoid()
        lower = torch.where(mirrored, -above, below).sigmoid()
        mass = (self._weights * (upper - lower)).sum(-1)
        return torch.log((1 - UNIFORM_SHARE) * mass + UNIFORM_SHARE / (self._top + 1))

    def mean(self) -> Tensor:
        """Mean of the pixels clipped to their range, in closed form: the integral of 1 - CDF."""
        spread = functional.softplus(self._means / self._scales) - functional.softplus(
            (self._means - self._top) / self._scales
        )
        return (self._weights * self._scales * spread).sum(-1)

    def draw(self, uniform: Tensor) -> Tensor:
        """Pixels by inversion of a uniform number each: it picks the component, its remainder the value."""
        flat = uniform / UNIFORM_SHARE * (self._top + 1) - 0.5
        share = ((uniform - UNIFORM_SHARE) / (1 - UNIFORM_SHARE)).clamp(0, 1).unsqueeze(-1)
        reached = self._weights.cumsum(-1)
        index = (share >= reached[..., :-1]).long().sum(-1, keepdim=True)
        weight, end, mean, scale = (
            entries.gather(-1, index) for entries in (self._weights, reached, self._means, self._scales)
        )
        rest = ((share - (end - weight)) / weight).clamp(1e-6, 1 - 1e-6)
        drawn = (mean + scale * torch.log(rest / (1 - rest))).squeeze(-1)
        return torch.where(uniform < UNIFORM_SHARE, flat, drawn)

    def quantise(self, pixels: Tensor) -> Tensor:
        """The nearest integers of the range, uint8."""
        return pixels.round().clamp(0, self._top).to(torch.uint8)


class VAE(Network):
    """Encoder and decoder, perceptrons with SiLU (Elfwing et al. 2018) and dropout."""

    def __init__(self, shape: tuple[int, ...], levels: int, latent: int, preset: Preset) -> None:
        super().__init__()
        self.shape, self.levels, self.latent = shape, levels, latent
        self.dimensions = math.prod(shape)
        self.encoder = _perceptron(self.dimensions, 2 * latent, preset)
        self.decoder = _perceptron(latent, self.dimensions * COMPONENTS * 3, preset)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B, z] of q(z | x)."""
        scaled = image.flatten(1).to(torch.float32) * (2 / (self.levels - 1)) - 1
        mean, log_std = self.encoder(scaled).chunk(2, -1)
        return mean, log_std.clamp(-6, 3).exp()

    def decode(self, latent: Tensor) -> PixelMixture:
        """p(x | z) for latents [..., z], over pixels [..., *shape]."""
        parameters = self.decoder(latent).unflatten(-1, (*self.shape, 3 * COMPONENTS))
        return PixelMixture(parameters, self.levels)

    def log_weights(self, image: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """log p(x, z) - log q(z | x) in nats [B, K], for z = mean + std * noise with noise [B, K, z]."""
        latent = mean.unsqueeze(1) + std.unsqueeze(1) * noise
        log_likelihood = self.decode(latent).log_mass(image.unsqueeze(1)).flatten(2).sum(-1)
        log_ratio = 0.5 * (noise.square() - latent.square()) + std.log().unsqueeze(1)
        return log_likelihood + log_ratio.sum(-1)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Negative importance-weighted bound of TRAINING_DRAWS draws, in nats per dimension [B]."""
        mean, std = self.encode(rows)
        noise = torch.randn((len(rows), TRAINING_DRAWS, self.latent), device=mean.device)
        log_weights = self.log_weights(rows, mean, std, noise)
        return (math.log(TRAINING_DRAWS) - log_weights.logsumexp(1)) / self.dimensions


def _perceptron(inputs: int, outputs: int, preset: Preset) -> nn.Sequential:
    widths = [inputs] + [preset.width] * preset.depth
    hidden = [
        module
        for a, b in pairwise(widths)
        for module in (nn.Linear(a, b), nn.SiLU(), nn.Dropout(preset.dropout))
    ]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], outputs))


class _Part(nn.Module):
    """A module of a program: a function of the trained network."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae


class Encode(_Part):
    """image -> mean, std of its latent."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(image)


class Decode(_Part):
    """latent -> expected pixels."""

    def forward(self, latent: Tensor) -> Tensor:
        pixels = self.vae.decode(latent)
        return pixels.quantise(pixels.mean())


class Sample(_Part):
    """A latent of the prior -> expected or drawn pixels."""

    def forward(self, latent: Tensor, temperature: Tensor, pixels: Tensor, pixel_noise: Tensor) -> Tensor:
        mixture = self.vae.decode(latent * temperature.unsqueeze(1))
        drawn = _per_row(pixels == 1, pixel_noise)
        return mixture.quantise(torch.where(drawn, mixture.draw(pixel_noise), mixture.mean()))


class Reconstruct(_Part):
    """image -> its latent, or a draw of it -> expected pixels."""

    def forward(self, image: Tensor, latent: Tensor, latent_noise: Tensor) -> Tensor:
        mean, std = self.vae.encode(image)
        drawn = (latent == 1).unsqueeze(1)
        pixels = self.vae.decode(torch.where(drawn, mean + std * latent_noise, mean))
        return pixels.quantise(pixels.mean())


class ScoreInit(_Part):
    """image -> its latent's distribution, and empty sums."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std = self.vae.encode(image)
        return mean, std, *importance.nothing(mean[:, 0])


class ScoreStep(_Part):
    """Add the weights of a chunk of draws to the running sums."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        image: Tensor,
        mean: Tensor,
        std: Tensor,
        log_sum: Tensor,
        log_sum_of_squares: Tensor,
        latent_noise: Tensor,
        draws: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_weights = self.vae.log_weights(image, mean, std, latent_noise)
        sums = importance.add((log_sum, log_sum_of_squares), log_weights, draws, step_index)
        return mean, std, *sums


def _per_row(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *(1 for _ in like.shape[1:]))


class Family:
    """The variational autoencoder as the exporter sees it."""

    name = "vae"
    description = (
        "Variational autoencoder (Kingma & Welling 2013), trained on the bound of Burda et al. (2015)."
    )
    operations = ("sample", "reconstruct", "encode", "decode", "score")
    refusals: Mapping[str, str] = {
        "energy": "its log-density is an integral without a closed form; score bounds it",
        "classify": "it has learned no labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), judge=Settings(steps=1), measured_rows=20
        ),
        "starter": Preset(width=384, depth=2, dropout=0.1, training=Settings(steps=1300)),
        "full": Preset(
            width=1024,
            depth=3,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=128, learning_rate=1e-3),
        ),
    }

    def network(self, data: Dataset, preset: Preset) -> VAE:
        """An untrained autoencoder with LATENT_DIMENSIONS latents."""
        return VAE(data.value.tensor.shape, data.value.levels, LATENT_DIMENSIONS, preset)

    def programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, reconstruct, encode, decode and score."""
        assert isinstance(network, VAE)
        image = data.value.tensor
        return (
            _sample(network, image),
            _reconstruct(network, image),
            _encode(network, image),
            _decode(network, image),
            _score(network, image, f"integers 0..{network.levels - 1}"),
        )

    def examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests with and without parameters, on the first rows of the test part."""
        images = data.test.rows[:3]
        latents = torch.linspace(-2, 2, 3 * LATENT_DIMENSIONS).reshape(3, -1).numpy()
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"temperature": 0.7, "pixels": 0}),
            Example("reconstruct", inputs={"image": images}),
            Example("reconstruct", seed=3, parameters={"latent": 1}, inputs={"image": images}),
            Example("encode", inputs={"image": images}),
            Example("decode", inputs={"latent": latents}),
            Example("score", seed=4, parameters={"draws": 25}, inputs={"image": images}),
            Example("score", seed=5, first_row=2, rows=2, inputs={"image": images[:2]}),
        )

    def quality(self, player: Player, data: Dataset, preset: Preset) -> list[manifest_pb2.Quality]:
        """Bits per dimension of the bound, and how samples compare with test rows."""
        images = data.test.rows[: preset.measured_rows]
        judge = Judge.train(data, preset.judge)
        return [
            *(_bits_per_dimension(player, images, draws) for draws in (MEASURED_DRAWS, 1)),
            *judge.similarity(sampler(player), preset.measured_rows),
        ]

    def panels(self, player: Player, data: Dataset) -> list[Panel]:
        """Test rows, their reconstructions, and samples."""
        real, sample, reconstruct = (
            data.test.rows[:PICTURED],
            player.program("sample"),
            player.program("reconstruct"),
        )
        seen = replay.request(reconstruct, 0, range(len(real)), inputs={"image": real})
        return [
            Panel("test images", real),
            Panel("their reconstructions", player.play("reconstruct", seen)["image"]),
            Panel("samples", player.play("sample", replay.request(sample, 0, range(PICTURED)))["image"]),
        ]


def _bits_per_dimension(player: Player, images: NDArray[np.uint8], draws: int) -> manifest_pb2.Quality:
    rows = replay.request(player.program("score"), 0, range(len(images)), {"draws": draws}, {"image": images})
    answers = play(player, "score", rows, f"bound with {draws} draws")
    return bits_per_dimension(answers["log_likelihood"], images[0].size, draws)


def _latent_noise(stream: int, name: str, *shape: int) -> Noise:
    return Noise(name, "normal", (*shape, LATENT_DIMENSIONS), stream, "standard normal")


def _sample(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="sample",
        readout=Sample(vae),
        outputs=(image,),
        doc="Draw latents from the prior and decode them.",
        parameters=(
            Parameter(
                "temperature", "float", 1, 0, 2, doc="standard deviation of the latents; 1 is the model's own"
            ),
            Parameter.choice(
                "pixels",
                ("mean", "draw"),
                "mean: their expected values; draw: draw them, as the model says",
                "draw",
            ),
        ),
        noise=(
            _latent_noise(0, "latent"),
            Noise("pixel_noise", "uniform", image.shape, 1, "one number for every pixel, by inversion"),
        ),
    )


def _reconstruct(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=Reconstruct(vae),
        outputs=(image,),
        doc="Encode an image and decode its latent to expected pixel values.",
        parameters=(
            Parameter.choice("latent", ("mean", "draw"), "mean or a draw of the encoder's distribution"),
        ),
        inputs=(Input(image),),
        noise=(_latent_noise(0, "latent_noise"),),
    )


def _encode(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="encode",
        readout=Encode(vae),
        outputs=_posterior("of the latent given the image"),
        doc="The encoder's normal distribution over latents.",
        inputs=(Input(image),),
    )


def _posterior(doc: str) -> tuple[TensorSpec, TensorSpec]:
    return (
        TensorSpec("mean", shape=(LATENT_DIMENSIONS,), doc=f"mean {doc}"),
        TensorSpec("std", shape=(LATENT_DIMENSIONS,), minimum=0, doc=f"standard deviation {doc}"),
    )


def _decode(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="decode",
        readout=Decode(vae),
        outputs=(image,),
        doc="Expected pixel values of a latent.",
        inputs=(
            Input(TensorSpec("latent", shape=(LATENT_DIMENSIONS,), doc="standard normal under the prior")),
        ),
    )


def _score(vae: VAE, image: TensorSpec, space: str) -> Program:
    return Program(
        operation="score",
        init=ScoreInit(vae),
        step=ScoreStep(vae),
        readout=importance.Bound(),
        outputs=(
            TensorSpec(
                "log_likelihood", doc="importance-weighted bound on the log-mass of the image, in nats"
            ),
            importance.STANDARD_ERROR,
        ),
        doc="Importance-weighted lower bound on the log-mass of an image; tighter with more draws.",
        state=(
            *_posterior("of the latent given the image"),
            *importance.STATE,
        ),
        steps=importance.STEPS,
        parameters=(importance.draws("importance draws per image"),),
        inputs=(Input(image),),
        noise=(_latent_noise(0, "latent_noise", importance.DRAWS_PER_STEP),),
        score=Score("lower_bound", vae.dimensions, space, "log_likelihood", "standard_error", "draws"),
    )


FAMILY = Family()
