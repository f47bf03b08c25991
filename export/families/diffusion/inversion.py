"""Latents: a row's place at the upper end of the noise scale, by the deterministic walk there and back.

Song, Meng & Ermon, "Denoising Diffusion Implicit Models" (2020), section 5.4: the probability-flow ODE
takes every row to one place at SIGMA_MAX, which divided by it is nearly standard normal over rows, and
back. A latent is what sample begins with as noise. Walks are discrete, so they come back only nearly.
"""

import torch
from torch import Tensor, nn

from export.families.diffusion import solvers as samplers
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling import Readout, given, open_label, sampler_parameter, steps_parameter
from export.families.diffusion.solvers import SIGMA_MAX, tick
from export.graphs.program import DataSpec, Input, Program, Steps, TensorSpec

DEFAULT_STEPS = 40


class _OdeEncode(nn.Module):
    """A row at the lower end of the noise scale, about to go up, and down again if there are two legs."""

    def __init__(self, denoiser: Denoiser, legs: int) -> None:
        super().__init__()
        self.scale, self.legs = denoiser.scale, legs

    def begin(self, row: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        x = self.scale(row)
        return x.clone(), torch.zeros_like(x), x.clone(), num_steps // self.legs


class RiseOfImage(_OdeEncode):
    """image -> a walk's first state."""

    def forward(self, image: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        return self.begin(image, num_steps)


class RiseOfPoint(_OdeEncode):
    """point -> a walk's first state."""

    def forward(self, point: Tensor, num_steps: Tensor) -> tuple[Tensor, ...]:
        return self.begin(point, num_steps)


class Descent(nn.Module):
    """latent -> the first state of a walk that only goes down."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.shape = denoiser.shape

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        x = SIGMA_MAX * latent.reshape(-1, *self.shape)
        nothing = torch.zeros_like(x)
        return x, nothing, nothing.clone(), torch.zeros_like(latent[:, 0]).long()


class Step(nn.Module):
    """One evaluation of the network, upwards before the turn and downwards after it."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        turn: Tensor,
        label: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
    ) -> tuple[Tensor, ...]:
        up = samplers.ascent(step_index, turn, sampler)
        level = torch.ones_like(up.now)
        down = samplers.descent(step_index - turn, num_steps - turn, sampler, level)
        now = tick(up.where(step_index < turn, down), sampler, torch.zeros_like(level))
        denoised = self.denoiser(x, now.sigma, label)
        return *now.move(x, memory, denoised, torch.zeros_like(x)), denoised, turn


class Latent(nn.Module):
    """The end of a walk up -> its latent."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) / SIGMA_MAX


def programs(denoiser: Denoiser, value: DataSpec, readout: Readout) -> tuple[Program, ...]:
    """encode, decode and reconstruct."""
    rise, step = RiseOfImage if value.num_levels else RiseOfPoint, Step(denoiser)
    return (
        _encode(denoiser, value, rise(denoiser, 1), step),
        _decode(denoiser, value, step, readout),
        _reconstruct(value, rise(denoiser, 2), step, readout),
    )


def _latent(denoiser: Denoiser) -> TensorSpec:
    return TensorSpec("latent", shape=(denoiser.dimensions,), doc="nearly standard normal under the model")


def _state(value: DataSpec) -> tuple[TensorSpec, ...]:
    shape = value.tensor.shape
    return (
        TensorSpec("x", shape=shape, doc="the row on its way"),
        TensorSpec("memory", shape=shape, doc="what the sampler keeps from its last step"),
        TensorSpec("denoised", shape=shape, doc="the expected clean row"),
        TensorSpec("turn", "int64", doc="the step from which the walk goes down"),
    )


def _encode(denoiser: Denoiser, value: DataSpec, init: RiseOfImage | RiseOfPoint, step: Step) -> Program:
    return Program(
        operation="encode",
        init=init,
        step=step,
        readout=Latent(),
        outputs=(_latent(denoiser),),
        doc="Walk from a row up to its latent, without chance.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(DEFAULT_STEPS, "heun: two a level, an odd number begins by Euler"),
            sampler_parameter("heun"),
        ),
        inputs=(Input(given(value, "the row")), open_label(value)),
    )


def _decode(denoiser: Denoiser, value: DataSpec, step: Step, readout: Readout) -> Program:
    return Program(
        operation="decode",
        init=Descent(denoiser),
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Walk from a latent down to its row, without chance.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(
                DEFAULT_STEPS, "heun: two a level, one at the last, an even number begins by Euler"
            ),
            sampler_parameter("heun"),
        ),
        inputs=(Input(_latent(denoiser)), open_label(value)),
        previewable=True,
    )


def _reconstruct(value: DataSpec, init: RiseOfImage | RiseOfPoint, step: Step, readout: Readout) -> Program:
    return Program(
        operation="reconstruct",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Walk from a row up to its latent and back down, which gives it back but for the walks' errors.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(2 * DEFAULT_STEPS, "half of them up, the other half down", minimum=2),
            sampler_parameter("heun"),
        ),
        inputs=(Input(given(value, "the row")), open_label(value)),
    )
