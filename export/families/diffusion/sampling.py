"""Samples: walks down the noise levels, from pure noise or from a noisy row, free or held to what is known.

- guided: Ho & Salimans (2022); D is moved away from what it would be without the label.
- edit: Meng et al., "SDEdit" (2022); a row is covered with noise, and denoised from there.
- inpaint: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021),
  appendix I.2; known elements are replaced by themselves under noise after every step. A noise level is
  walked several times, so that the others come to agree with them: Lugmayr et al., "RePaint" (2022).

A row's memory is what its sampler keeps. Without a label, a row from pure noise draws its class by the
classes' frequency in the training rows: that samples the marginal better than the label "any", which is
learned last. A row that is given shows its class itself, so there the label "any" stands.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from export.families.base import label_input
from export.families.diffusion import solvers as samplers
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.solvers import SAMPLERS, SIGMA_MAX, noise_level, per_row, tick
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Steps, TensorSpec

DEFAULT_STEPS, MAX_STEPS = 20, 200
INPAINT_STEPS, INPAINT_ROUNDS = 100, 5
GUIDANCE = 2


class Init(nn.Module):
    """Pure noise of standard deviation SIGMA_MAX, and a class where none was asked for."""

    reached: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.classes = len(denoiser.class_shares)
        self.register_buffer("reached", denoiser.class_shares.cumsum(0)[:-1])

    def forward(self, initial_noise: Tensor, label: Tensor, label_noise: Tensor) -> tuple[Tensor, ...]:
        drawn = (label_noise.unsqueeze(1) >= self.reached).long().sum(1)
        kept_label = torch.where(label < self.classes, label, drawn)
        nothing = torch.zeros_like(initial_noise)
        return SIGMA_MAX * initial_noise, nothing, nothing.clone(), kept_label, torch.ones_like(label_noise)


class _EditInit(nn.Module):
    """A given row under as much noise as the strength says."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def cover(self, row: Tensor, strength: Tensor, noise: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        clean = self.scale(row)
        x = clean + per_row(noise_level(strength), clean) * noise
        return x, torch.zeros_like(x), clean.clone(), label.clone(), strength.clone()


class EditImageInit(_EditInit):
    """image -> a walk's first state."""

    def forward(
        self, image: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor
    ) -> tuple[Tensor, ...]:
        return self.cover(image, strength, initial_noise, label)


class EditPointInit(_EditInit):
    """point -> a walk's first state."""

    def forward(
        self, point: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor
    ) -> tuple[Tensor, ...]:
        return self.cover(point, strength, initial_noise, label)


class _InpaintInit(nn.Module):
    """Pure noise beside the known elements of a given row."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.scale = denoiser.scale

    def beside(self, row: Tensor, known: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        clean = self.scale(row) * known.to(noise.dtype)
        return SIGMA_MAX * noise, clean, clean.clone()


class InpaintImageInit(_InpaintInit):
    """image -> a walk's first state."""

    def forward(self, image: Tensor, known: Tensor, initial_noise: Tensor) -> tuple[Tensor, ...]:
        return self.beside(image, known, initial_noise)


class InpaintPointInit(_InpaintInit):
    """point -> a walk's first state."""

    def forward(self, point: Tensor, known: Tensor, initial_noise: Tensor) -> tuple[Tensor, ...]:
        return self.beside(point, known, initial_noise)


class _Part(nn.Module):
    """A module of a program: a function of the trained denoiser."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser


class Step(_Part):
    """One evaluation of the network and the linear update of the row's sampler."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        kept_label: Tensor,
        start: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(samplers.descent(step_index, num_steps, sampler, start), sampler, eta)
        denoised = self.denoiser(x, now.sigma, kept_label)
        return *now.move(x, memory, denoised, step_noise), denoised, kept_label, start


class GuidedStep(_Part):
    """The same with D + (guidance - 1) (D - D without the label), which is D itself at guidance 1."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        kept_label: Tensor,
        start: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
        guidance: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(samplers.descent(step_index, num_steps, sampler, start), sampler, eta)
        labels = torch.stack([kept_label, torch.full_like(kept_label, self.denoiser.classes)], 1)
        twice = (torch.stack([part, part], 1).flatten(0, 1) for part in (x, now.sigma))
        both: Tensor = self.denoiser(*twice, labels.flatten())
        labelled, free = both.reshape(-1, 2, *x.shape[1:]).unbind(1)
        denoised = labelled + per_row(guidance - 1, x) * (labelled - free)
        return *now.move(x, memory, denoised, step_noise), denoised, kept_label, start


class InpaintStep(_Part):
    """A step after which known elements are what they are known to be, under the noise of its level."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        clean: Tensor,
        known: Tensor,
        label: Tensor,
        rounds: Tensor,
        step_noise: Tensor,
        known_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
    ) -> tuple[Tensor, ...]:
        now = samplers.resampled(step_index, num_steps, rounds)
        denoised, fixed = self.denoiser(x, now.sigma, label), known == 1
        moved, _ = now.move(x, torch.zeros_like(x), denoised, step_noise)
        noisy = clean + per_row(now.reached, clean) * known_noise
        return (
            torch.where(fixed, noisy, moved),
            torch.where(fixed, clean, denoised),
            clean.clone(),
        )


