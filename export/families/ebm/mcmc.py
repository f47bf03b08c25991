"""Samples: chains of Langevin steps, with and without Metropolis' correction, free or around known parts.

Roberts & Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations"
(1996). Images are walked with noise on them; from there the expected clean image is one step down the
gradient, x - SMOOTHING^2 grad E(x) (Saremi & Hyvarinen, "Neural empirical Bayes", 2019: walk and jump).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from export.families.ebm.energy import EnergyModel, Part
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Steps, TensorSpec
from export.probability import langevin
from export.probability.langevin import ChainState, EnergyFunction

STARTS = ("noise", "given")
GIVEN = STARTS.index("given")
IMAGE_STEPS, POINT_STEPS, MAX_STEPS = 300, 1000, 10_000


class _Start(Part):
    """Where a chain begins: at a draw of the base or at the given row, always at its known coordinates."""

    def begin(
        self, given: Tensor, known: Tensor, start: Tensor, noises: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        component, factor, rest = noises
        clean, fixed = self.model.coordinates(given), known.flatten(1) == 1
        from_given = fixed | (start == GIVEN).unsqueeze(1)
        x = torch.where(
            from_given,
            clean + self.model.smoothing * rest,
            self.model.base.transform(component, factor, rest),
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

    def __init__(self, landscape: EnergyFunction) -> None:
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
        place, moved = langevin.adjust(ChainState(x, energy, gradient), there, step_size, acceptance_noise)
        return *place, accepted + moved.to(accepted.dtype), clean


class UnadjustedStep(nn.Module):
    """A Langevin step that is always taken, within the coordinates that are not known."""

    def __init__(self, landscape: EnergyFunction) -> None:
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


def _place(landscape: EnergyFunction, x: Tensor, known: Tensor) -> ChainState:
    energy, gradient = landscape.energy(x)
    return ChainState(x, energy, _free(gradient, known))


class UnadjustedReadout(Part):
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


def programs(model: EnergyModel, value: DataSpec) -> tuple[Program, Program]:
    """sample by MALA, and by unadjusted Langevin steps."""
    start = StartPoint(model) if value.kind == "vector" else StartImage(model)
    return _adjusted(model, value, start), _unadjusted(model, value, start)


def _adjusted(model: EnergyModel, value: DataSpec, start: _Start) -> Program:
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


def _unadjusted(model: EnergyModel, value: DataSpec, start: _Start) -> Program:
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
        variant="langevin",
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
        TensorSpec("x", shape=whole, doc=f"where the chain is: {model.space}"),
        TensorSpec("energy", doc="its energy there, in nats"),
        TensorSpec("gradient", shape=whole, doc="the energy's gradient there, 0 along known coordinates"),
        TensorSpec("accepted", doc="number of steps on which it moved"),
        TensorSpec("clean", shape=whole, doc="the given row, in the chain's scale"),
    )


def _chain_parameters(model: EnergyModel) -> tuple[Parameter, ...]:
    steps = IMAGE_STEPS if model.smoothing else POINT_STEPS
    largest = 2 * model.smoothing**2 if model.smoothing else 0.1
    unit = "pixels scaled to -1..1" if model.smoothing else "coordinates"
    return (
        Parameter("steps", "integer", steps, 1, MAX_STEPS, doc="evaluations of the energy and its gradient"),
        Parameter(
            "step_size", "float", model.step_size, 1e-6, largest,
            doc=f"eta, in squared {unit}: the noise of a step has variance 2 eta",
        ),
        Parameter.choice(
            "start", STARTS, "noise: at a draw of the base density; given: at the given row"
        ),
    )  # fmt: skip


def _given(value: DataSpec) -> tuple[Input, Input]:
    tensor = value.tensor
    doc = "where the chain starts, when start is given; what stays, where known is 1; otherwise unused"
    known_doc = "1 for what is given and stays as it is, while the chain moves the rest, given that"
    return (
        Input(
            replace(tensor, doc=doc),
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
