"""The programs of RealNVP: sample, reconstruct, encode, decode and score."""

import torch
from torch import Tensor, nn

from export.families.realnvp.network import RealNVP
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, TensorSpec
from export.probability import importance_weighting

DEQUANTIZATIONS = ("middle", "draw")
DRAW = DEQUANTIZATIONS.index("draw")


def build_programs(flow: RealNVP, data_spec: DataSpec) -> tuple[Program, ...]:
    """Return sample, reconstruct, encode, decode and score, for points or for images."""
    is_point = data_spec.kind == "vector"
    return (
        _sample(flow, data_spec.tensor),
        _reconstruct_point(flow, data_spec) if is_point else _reconstruct_image(flow, data_spec),
        _encode_point(flow, data_spec) if is_point else _encode_image(flow, data_spec),
        _decode(flow, data_spec.tensor),
        _score_point(flow, data_spec) if is_point else _score_image(flow, data_spec),
    )


class _FlowModule(nn.Module):
    """Base of the program modules that use the trained flow."""

    def __init__(self, flow: RealNVP) -> None:
        super().__init__()
        self.flow = flow


class Sample(_FlowModule):
    """Base noise and a temperature -> row."""

    def forward(self, latent: Tensor, temperature: Tensor) -> Tensor:
        return self.flow.to_rows(self.flow.decode(latent * temperature.unsqueeze(1)))


class Decode(_FlowModule):
    """Latent -> row."""

    def forward(self, latent: Tensor) -> Tensor:
        return self.flow.to_rows(self.flow.decode(latent))


class EncodePoint(_FlowModule):
    """Point -> latent."""

    def forward(self, point: Tensor) -> Tensor:
        return self.flow.encode(point)[0]


class EncodeImage(_FlowModule):
    """Image -> latent of the center of its unit cube, or of a uniform draw from it."""

    def forward(self, image: Tensor, dequantization: Tensor, pixel_noise: Tensor) -> Tensor:
        is_drawn = (dequantization == DRAW).unsqueeze(1)
        offset = torch.where(is_drawn, pixel_noise.flatten(1), torch.full_like(pixel_noise, 0.5).flatten(1))
        return self.flow.encode(image.flatten(1).to(torch.float32) + offset)[0]


class ReconstructPoint(_FlowModule):
    """Point -> point after encode and decode, and the largest absolute error of its coordinates."""

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        decoded = self.flow.decode(self.flow.encode(point)[0])
        return self.flow.to_rows(decoded), (decoded - point).abs().amax(1)


class ReconstructImage(_FlowModule):
    """Image -> image after encode and decode of its pixel midpoints, and the largest absolute error.

    The error is divided by the number of levels: it is rounding error, which is relative to numbers of that
    size.
    """

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        midpoints = image.flatten(1).to(torch.float32) + 0.5
        decoded = self.flow.decode(self.flow.encode(midpoints)[0])
        return self.flow.to_rows(decoded), (decoded - midpoints).abs().amax(1) / self.flow.num_levels


class ScorePoint(_FlowModule):
    """Point -> exact log-density."""

    def forward(self, point: Tensor) -> Tensor:
        return self.flow.log_density(point)


class ScoreImageInit(nn.Module):
    """Image -> empty sums over the draws."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        return importance_weighting.empty_sums(image.flatten(1)[:, 0].to(torch.float32))


class ScoreImageStep(_FlowModule):
    """Addition of the densities at DRAWS_PER_STEP uniform draws from the image's unit cube."""

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
        return importance_weighting.add_log_weights(
            (log_sum, log_sum_of_squares), log_weights, draws, step_index
        )


def _latent(flow: RealNVP) -> TensorSpec:
    return TensorSpec("latent", shape=(flow.dimensions,), doc="latent; standard normal under the model")