class Readout(nn.Module):
    """The last denoised estimate as a value: the sample at the end, a preview before."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.value = denoiser.value

    def forward(self, denoised: Tensor) -> Tensor:
        return self.value(denoised)


def programs(denoiser: Denoiser, value: DataSpec) -> tuple[Program, ...]:
    """sample, sample:guided, sample:edit and sample:inpaint."""
    init, step, readout = Init(denoiser), Step(denoiser), Readout(denoiser)
    return (
        _sample(value, init, step, readout),
        _guided(value, init, GuidedStep(denoiser), readout),
        _edit(value, EditImageInit(denoiser) if value.num_levels else EditPointInit(denoiser), step, readout),
        _inpaint(denoiser, value, readout),
    )


def _sample(value: DataSpec, init: Init, step: Step, readout: Readout) -> Program:
    return Program(
        operation="sample",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise pure noise step by step; one step is one evaluation of the network.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=_walk_parameters(),
        inputs=(drawn_label(value),),
        noise=_noise(value),
        previewable=True,
    )


def _guided(value: DataSpec, init: Init, step: GuidedStep, readout: Readout) -> Program:
    guidance = Parameter(
        "guidance", "float", GUIDANCE, 0, 10,
        doc="how far the label pushes: 1 is sample itself, above it samples are more typical of their class "
        "and less varied, 0 leaves the label out",
    )  # fmt: skip
    return Program(
        operation="sample",
        variant="guided",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise pure noise with classifier-free guidance; one step is two evaluations of the network. "
        "What comes out at a guidance other than 0 and 1 has no density.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(*_walk_parameters(), guidance),
        inputs=(drawn_label(value),),
        noise=_noise(value),
        previewable=True,
    )


def _edit(value: DataSpec, init: EditImageInit | EditPointInit, step: Step, readout: Readout) -> Program:
    strength = Parameter(
        "strength", "float", 0.5, 0.01, 1,
        doc="how much noise covers the given row, as a share of the noise scale: a little keeps nearly all "
        "of it, 1 nothing",
    )  # fmt: skip
    doc = "what is covered with noise and denoised"
    return Program(
        operation="sample",
        variant="edit",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Cover a given row with noise and denoise it from there, as a row of the label (SDEdit).",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(*_walk_parameters(), strength),
        inputs=(Input(given(value, doc)), open_label(value)),
        noise=_noise(value)[:2],
        previewable=True,
    )


def _inpaint(denoiser: Denoiser, value: DataSpec, readout: Readout) -> Program:
    shape, (x, _, denoised, *_) = value.tensor.shape, _state(value)
    known = "1 for what is given and stays as it is, 0 for what is drawn, given that"
    return Program(
        operation="sample",
        variant="inpaint",
        init=InpaintImageInit(denoiser) if value.num_levels else InpaintPointInit(denoiser),
        step=InpaintStep(denoiser),
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise what is not known beside what is, which is put back under noise after every step: "
        "approximate, less so with more rounds of more levels.",
        state=(
            x,
            denoised,
            TensorSpec("clean", shape=shape, doc=f"what is known, {_space(value)}, and 0 elsewhere"),
        ),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(INPAINT_STEPS, "ancestral ones, as of ddim with eta 1"),
            Parameter(
                "rounds", "integer", INPAINT_ROUNDS, 1, 20,
                doc="how many of the steps each noise level takes: 1 lets known elements steer the others "
                "least, more leave fewer levels",
            ),
        ),
        inputs=(
            Input(given(value, "what stays, where known is 1; elsewhere it is not looked at")),
            Input(TensorSpec("known", "uint8", shape, 0, 1, known)),
            open_label(value),
        ),
        noise=(*_noise(value)[:2], Noise("known_noise", "normal", shape, 2, "covers the known elements")),
        previewable=True,
    )  # fmt: skip


def _space(value: DataSpec) -> str:
    return "scaled to -1..1" if value.num_levels else f"as {value.tensor.doc}"


def _state(value: DataSpec) -> tuple[TensorSpec, ...]:
    shape, space = value.tensor.shape, _space(value)
    return (
        TensorSpec("x", shape=shape, doc=f"the noisy row, {space}"),
        TensorSpec("memory", shape=shape, doc="what the sampler keeps from its last step"),
        TensorSpec("denoised", shape=shape, doc=f"the expected clean row, {space}"),
        TensorSpec("kept_label", "int64", doc="index of the class that the row is made for"),
        TensorSpec("start", doc="where on the noise scale the walk begins, 1 at its upper end"),
    )


def _walk_parameters() -> tuple[Parameter, ...]:
    return (
        steps_parameter(DEFAULT_STEPS, "heun: two a level, one at the last, an even number begins by Euler"),
        sampler_parameter("dpmpp2m"),
        Parameter("eta", "float", 0, 0, 1, doc="share of fresh noise in steps of ddim: 0 none, 1 ancestral"),
    )


def steps_parameter(default: int, doc: str, minimum: int = 1) -> Parameter:
    """How long a walk is."""
    return Parameter("steps", "integer", default, minimum, MAX_STEPS, doc=f"steps of the walk; {doc}")


def sampler_parameter(default: str) -> Parameter:
    """Which way a walk goes."""
    return Parameter.choice("sampler", SAMPLERS, "how to walk; dpmpp2m needs the fewest steps", default)


def given(value: DataSpec, doc: str) -> TensorSpec:
    """A row of the request."""
    return replace(value.tensor, doc=doc)


def drawn_label(value: DataSpec) -> Input:
    """The label that a row is made for; left out, it is drawn."""
    return label_input(value, "draws it by the classes' frequency")


def open_label(value: DataSpec) -> Input:
    """The label that a row is known to have; left out, it is any."""
    return label_input(value, "leaves it open, which is a model of all classes together")


def _noise(value: DataSpec) -> tuple[Noise, ...]:
    shape = value.tensor.shape
    return (
        Noise("initial_noise", "normal", shape, 0, "where the walk begins"),
        Noise("step_noise", "normal", shape, 1, "fresh noise of each step, where it is random"),
        Noise("label_noise", "uniform", (), 2, "draws the class where none was asked for"),
    )
