"""The sampling programs: Langevin chains with and without Metropolis-Hastings correction.

Roberts & Tweedie, "Exponential convergence of Langevin distributions and their discrete approximations"
(1996). Known coordinates stay fixed. Chains of images run on noisy images. The image is the expected clean
one, which is a gradient step away: x - SMOOTHING_STD^2 grad E(x) (Saremi & Hyvarinen, "Neural empirical
Bayes", 2019).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from export.families.ebm.energy import EnergyModel, ModelModule
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Steps, TensorSpec
from export.probability import langevin
from export.probability.langevin import ChainState, EnergyFunction

STARTS = ("noise", "given")
GIVEN = STARTS.index("given")
IMAGE_STEPS, POINT_STEPS, MAX_STEPS = 300, 1000, 10_000


class _ChainInit(ModelModule):
    """Initial state: a draw from the base or the given row. Known coordinates always come from the row."""

    def initial_state(
        self, row: Tensor, known: Tensor, start: Tensor, noise: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        component_noise, factor_noise, start_noise = noise
        clean, is_known = self.model.to_coordinates(row), known.flatten(1) == 1
        is_from_row = is_known | (start == GIVEN).unsqueeze(1)
        x = torch.where(
            is_from_row,
            clean + self.model.smoothing_std * start_noise,
            self.model.base.transform(component_noise, factor_noise, start_noise),
        )
        energy, gradient = self.model.energy(x)
        return x, energy, _zero_known(gradient, known), torch.zeros_like(energy), clean


class PointChainInit(_ChainInit):
    """Noise, or a point -> initial state."""

    def forward(
        self,
        point: Tensor,
        known: Tensor,
        start: Tensor,
        component_noise: Tensor,
        factor_noise: Tensor,
        start_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.initial_state(point, known, start, (component_noise, factor_noise, start_noise))


class ImageChainInit(_ChainInit):
    """Noise, or an image -> initial state."""

    def forward(
        self,
        image: Tensor,
        known: Tensor,
        start: Tensor,
        component_noise: Tensor,
        factor_noise: Tensor,
        start_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        return self.initial_state(image, known, start, (component_noise, factor_noise, start_noise))


def _zero_known(vector: Tensor, known: Tensor) -> Tensor:
    """Return a vector [B, D] with zeros at the known coordinates."""
    return torch.where(known.flatten(1) == 1, torch.zeros_like(vector), vector)


class MalaStep(nn.Module):
    """Metropolis-adjusted Langevin step of the unknown coordinates."""

    def __init__(self, energy_function: EnergyFunction) -> None:
        super().__init__()
        self.energy_function = energy_function

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        energy: Tensor,
        gradient: Tensor,
        num_accepted: Tensor,
        clean: Tensor,
        known: Tensor,
        step_size: Tensor,
        step_noise: Tensor,
        acceptance_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        current = ChainState(x, energy, gradient)
        proposed_x = langevin.propose(x, gradient, step_size, _zero_known(step_noise, known))
        proposal = _evaluate(self.energy_function, proposed_x, known)
        state, is_accepted = langevin.accept_or_reject(current, proposal, step_size, acceptance_noise)
        return *state, num_accepted + is_accepted.to(num_accepted.dtype), clean


class LangevinStep(nn.Module):
    """Unadjusted Langevin step of the unknown coordinates; it is always accepted."""

    def __init__(self, energy_function: EnergyFunction) -> None:
        super().__init__()
        self.energy_function = energy_function

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        gradient: Tensor,
        num_accepted: Tensor,
        clean: Tensor,
        known: Tensor,
        step_size: Tensor,
        noise_scale: Tensor,
        step_noise: Tensor,
    ) -> tuple[Tensor, ...]:
        noise = noise_scale.unsqueeze(1) * _zero_known(step_noise, known)
        next_x = langevin.propose(x, gradient, step_size, noise)
        return *_evaluate(self.energy_function, next_x, known), num_accepted + 1, clean


def _evaluate(energy_function: EnergyFunction, x: Tensor, known: Tensor) -> ChainState:
    energy, gradient = energy_function.energy(x)
    return ChainState(x, energy, _zero_known(gradient, known))


class LangevinReadout(ModelModule):
    """Chain state -> row and energy."""

    def forward(
        self, x: Tensor, energy: Tensor, gradient: Tensor, clean: Tensor, known: Tensor
    ) -> tuple[Tensor, Tensor]:
        expected = x - self.model.smoothing_std**2 * gradient
        return self.model.to_rows(torch.where(known.flatten(1) == 1, clean, expected)), energy


class MalaReadout(LangevinReadout):
    """Chain state -> row, energy and acceptance rate."""

    def forward(  # type: ignore[override]  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        energy: Tensor,
        gradient: Tensor,
        clean: Tensor,
        known: Tensor,
        num_accepted: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, ...]:
        row, row_energy = super().forward(x, energy, gradient, clean, known)
        return row, row_energy, num_accepted / step_index.clamp(min=1)


def build_programs(model: EnergyModel, data_spec: DataSpec) -> tuple[Program, Program]:
    """Return sample (MALA) and sample:langevin (unadjusted)."""
    init = PointChainInit(model) if data_spec.kind == "vector" else ImageChainInit(model)
    return _mala(model, data_spec, init), _langevin(model, data_spec, init)


def _mala(model: EnergyModel, data_spec: DataSpec, init: _ChainInit) -> Program:
    return Program(
        operation="sample",
        init=init,
        step=MalaStep(model),
        readout=MalaReadout(model),
        outputs=(
            data_spec.tensor,
            _energy_output(model),
            TensorSpec(
                "acceptance", minimum=0, maximum=1, doc="fraction of the proposals that were accepted"
            ),
        ),
        doc="Run a chain of Metropolis-adjusted Langevin steps, whose stationary density is exactly the "
        "model's. " + _readout_doc(model),
        state=_state(model),
        steps=Steps(parameter="steps"),
        parameters=_chain_parameters(model),
        inputs=_inputs(data_spec),
        noise=(
            *_chain_noise(model),
            Noise("acceptance_noise", "uniform", (), 4, "uniform number that accepts or rejects a proposal"),
        ),
        previewable=True,
    )


def _langevin(model: EnergyModel, data_spec: DataSpec, init: _ChainInit) -> Program:
    noise_scale = Parameter(
        "noise_scale",
        "float",
        1,
        0,
        2,
        doc="factor on the noise: 1 samples from the model, 0 is gradient descent on the energy",
    )
    return Program(
        operation="sample",
        variant="langevin",
        init=init,
        step=LangevinStep(model),
        readout=LangevinReadout(model),
        outputs=(data_spec.tensor, _energy_output(model)),
        doc="Run a chain of unadjusted Langevin steps, x - step_size gradient + "
        "noise_scale sqrt(2 step_size) noise. The stationary density differs from "
        "the model's by a term in step_size. " + _readout_doc(model),
        state=_state(model),
        steps=Steps(parameter="steps"),
        parameters=(*_chain_parameters(model), noise_scale),
        inputs=_inputs(data_spec),
        noise=_chain_noise(model),
        previewable=True,
    )


def _readout_doc(model: EnergyModel) -> str:
    if not model.smoothing_std:
        return "The point is the last state of the chain."
    return "The chain runs on noisy images. The output is the expected clean image, rounded to integers."


def _energy_output(model: EnergyModel) -> TensorSpec:
    detail = ", a noisy image" if model.smoothing_std else ""
    return TensorSpec("energy", doc=f"energy of the last state of the chain{detail}, in nats, unnormalized")


def _state(model: EnergyModel) -> tuple[TensorSpec, ...]:
    shape = (model.dimensions,)
    return (
        TensorSpec("x", shape=shape, doc=f"state of the chain: {model.coordinate_space}"),
        TensorSpec("energy", doc="energy of the state, in nats"),
        TensorSpec("gradient", shape=shape, doc="gradient of the energy; 0 at known coordinates"),
        TensorSpec("num_accepted", doc="number of accepted proposals"),
        TensorSpec("clean", shape=shape, doc="given row, in the coordinates of the chain"),
    )


def _chain_parameters(model: EnergyModel) -> tuple[Parameter, ...]:
    steps = IMAGE_STEPS if model.smoothing_std else POINT_STEPS
    max_step_size = 2 * model.smoothing_std**2 if model.smoothing_std else 0.1
    unit = "pixels scaled to -1..1" if model.smoothing_std else "coordinates"
    return (
        Parameter(
            "steps", "integer", steps, 1, MAX_STEPS,
            doc="number of steps; each evaluates the energy and its gradient once",
        ),
        Parameter(
            "step_size", "float", model.step_size, 1e-6, max_step_size,
            doc=f"step size eta, in squared {unit}; the noise of a step has variance 2 eta",
        ),
        Parameter.choice(
            "start", STARTS, "first state; noise: a draw from the base density; given: the given row"
        ),
    )  # fmt: skip


def _inputs(data_spec: DataSpec) -> tuple[Input, Input]:
    tensor = data_spec.tensor
    row_doc = "first state of the chain if start is given, and values of the known elements; otherwise unused"
    known_doc = "1 for elements of the given row that stay unchanged, 0 for elements to generate"
    return (
        Input(replace(tensor, doc=row_doc), optional=True),
        Input(TensorSpec("known", "uint8", tensor.shape, 0, 1, known_doc), optional=True),
    )


def _chain_noise(model: EnergyModel) -> tuple[Noise, ...]:
    shape = (model.dimensions,)
    return (
        Noise("component_noise", "uniform", (), 0, "uniform number that selects the component of the base"),
        Noise("factor_noise", "normal", (model.base.rank,), 1, "noise along the factors of that component"),
        Noise("start_noise", "normal", shape, 2, "isotropic noise of the base, or noise on the given image"),
        Noise("step_noise", "normal", shape, 3, "noise of each step"),
    )
