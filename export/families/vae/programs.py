"""Variational autoencoder for images of integers.

Kingma & Welling, "Auto-Encoding Variational Bayes" (2013): a row x has a latent
z ~ N(0, I) and p(x | z); the encoder gives q(z | x) = N(mean, std^2), and

    log p(x) >= E_q[log p(x | z)] - KL(q || N(0, I)).

The score is the importance-weighted bound with K draws, tighter as K grows. Pixels
given z are independent, which makes inpainting a Markov chain over z and the missing
pixels (Rezende, Mohamed & Wierstra, 2014, appendix F): encode and decode again and
again, the known pixels clamped. That is Gibbs sampling as far as q(z | x) is the
posterior; accepted by Metropolis and Hastings' rule (Mattei & Frellsen, "Leveraging
the Exact Likelihood of Deep Latent Variable Models", 2018), it is exact in the limit.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset, first_half_mask
from export.evaluation.figures import Panel
from export.evaluation.sample_quality import SampleEvaluator, bits_per_dimension, play, sampler
from export.families.base import Preset
from export.graphs.program import Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability import importance_weighting
from export.probability.discretized_logistic import PixelMixture
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

LATENT_DIMENSIONS = 16
COMPONENTS = 3
TRAINING_DRAWS = 5
MEASURED_DRAWS = 500
PICTURED = 100
CHAINS = ("pseudo_gibbs", "metropolis_within_gibbs")


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
    """latent -> expected or drawn pixels."""

    def forward(self, latent: Tensor, pixels: Tensor, pixel_noise: Tensor) -> Tensor:
        return _rendered(self.vae.decode(latent), pixels, pixel_noise)


class Sample(_Part):
    """A latent of the prior -> expected or drawn pixels."""

    def forward(self, latent: Tensor, temperature: Tensor, pixels: Tensor, pixel_noise: Tensor) -> Tensor:
        return _rendered(self.vae.decode(latent * temperature.unsqueeze(1)), pixels, pixel_noise)


class InpaintInit(_Part):
    """Known pixels around those of a sample, and that sample's latent."""

    def forward(
        self, image: Tensor, known: Tensor, start_latent: Tensor, start_noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixture = self.vae.decode(start_latent)
        start = mixture.quantize(mixture.sample_by_inversion(start_noise))
        return torch.where(known == 1, image, start), start_latent


class InpaintStep(_Part):
    """Draw a latent given all pixels, accept it if the chain asks, and draw the missing pixels given it."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        canvas: Tensor,
        latent: Tensor,
        known: Tensor,
        chain: Tensor,
        latent_noise: Tensor,
        pixel_noise: Tensor,
        acceptance: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, Tensor]:
        mean, std = self.vae.encode(canvas)
        standard = torch.stack([(latent - mean) / std, latent_noise], 1)
        log_weights = self.vae.log_weights(canvas, mean, std, standard)
        # The other chain begins as this one, which gets away from a bad start sooner.
        is_gibbs = (chain == 0) | (2 * step_index < num_steps)
        accepted = is_gibbs | (acceptance.log() < log_weights[:, 1] - log_weights[:, 0])
        latent = torch.where(accepted.unsqueeze(1), mean + std * latent_noise, latent)
        mixture = self.vae.decode(latent)
        return torch.where(
            known == 1, canvas, mixture.quantize(mixture.sample_by_inversion(pixel_noise))
        ), latent


class InpaintReadout(_Part):
    """The canvas, or the expected values of its missing pixels given the latent."""

    def forward(self, canvas: Tensor, latent: Tensor, known: Tensor, pixels: Tensor) -> Tensor:
        mixture = self.vae.decode(latent)
        kept = (known == 1) | _per_row(pixels == 1, canvas)
        return torch.where(kept, canvas, mixture.quantize(mixture.mean()))


class Reconstruct(_Part):
    """image -> its latent, or a draw of it -> expected pixels."""

    def forward(self, image: Tensor, latent: Tensor, latent_noise: Tensor) -> Tensor:
        mean, std = self.vae.encode(image)
        drawn = (latent == 1).unsqueeze(1)
        pixels = self.vae.decode(torch.where(drawn, mean + std * latent_noise, mean))
        return pixels.quantize(pixels.mean())


class ScoreInit(_Part):
    """image -> its latent's distribution, and empty sums."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std = self.vae.encode(image)
        return mean, std, *importance_weighting.empty_sums(mean[:, 0])


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
        sums = importance_weighting.add_log_weights(
            (log_sum, log_sum_of_squares), log_weights, draws, step_index
        )
        return mean, std, *sums


def _rendered(mixture: PixelMixture, pixels: Tensor, noise: Tensor) -> Tensor:
    drawn = _per_row(pixels == 1, noise)
    return mixture.quantize(torch.where(drawn, mixture.sample_by_inversion(noise), mixture.mean()))


def _per_row(flags: Tensor, like: Tensor) -> Tensor:
    return flags.reshape(-1, *(1 for _ in like.shape[1:]))


class Family:
    """The variational autoencoder as the exporter sees it."""

    name = "vae"
    description = (
        "Variational autoencoder (Kingma & Welling 2013), trained on the bound of Burda et al. (2015)."
    )
    operations = ("sample", "sample:inpaint", "reconstruct", "encode", "decode", "score")
    unsupported_operations: Mapping[str, str] = {
        "energy": "its log-density is an integral without a closed form; score bounds it",
        "classify": "it has learned no labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(width=384, depth=2, dropout=0.1, training=Settings(steps=1300)),
        "medium": Preset(
            width=512,
            depth=2,
            training=Settings(steps=5000, learning_rate=1e-3),
        ),
        "full": Preset(
            width=1024,
            depth=3,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=128, learning_rate=1e-3),
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> VAE:
        """An untrained autoencoder with LATENT_DIMENSIONS latents."""
        return VAE(data.spec.tensor.shape, data.spec.num_levels, LATENT_DIMENSIONS, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, and by inpainting; reconstruct, encode, decode and score."""
        assert isinstance(network, VAE)
        image = data.spec.tensor
        return (
            _sample(network, image),
            _inpaint(network, image),
            _reconstruct(network, image),
            _encode(network, image),
            _decode(network, image),
            _score(network, image, f"integers 0..{network.levels - 1}"),
        )

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Requests with and without parameters, on the first rows of the test part."""
        images = data.test.rows[:3]
        latents = torch.linspace(-2, 2, 3 * LATENT_DIMENSIONS).reshape(3, -1).numpy()
        given = {"image": images, "known": first_half_mask(images)}
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"temperature": 0.7, "pixels": 0}),
            Example("sample:inpaint", seed=6, parameters={"steps": 3}, inputs=given),
            Example("sample:inpaint", seed=7, parameters={"steps": 4, "chain": 0, "pixels": 0}, inputs=given),
            Example("reconstruct", inputs={"image": images}),
            Example("reconstruct", seed=3, parameters={"latent": 1}, inputs={"image": images}),
            Example("encode", inputs={"image": images}),
            Example("decode", inputs={"latent": latents}),
            Example("decode", seed=8, parameters={"pixels": 1}, inputs={"latent": latents}),
            Example("score", seed=4, parameters={"draws": 25}, inputs={"image": images}),
            Example("score", seed=5, first_row=2, rows=2, inputs={"image": images[:2]}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Bits per dimension of the bound, and how samples compare with test rows."""
        images = data.test.rows[: preset.evaluation_rows]
        judge = SampleEvaluator.train(data, preset.evaluator)
        return [
            *(_bits_per_dimension(interpreter, images, draws) for draws in (MEASURED_DRAWS, 1)),
            *judge.similarity(sampler(interpreter), preset.evaluation_rows),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> list[Panel]:
        """Test rows, their reconstructions, and samples."""
        real, sample, reconstruct = (
            data.test.rows[:PICTURED],
            interpreter.program("sample"),
            interpreter.program("reconstruct"),
        )
        seen = make_rows(reconstruct, 0, range(len(real)), inputs={"image": real})
        return [
            Panel("test images", real),
            Panel("their reconstructions", interpreter.run("reconstruct", seen)["image"]),
            Panel("samples", interpreter.run("sample", make_rows(sample, 0, range(PICTURED)))["image"]),
        ]


def _bits_per_dimension(
    interpreter: Interpreter, images: NDArray[np.uint8], draws: int
) -> manifest_pb2.Quality:
    rows = make_rows(interpreter.program("score"), 0, range(len(images)), {"draws": draws}, {"image": images})
    answers = play(interpreter, "score", rows, f"bound with {draws} draws")
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
            _pixels("draw"),
        ),
        noise=(_latent_noise(0, "latent"), _pixel_noise(1, image)),
    )


def _pixels(default: str) -> Parameter:
    doc = "mean: their expected values; draw: draw them, as the model says"
    return Parameter.choice("pixels", ("mean", "draw"), doc, default)


def _pixel_noise(stream: int, image: TensorSpec, name: str = "pixel_noise") -> Noise:
    return Noise(name, "uniform", image.shape, stream, "one number for every pixel, by inversion")


def _inpaint(vae: VAE, image: TensorSpec) -> Program:
    known_doc = "1 for pixels that are given and stay as they are, 0 for those to draw"
    given = TensorSpec("image", image.dtype, image.shape, image.minimum, image.maximum, "the given pixels")
    return Program(
        operation="sample",
        variant="inpaint",
        init=InpaintInit(vae),
        step=InpaintStep(vae),
        readout=InpaintReadout(vae),
        outputs=(image,),
        doc="Draw the missing pixels given the known ones, by a chain that encodes and decodes: approximate.",
        state=(
            TensorSpec("canvas", image.dtype, image.shape, doc="the pixels that are known or drawn"),
            TensorSpec("latent", shape=(LATENT_DIMENSIONS,), doc="the latent of the missing pixels"),
        ),
        steps=Steps(parameter="steps"),
        parameters=(
            Parameter("steps", "integer", 100, 1, 1000, doc="how often the image is encoded and decoded"),
            Parameter.choice(
                "chain",
                CHAINS,
                "pseudo_gibbs takes the encoder's word for the posterior; metropolis_within_gibbs, in the "
                "second half of its steps, accepts or keeps latents so that the chain tends to the model's "
                "own conditional",
                "metropolis_within_gibbs",
            ),
            _pixels("draw"),
        ),
        inputs=(Input(given), Input(TensorSpec("known", "uint8", image.shape, 0, 1, known_doc))),
        noise=(
            _latent_noise(0, "start_latent"),
            _pixel_noise(1, image, "start_noise"),
            _latent_noise(2, "latent_noise"),
            _pixel_noise(3, image),
            Noise("acceptance", "uniform", (), 4, "accepts a latent, or keeps the one before"),
        ),
        previewable=True,
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
        doc="The pixels of a latent: their expected values, or a draw.",
        parameters=(_pixels("mean"),),
        inputs=(
            Input(TensorSpec("latent", shape=(LATENT_DIMENSIONS,), doc="standard normal under the prior")),
        ),
        noise=(_pixel_noise(0, image),),
    )


def _score(vae: VAE, image: TensorSpec, space: str) -> Program:
    return Program(
        operation="score",
        init=ScoreInit(vae),
        step=ScoreStep(vae),
        readout=importance_weighting.ImportanceBound(),
        outputs=(
            TensorSpec(
                "log_likelihood", doc="importance-weighted bound on the log-mass of the image, in nats"
            ),
            importance_weighting.STANDARD_ERROR,
        ),
        doc="Importance-weighted lower bound on the log-mass of an image; tighter with more draws.",
        state=(
            *_posterior("of the latent given the image"),
            *importance_weighting.STATE,
        ),
        steps=importance_weighting.STEPS,
        parameters=(importance_weighting.draws_parameter("importance draws per image"),),
        inputs=(Input(image),),
        noise=(_latent_noise(0, "latent_noise", importance_weighting.DRAWS_PER_STEP),),
        score=Score("lower_bound", vae.dimensions, space, "log_likelihood", "standard_error", "draws"),
    )


FAMILY = Family()