def _sample(flow: RealNVP, tensor: TensorSpec) -> Program:
    return Program(
        operation="sample",
        readout=Sample(flow),
        outputs=(tensor,),
        doc="Draw latents from the standard normal distribution and decode them.",
        parameters=(
            Parameter(
                "temperature",
                "float",
                1,
                0,
                2,
                doc="standard deviation of the latents; 1 samples from the model",
            ),
        ),
        noise=(Noise("latent", "normal", (flow.dimensions,), 0, "standard normal latent"),),
    )


def _decode(flow: RealNVP, tensor: TensorSpec) -> Program:
    return Program(
        operation="decode",
        readout=Decode(flow),
        outputs=(tensor,),
        doc="Decode a latent: the inverse of encode.",
        inputs=(Input(_latent(flow)),),
    )


def _reconstruct_point(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=ReconstructPoint(flow),
        outputs=(
            data_spec.tensor,
            _largest_error("largest absolute difference between a coordinate of the input and the output"),
        ),
        doc="Encode a point and decode its latent. The output equals the input up to rounding.",
        inputs=(Input(data_spec.tensor),),
    )


def _reconstruct_image(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="reconstruct",
        readout=ReconstructImage(flow),
        outputs=(
            data_spec.tensor,
            _largest_error(
                "largest absolute difference between a decoded pixel and its midpoint, as a fraction of the "
                "number of levels"
            ),
        ),
        doc="Encode the midpoints of an image's pixels and decode the latent. The output equals the input.",
        inputs=(Input(data_spec.tensor),),
    )


def _largest_error(doc: str) -> TensorSpec:
    return TensorSpec("largest_error", minimum=0, doc=doc)


def _encode_point(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="encode",
        readout=EncodePoint(flow),
        outputs=(_latent(flow),),
        doc="Return the latent of a point. Each point has exactly one.",
        inputs=(Input(data_spec.tensor),),
    )


def _encode_image(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="encode",
        readout=EncodeImage(flow),
        outputs=(_latent(flow),),
        doc="Return a latent of an image, with each integer i replaced by a number between i and i + 1.",
        parameters=(
            Parameter.choice(
                "dequantization",
                DEQUANTIZATIONS,
                "middle: i + 1/2; draw: a uniform number between i and i + 1, chosen by the seed",
            ),
        ),
        inputs=(Input(data_spec.tensor),),
        noise=(Noise("pixel_noise", "uniform", data_spec.tensor.shape, 0, "offset added to each pixel"),),
    )


def _score_point(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="score",
        readout=ScorePoint(flow),
        outputs=(TensorSpec("log_density", doc="log-density of the point, in nats"),),
        doc="Compute the exact log-density of a point.",
        inputs=(Input(data_spec.tensor),),
        score=Score("exact", flow.dimensions, data_spec.tensor.doc, "log_density"),
    )


def _score_image(flow: RealNVP, data_spec: DataSpec) -> Program:
    return Program(
        operation="score",
        init=ScoreImageInit(),
        step=ScoreImageStep(flow),
        readout=importance_weighting.ImportanceBound(),
        outputs=(
            TensorSpec(
                "log_likelihood",
                doc="dequantization lower bound on the log-probability of the image, in nats",
            ),
            importance_weighting.STANDARD_ERROR,
        ),
        doc="Compute a lower bound on the log-probability of an image, from the density at uniform draws in "
        "its unit cube. More draws make the bound tighter.",
        state=importance_weighting.STATE,
        steps=importance_weighting.STEPS,
        parameters=(importance_weighting.draws_parameter("draws from the unit cube of each image"),),
        inputs=(Input(data_spec.tensor),),
        noise=(
            Noise(
                "pixel_noise",
                "uniform",
                (importance_weighting.DRAWS_PER_STEP, *data_spec.tensor.shape),
                0,
                "offset of each draw, added to each pixel",
            ),
        ),
        score=Score(
            "lower_bound",
            flow.dimensions,
            f"integers 0..{flow.num_levels - 1}",
            "log_likelihood",
            "standard_error",
            "draws",
        ),
    )
