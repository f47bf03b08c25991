"""Latent programs: encode, decode and reconstruct, by the deterministic probability-flow ODE.

Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2020), section 5.4: the ODE maps each row to one
point at SIGMA_MAX, and back. That point divided by SIGMA_MAX is the latent. Over rows it is nearly standard
normal, and sample starts from it as noise. The solver takes discrete steps, so a round trip is not exact.
"""

import torch
from torch import Tensor, nn

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.parameters import (
    known_label_input,
    row_input,
    sampler_parameter,
    steps_parameter,
)
from export.families.diffusion.sampling_graphs import SampleReadout
from export.families.diffusion.solvers import (
    SIGMA_MAX,
    build_update,
    denoising_interval,
    encoding_interval,
)
from export.graphs.program import DataSpec, Input, Program, Steps, TensorSpec

DEFAULT_STEPS = 40


class _OdeEncode(nn.Module):
    """Initial state: a row at SIGMA_MIN.

    With `num_legs` = 1 all steps encode. With 2, half of the steps encode and the other half decode.
    """

    def __init__(self, denoiser: Denoiser, num_legs: int) -> None:
        super().__init__()
        self.scale, self.num_legs = denoiser.scale, num_legs

    def initial_state(self, row: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        x = self.scale(row)
        return x.clone(), torch.zeros_like(x), x.clone(), num_steps // self.num_legs


class EncodeImageInit(_OdeEncode):
    """Image -> initial state."""

    def forward(self, image: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(image, num_steps)


class EncodePointInit(_OdeEncode):
    """Point -> initial state."""

    def forward(self, point: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        return self.initial_state(point, num_steps)


class DecodeInit(nn.Module):
    """Latent -> initial state in which all steps decode."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.shape = denoiser.shape

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        x = SIGMA_MAX * latent.reshape(-1, *self.shape)
        zeros = torch.zeros_like(x)
        return x, zeros, zeros.clone(), torch.zeros_like(latent[:, 0]).long()


class OdeStep(nn.Module):
    """One network evaluation: up the noise levels in the encoding steps, down in the others."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        num_encoding_steps: Tensor,
        label: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
    ) -> tuple[Tensor, ...]:
        up = encoding_interval(step_index, num_encoding_steps, sampler)
        ones = torch.ones_like(up.current)
        down = denoising_interval(
            step_index - num_encoding_steps, num_steps - num_encoding_steps, sampler, ones
        )
        interval = up.where(step_index < num_encoding_steps, down)
        update = build_update(interval, sampler, torch.zeros_like(ones))
        denoised = self.denoiser(x, update.sigma, label)
        return *update.apply(x, memory, denoised, torch.zeros_like(x)), denoised, num_encoding_steps


class LatentReadout(nn.Module):
    """Row at SIGMA_MAX -> latent."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / SIGMA_MAX


def build_programs(denoiser: Denoiser, data_spec: DataSpec, readout: SampleReadout) -> tuple[Program, ...]:
    """Return encode, decode and reconstruct."""
    init, step = EncodeImageInit if data_spec.num_levels else EncodePointInit, OdeStep(denoiser)
    return (
        _encode(denoiser, data_spec, init(denoiser, 1), step),
        _decode(denoiser, data_spec, step, readout),
        _reconstruct(data_spec, init(denoiser, 2), step, readout),
    )


def _latent(denoiser: Denoiser) -> TensorSpec:
    return TensorSpec(
        "latent", shape=(denoiser.dimensions,), doc="latent; nearly standard normal under the model"
    )


def _state(data_spec: DataSpec) -> tuple[TensorSpec, ...]:
    shape = data_spec.tensor.shape
    return (
        TensorSpec("x", shape=shape, doc="row at the current noise level"),
        TensorSpec("memory", shape=shape, doc="values that the sampler carries from one step to the next"),
        TensorSpec("denoised", shape=shape, doc="expected clean row"),
        TensorSpec(
            "num_encoding_steps", "int64", doc="number of steps up the noise levels, before those down"
        ),
    )


def _encode(
    denoiser: Denoiser, data_spec: DataSpec, init: EncodeImageInit | EncodePointInit, step: OdeStep
) -> Program:
    return Program(
        operation="encode",
        init=init,
        step=step,
        readout=LatentReadout(),
        outputs=(_latent(denoiser),),
        doc="Compute the latent of a row by the deterministic ODE.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(
                DEFAULT_STEPS, "heun takes two for each noise level; if odd, the first is an Euler step"
            ),
            sampler_parameter("heun"),
        ),
        inputs=(row_input(data_spec, "row to encode"), known_label_input(data_spec)),
    )


def _decode(denoiser: Denoiser, data_spec: DataSpec, step: OdeStep, readout: SampleReadout) -> Program:
    return Program(
        operation="decode",
        init=DecodeInit(denoiser),
        step=step,
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Compute the row of a latent by the deterministic ODE.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(
                DEFAULT_STEPS,
                "heun takes two for each noise level but one for the last; if even, the first is "
                "an Euler step",
            ),
            sampler_parameter("heun"),
        ),
        inputs=(Input(_latent(denoiser)), known_label_input(data_spec)),
        previewable=True,
    )


def _reconstruct(
    data_spec: DataSpec, init: EncodeImageInit | EncodePointInit, step: OdeStep, readout: SampleReadout
) -> Program:
    return Program(
        operation="reconstruct",
        init=init,
        step=step,
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Encode a row and decode its latent. The output differs from the input by the solver's error.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(2 * DEFAULT_STEPS, "half of them encode, the other half decode", minimum=2),
            sampler_parameter("heun"),
        ),
        inputs=(row_input(data_spec, "row to reconstruct"), known_label_input(data_spec)),
    )
