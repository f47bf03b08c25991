"""The programs of the VAE: sample, sample:inpaint, reconstruct, encode, decode and score."""

import torch
from torch import Tensor, nn

from export.families.vae.network import LATENT_DIMENSIONS, VAE
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability import importance_weighting
from export.probability.discretized_logistic import PixelMixture

CHAINS = ("pseudo_gibbs", "metropolis_within_gibbs")
PIXELS = ("mean", "draw")
LATENTS = ("mean", "draw")
_DRAW = 1


def build_programs(vae: VAE, data_spec: DataSpec) -> tuple[Program, ...]:
    """Return the programs in the order of the family's operations."""
    image = data_spec.tensor
    return (
        _sample(vae, image),
        _inpaint(vae, image),
        _reconstruct(vae, image),
        _encode(vae, image),
        _decode(vae, image),
        _score(vae, image),
    )


class _VAEModule(nn.Module):
    """Base of the program modules that use the trained network."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae


class Sample(_VAEModule):
    """Latent of the prior -> image of expected or drawn pixels."""

    def forward(self, latent: Tensor, temperature: Tensor, pixels: Tensor, pixel_noise: Tensor) -> Tensor:
        return _render(self.vae.decode(latent * temperature.unsqueeze(1)), pixels, pixel_noise)


class InpaintInit(_VAEModule):
    """First state of a chain: the known pixels, a sample for the missing ones, and the sample's latent."""

    def forward(
        self, image: Tensor, known: Tensor, start_latent: Tensor, start_noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        mixture = self.vae.decode(start_latent)
        start = mixture.quantize(mixture.sample_by_inversion(start_noise))
        return torch.where(known == 1, image, start), start_latent


class InpaintStep(_VAEModule):
    """One step of a chain: draw the latent given all pixels, then the missing pixels given the latent.

    metropolis_within_gibbs proposes z' ~ q(z | x) and accepts it with probability

        min(1, [p(x, z') q(z | x)] / [p(x, z) q(z' | x)]).

    pseudo_gibbs always accepts.
    """

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
        # The first half of every chain is pseudo-Gibbs, which leaves an improbable start sooner.
        is_gibbs = (chain == 0) | (2 * step_index < num_steps)
        is_accepted = is_gibbs | (acceptance.log() < log_weights[:, 1] - log_weights[:, 0])
        latent = torch.where(is_accepted.unsqueeze(1), mean + std * latent_noise, latent)
        mixture = self.vae.decode(latent)
        drawn = mixture.quantize(mixture.sample_by_inversion(pixel_noise))
        return torch.where(known == 1, canvas, drawn), latent


class InpaintReadout(_VAEModule):
    """State -> image whose missing pixels are drawn, or expected values given the latent."""

    def forward(self, canvas: Tensor, latent: Tensor, known: Tensor, pixels: Tensor) -> Tensor:
        mixture = self.vae.decode(latent)
        is_kept = (known == 1) | _broadcast(pixels == _DRAW, canvas)
        return torch.where(is_kept, canvas, mixture.quantize(mixture.mean()))


class Reconstruct(_VAEModule):
    """Image -> expected pixels given the mean of its latent, or given a draw."""

    def forward(self, image: Tensor, latent: Tensor, latent_noise: Tensor) -> Tensor:
        mean, std = self.vae.encode(image)
        is_drawn = (latent == _DRAW).unsqueeze(1)
        mixture = self.vae.decode(torch.where(is_drawn, mean + std * latent_noise, mean))
        return mixture.quantize(mixture.mean())


class Encode(_VAEModule):
    """Image -> mean and standard deviation of its latent."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.vae.encode(image)


class Decode(_VAEModule):
    """Latent -> image of expected or drawn pixels."""

    def forward(self, latent: Tensor, pixels: Tensor, pixel_noise: Tensor) -> Tensor:
        return _render(self.vae.decode(latent), pixels, pixel_noise)


class ScoreInit(_VAEModule):
    """Image -> mean and standard deviation of its latent, and empty sums of weights."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, std = self.vae.encode(image)
        return mean, std, *importance_weighting.empty_sums(mean[:, 0])


class ScoreStep(_VAEModule):
    """Add the weights of DRAWS_PER_STEP draws of the latent to the sums."""

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


def _render(mixture: PixelMixture, pixels: Tensor, noise: Tensor) -> Tensor:
    is_drawn = _broadcast(pixels == _DRAW, noise)
    return mixture.quantize(torch.where(is_drawn, mixture.sample_by_inversion(noise), mixture.mean()))


def _broadcast(flags: Tensor, like: Tensor) -> Tensor:
    """Return flags [B] as [B, 1, ...], with as many axes as `like`."""
    return flags.reshape(-1, *(1 for _ in like.shape[1:]))


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


def _inpaint(vae: VAE, image: TensorSpec) -> Program:
    known_doc = "1 for pixels to keep, 0 for pixels to draw"
    given = TensorSpec("image", image.dtype, image.shape, image.minimum, image.maximum, "the known pixels")
    return Program(
        operation="sample",
        variant="inpaint",
        init=InpaintInit(vae),
        step=InpaintStep(vae),
        readout=InpaintReadout(vae),
        outputs=(image,),
        doc="Draw the missing pixels given the known ones, by a Markov chain. The result is approximate.",
        state=(
            TensorSpec("canvas", image.dtype, image.shape, doc="known and drawn pixels"),
            TensorSpec("latent", shape=(LATENT_DIMENSIONS,), doc="latent from which the pixels were drawn"),
        ),
        steps=Steps(parameter="steps"),
        parameters=(
            Parameter("steps", "integer", 100, 1, 1000, doc="length of the chain"),
            Parameter.choice(
                "chain",
                CHAINS,
                "pseudo_gibbs uses the encoder's distribution as if it were the exact posterior. "
                "metropolis_within_gibbs corrects it: the second half of the steps accepts or rejects each "
                "latent, so the chain converges to the model's conditional distribution",
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
            Noise("acceptance", "uniform", (), 4, "accepts or rejects the new latent"),
        ),
        previewable=True,
    )


def _reconstruct(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=Reconstruct(vae),
        outputs=(image,),
        doc="Encode an image, and decode its latent to the expected pixel values.",
        parameters=(
            Parameter.choice("latent", LATENTS, "use the mean of the encoder's distribution, or a draw"),
        ),
        inputs=(Input(image),),
        noise=(_latent_noise(0, "latent_noise"),),
    )


def _encode(vae: VAE, image: TensorSpec) -> Program:
    return Program(
        operation="encode",
        readout=Encode(vae),
        outputs=_posterior(),
        doc="Return the encoder's normal distribution over latents.",
        inputs=(Input(image),),
    )


def _decode(vae: VAE, image: TensorSpec) -> Program:
    latent = TensorSpec("latent", shape=(LATENT_DIMENSIONS,), doc="standard normal under the prior")
    return Program(
        operation="decode",
        readout=Decode(vae),
        outputs=(image,),
        doc="Decode a latent to the expected pixel values, or to a draw.",
        parameters=(_pixels("mean"),),
        inputs=(Input(latent),),
        noise=(_pixel_noise(0, image),),
    )


def _score(vae: VAE, image: TensorSpec) -> Program:
    space = f"integers 0..{vae.num_levels - 1}"
    doc = "importance-weighted bound on the log-mass of the image, in nats"
    return Program(
        operation="score",
        init=ScoreInit(vae),
        step=ScoreStep(vae),
        readout=importance_weighting.ImportanceBound(),
        outputs=(TensorSpec("log_likelihood", doc=doc), importance_weighting.STANDARD_ERROR),
        doc="Importance-weighted lower bound on the log-mass of an image. More draws give a tighter bound.",
        state=(*_posterior(), *importance_weighting.STATE),
        steps=importance_weighting.STEPS,
        parameters=(importance_weighting.draws_parameter("number of importance draws for each image"),),
        inputs=(Input(image),),
        noise=(_latent_noise(0, "latent_noise", importance_weighting.DRAWS_PER_STEP),),
        score=Score("lower_bound", vae.dimensions, space, "log_likelihood", "standard_error", "draws"),
    )


def _posterior() -> tuple[TensorSpec, TensorSpec]:
    shape = (LATENT_DIMENSIONS,)
    return (
        TensorSpec("mean", shape=shape, doc="mean of the latent given the image"),
        TensorSpec("std", shape=shape, minimum=0, doc="standard deviation of the latent given the image"),
    )


def _pixels(default: str) -> Parameter:
    doc = "mean: expected values of the pixels; draw: a draw from the model's distribution"
    return Parameter.choice("pixels", PIXELS, doc, default)


def _latent_noise(stream: int, name: str, *shape: int) -> Noise:
    return Noise(name, "normal", (*shape, LATENT_DIMENSIONS), stream, "standard normal")


def _pixel_noise(stream: int, image: TensorSpec, name: str = "pixel_noise") -> Noise:
    return Noise(name, "uniform", image.shape, stream, "one number for each pixel, drawn by inversion")
