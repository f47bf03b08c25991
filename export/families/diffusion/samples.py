"""Samples: walks down the noise levels, from pure noise or from a noisy row, free or held to what is known.

- guided: Ho & Salimans (2022); D is moved away from what it would be without the label.
- edit: Meng et al., "SDEdit" (2022); a row is covered with noise, and denoised from there.
- inpaint: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021),
  appendix I.2; known elements are replaced by themselves under noise after every step.

A row's memory is what its sampler keeps. A row without a label draws its class by the classes' frequency
in the training rows: that samples the marginal better than the label "any", which is learned last.
"""

import torch
from torch import Tensor, nn

from export.families.diffusion import sampler as samplers
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampler import SAMPLERS, SIGMA_MAX, noise_level, per_row, tick
from export.program import Input, Noise, Parameter, Program, Steps, TensorSpec, Value

DEFAULT_STEPS, MAX_STEPS = 20, 200
# Known elements pull on the others only bit by bit.
INPAINT_STEPS = 50
GUIDANCE = 2


class Init(nn.Module):
    """Pure noise of standard deviation SIGMA_MAX, and a class where none was asked for."""

    reached: Tensor

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.classes = len(denoiser.class_shares)
        self.register_buffer("reached", denoiser.class_shares.cumsum(0)[:-1])

    def forward(self, initial_noise: Tensor, label: Tensor, label_noise: Tensor) -> tuple[Tensor, ...]:
        start = torch.ones_like(label_noise)
        nothing = torch.zeros_like(initial_noise)
        return self.begin(SIGMA_MAX * initial_noise, nothing, start, label, label_noise)

    def begin(
        self, x: Tensor, denoised: Tensor, start: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        """The first state of a walk from a position on the noise scale."""
        drawn = (label_noise.unsqueeze(1) >= self.reached).long().sum(1)
        drawn_label = torch.where(label < self.classes, label, drawn)
        return x, torch.zeros_like(x), denoised, drawn_label, start


class _EditInit(Init):
    """A given row under as much noise as the strength says."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.scale = denoiser.scale

    def cover(
        self, given: Tensor, strength: Tensor, noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        clean = self.scale(given)
        x = clean + per_row(noise_level(strength), clean) * noise
        return self.begin(x, clean, strength.clone(), label, label_noise)


class EditImageInit(_EditInit):
    """image -> a walk's first state."""

    def forward(  # type: ignore[override]
        self, image: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        return self.cover(image, strength, initial_noise, label, label_noise)


class EditPointInit(_EditInit):
    """point -> a walk's first state."""

    def forward(  # type: ignore[override]
        self, point: Tensor, strength: Tensor, initial_noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        return self.cover(point, strength, initial_noise, label, label_noise)


class _InpaintInit(Init):
    """Pure noise beside the known elements of a given row."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        self.scale = denoiser.scale

    def beside(
        self, given: Tensor, known: Tensor, noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        clean = self.scale(given) * known.to(noise.dtype)
        x, memory, _, drawn_label, _ = self.begin(SIGMA_MAX * noise, clean, label_noise, label, label_noise)
        return x, memory, clean, drawn_label, clean.clone()


class InpaintImageInit(_InpaintInit):
    """image -> a walk's first state."""

    def forward(  # type: ignore[override]
        self, image: Tensor, known: Tensor, initial_noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        return self.beside(image, known, initial_noise, label, label_noise)


class InpaintPointInit(_InpaintInit):
    """point -> a walk's first state."""

    def forward(  # type: ignore[override]
        self, point: Tensor, known: Tensor, initial_noise: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, ...]:
        return self.beside(point, known, initial_noise, label, label_noise)


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
        drawn_label: Tensor,
        start: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(samplers.descent(step_index, num_steps, sampler, start), sampler, eta)
        denoised = self.denoiser(x, now.sigma, drawn_label)
        return *now.move(x, memory, denoised, step_noise), denoised, drawn_label, start


class GuidedStep(_Part):
    """The same with D + (guidance - 1) (D - D without the label), which is D itself at guidance 1."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        drawn_label: Tensor,
        start: Tensor,
        step_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
        guidance: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(samplers.descent(step_index, num_steps, sampler, start), sampler, eta)
        labels = torch.stack([drawn_label, torch.full_like(drawn_label, self.denoiser.classes)], 1)
        twice = (torch.stack([part, part], 1).flatten(0, 1) for part in (x, now.sigma))
        both: Tensor = self.denoiser(*twice, labels.flatten())
        labelled, free = both.reshape(-1, 2, *x.shape[1:]).unbind(1)
        denoised = labelled + per_row(guidance - 1, x) * (labelled - free)
        return *now.move(x, memory, denoised, step_noise), denoised, drawn_label, start


class InpaintStep(_Part):
    """A step after which known elements are what they are known to be, under the noise of the level."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        x: Tensor,
        memory: Tensor,
        drawn_label: Tensor,
        clean: Tensor,
        known: Tensor,
        step_noise: Tensor,
        known_noise: Tensor,
        step_index: Tensor,
        num_steps: Tensor,
        sampler: Tensor,
        eta: Tensor,
    ) -> tuple[Tensor, ...]:
        now = tick(samplers.descent(step_index, num_steps, sampler, torch.ones_like(eta)), sampler, eta)
        denoised, fixed = self.denoiser(x, now.sigma, drawn_label), known == 1
        moved, kept = now.move(x, memory, denoised, step_noise)
        noisy = clean + per_row(now.reached, clean) * known_noise
        shown = torch.where(fixed, clean, denoised)
        return torch.where(fixed, noisy, moved), kept, shown, drawn_label, clean


class Readout(nn.Module):
    """The last denoised estimate as a value: the sample at the end, a preview before."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.value = denoiser.value

    def forward(self, denoised: Tensor) -> Tensor:
        return self.value(denoised)


def programs(denoiser: Denoiser, value: Value) -> tuple[Program, ...]:
    """sample, sample:guided, sample:edit and sample:inpaint."""
    init, step, readout = Init(denoiser), Step(denoiser), Readout(denoiser)
    return (
        _sample(value, init, step, readout),
        _guided(value, init, GuidedStep(denoiser), readout),
        _edit(value, EditImageInit(denoiser) if value.levels else EditPointInit(denoiser), step, readout),
        _inpaint(denoiser, value, readout),
    )


def _sample(value: Value, init: Init, step: Step, readout: Readout) -> Program:
    return Program(
        operation="sample",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise pure noise step by step; one step is one evaluation of the network.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=_walk_parameters("dpmpp2m"),
        inputs=(drawn_label(value),),
        noise=_noise(value),
        previewable=True,
    )


def _guided(value: Value, init: Init, step: GuidedStep, readout: Readout) -> Program:
    guidance = Parameter(
        "guidance", "float", GUIDANCE, 0, 10,
        doc="how far the label pushes: 1 is sample itself, above it samples are more typical of their class "
        "and less varied, 0 leaves the label out",
    )  # fmt: skip
    return Program(
        operation="sample",
        method="guided",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise pure noise with classifier-free guidance; one step is two evaluations of the network. "
        "What comes out at a guidance other than 0 and 1 has no density.",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(*_walk_parameters("dpmpp2m"), guidance),
        inputs=(drawn_label(value),),
        noise=_noise(value),
        previewable=True,
    )


def _edit(value: Value, init: EditImageInit | EditPointInit, step: Step, readout: Readout) -> Program:
    strength = Parameter(
        "strength", "float", 0.5, 0.01, 1,
        doc="how much noise covers the given row, as a share of the noise scale: a little keeps nearly all "
        "of it, 1 nothing",
    )  # fmt: skip
    doc = "what is covered with noise and denoised"
    return Program(
        operation="sample",
        method="edit",
        init=init,
        step=step,
        readout=readout,
        outputs=(value.tensor,),
        doc="Cover a given row with noise and denoise it from there, as a row of the class (SDEdit).",
        state=_state(value),
        steps=Steps(parameter="steps"),
        parameters=(*_walk_parameters("dpmpp2m"), strength),
        inputs=(Input(given(value, doc)), drawn_label(value)),
        noise=_noise(value),
        previewable=True,
    )


def _inpaint(denoiser: Denoiser, value: Value, readout: Readout) -> Program:
    shape = value.tensor.shape
    known = "1 for what is given and stays as it is, 0 for what is drawn, given that"
    return Program(
        operation="sample",
        method="inpaint",
        init=InpaintImageInit(denoiser) if value.levels else InpaintPointInit(denoiser),
        step=InpaintStep(denoiser),
        readout=readout,
        outputs=(value.tensor,),
        doc="Denoise what is not known beside what is, which is put back under noise after every step: "
        "approximate, less so with more steps.",
        state=(*_state(value)[:-1], TensorSpec("clean", shape=shape, doc=f"what is known, {_space(value)}")),
        steps=Steps(parameter="steps"),
        parameters=_walk_parameters("ddim", INPAINT_STEPS, eta=1),
        inputs=(
            Input(given(value, "what stays, where known is 1; elsewhere it is not looked at")),
            Input(TensorSpec("known", "uint8", shape, 0, 1, known)),
            drawn_label(value),
        ),
        noise=(*_noise(value), Noise("known_noise", "normal", shape, 3, "what covers the known elements")),
        previewable=True,
    )


def _space(value: Value) -> str:
    return "scaled to -1..1" if value.levels else f"as {value.tensor.doc}"


def _state(value: Value) -> tuple[TensorSpec, ...]:
    shape, space = value.tensor.shape, _space(value)
    return (
        TensorSpec("x", shape=shape, doc=f"the noisy row, {space}"),
        TensorSpec("memory", shape=shape, doc="what the sampler keeps from its last step"),
        TensorSpec("denoised", shape=shape, doc=f"the expected clean row, {space}"),
        TensorSpec("drawn_label", "int64", doc="index of the class, drawn where none was asked for"),
        TensorSpec("start", doc="where on the noise scale the walk begins, 1 at its upper end"),
    )


def _walk_parameters(default: str, steps: int = DEFAULT_STEPS, eta: float = 0) -> tuple[Parameter, ...]:
    return (
        steps_parameter(steps, "heun: two a level, one at the last, an even number begins by Euler"),
        sampler_parameter(default),
        Parameter(
            "eta", "float", eta, 0, 1, doc="share of fresh noise in steps of ddim: 0 none, 1 ancestral"
        ),
    )


def steps_parameter(default: int, doc: str, minimum: int = 1) -> Parameter:
    """How long a walk is."""
    return Parameter("steps", "integer", default, minimum, MAX_STEPS, doc=f"steps of the walk; {doc}")


def sampler_parameter(default: str) -> Parameter:
    """Which way a walk goes."""
    return Parameter.choice("sampler", SAMPLERS, "how to walk; dpmpp2m needs the fewest steps", default)


def given(value: Value, doc: str) -> TensorSpec:
    """A row of the request."""
    tensor = value.tensor
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape, tensor.minimum, tensor.maximum, doc)


def drawn_label(value: Value) -> Input:
    """The label that a row is made for; left out, it is drawn."""
    return _label(value, "draws it by the classes' frequency")


def open_label(value: Value) -> Input:
    """The label that a row is known to have; left out, it is any."""
    return _label(value, "leaves it open, which is a model of all classes together")


def _label(value: Value, absence: str) -> Input:
    classes = len(value.class_labels)
    doc = f"index of the class label; {classes} {absence}"
    return Input(TensorSpec("label", "int64", (), 0, classes, doc), optional=True, default=classes)


def _noise(value: Value) -> tuple[Noise, ...]:
    shape = value.tensor.shape
    return (
        Noise("initial_noise", "normal", shape, 0, "where the walk begins"),
        Noise("step_noise", "normal", shape, 1, "fresh noise of each step, used by ddim with eta above 0"),
        Noise("label_noise", "uniform", (), 2, "draws the class where none was asked for"),
    )
