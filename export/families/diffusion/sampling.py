"""The sampling programs: sample, sample:guided, sample:edit and sample:inpaint.

- guided: Ho & Salimans (2022); D is moved away from its value without the label.
- edit: Meng et al., "SDEdit" (2022); a given row gets noise and is denoised from there.
- inpaint: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021),
  appendix I.2; after each step, known elements are replaced by their values plus noise. Each noise level is
  repeated, so that the unknown elements agree with the known ones: Lugmayr et al., "RePaint" (2022).
"""

from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.parameters import (
    known_label_input,
    row_input,
    sampled_label_input,
    sampler_parameter,
    scaled_space,
    steps_parameter,
)
from export.families.diffusion.sampling_graphs import (
    EditImageInit,
    EditPointInit,
    GuidedStep,
    InpaintImageInit,
    InpaintPointInit,
    InpaintStep,
    SampleInit,
    SampleReadout,
    SampleStep,
)
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Steps, TensorSpec

DEFAULT_STEPS = 20
INPAINT_STEPS, INPAINT_ROUNDS = 100, 5
DEFAULT_GUIDANCE = 2


def build_programs(denoiser: Denoiser, data_spec: DataSpec, readout: SampleReadout) -> tuple[Program, ...]:
    """Return sample, sample:guided, sample:edit and sample:inpaint."""
    init, step = SampleInit(denoiser), SampleStep(denoiser)
    edit_init = EditImageInit(denoiser) if data_spec.num_levels else EditPointInit(denoiser)
    return (
        _sample(data_spec, init, step, readout),
        _guided(data_spec, init, GuidedStep(denoiser), readout),
        _edit(data_spec, edit_init, step, readout),
        _inpaint(denoiser, data_spec, readout),
    )


def _sample(data_spec: DataSpec, init: SampleInit, step: SampleStep, readout: SampleReadout) -> Program:
    return Program(
        operation="sample",
        init=init,
        step=step,
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Denoise pure noise step by step. One step is one evaluation of the network.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=_sampler_parameters(),
        inputs=(sampled_label_input(data_spec),),
        noise=_noise(data_spec),
        previewable=True,
    )


def _guided(data_spec: DataSpec, init: SampleInit, step: GuidedStep, readout: SampleReadout) -> Program:
    guidance = Parameter(
        "guidance", "float", DEFAULT_GUIDANCE, 0, 10,
        doc="strength of the label: 1 is the same as sample; larger values give samples that are more "
        "typical of their class and less diverse; 0 ignores the label",
    )  # fmt: skip
    return Program(
        operation="sample",
        variant="guided",
        init=init,
        step=step,
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Denoise pure noise with classifier-free guidance. One step is two evaluations of the network. "
        "With a guidance other than 0 and 1, samples follow no known density.",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(*_sampler_parameters(), guidance),
        inputs=(sampled_label_input(data_spec),),
        noise=_noise(data_spec),
        previewable=True,
    )


def _edit(
    data_spec: DataSpec, init: EditImageInit | EditPointInit, step: SampleStep, readout: SampleReadout
) -> Program:
    strength = Parameter(
        "strength", "float", 0.5, 0.01, 1,
        doc="amount of noise added to the given row, as a fraction of the noise scale: small values keep "
        "most of the row, 1 keeps nothing",
    )  # fmt: skip
    return Program(
        operation="sample",
        variant="edit",
        init=init,
        step=step,
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Add noise to a given row and denoise it as a row of the label (SDEdit).",
        state=_state(data_spec),
        steps=Steps(parameter="steps"),
        parameters=(*_sampler_parameters(), strength),
        inputs=(row_input(data_spec, "row to edit"), known_label_input(data_spec)),
        noise=_noise(data_spec)[:2],
        previewable=True,
    )


def _inpaint(denoiser: Denoiser, data_spec: DataSpec, readout: SampleReadout) -> Program:
    shape, (x, _, denoised, *_) = data_spec.tensor.shape, _state(data_spec)
    return Program(
        operation="sample",
        variant="inpaint",
        init=InpaintImageInit(denoiser) if data_spec.num_levels else InpaintPointInit(denoiser),
        step=InpaintStep(denoiser),
        readout=readout,
        outputs=(data_spec.tensor,),
        doc="Generate the unknown elements of a row, given the known ones. After each step the known "
        "elements are restored, with noise. The result is approximate; more rounds and more steps make it "
        "more accurate.",
        state=(
            x,
            denoised,
            TensorSpec(
                "clean", shape=shape, doc=f"known elements of the row, {scaled_space(data_spec)}; 0 elsewhere"
            ),
        ),
        steps=Steps(parameter="steps"),
        parameters=(
            steps_parameter(INPAINT_STEPS, "they are ancestral, like those of ddim with eta 1"),
            Parameter(
                "rounds", "integer", INPAINT_ROUNDS, 1, 20,
                doc="number of steps at each noise level; more rounds make the unknown elements agree better "
                "with the known ones, but leave fewer levels",
            ),
        ),
        inputs=(
            row_input(data_spec, "row with the known elements; the other elements are ignored"),
            Input(
                TensorSpec(
                    "known", "uint8", shape, 0, 1, "1 for known elements, which stay unchanged; else 0"
                )
            ),
            known_label_input(data_spec),
        ),
        noise=(
            *_noise(data_spec)[:2],
            Noise("known_noise", "normal", shape, 2, "noise added to the known elements in each step"),
        ),
        previewable=True,
    )  # fmt: skip


def _state(data_spec: DataSpec) -> tuple[TensorSpec, ...]:
    shape, space = data_spec.tensor.shape, scaled_space(data_spec)
    return (
        TensorSpec("x", shape=shape, doc=f"noisy row, {space}"),
        TensorSpec("memory", shape=shape, doc="values that the sampler carries from one step to the next"),
        TensorSpec("denoised", shape=shape, doc=f"expected clean row, {space}"),
        TensorSpec("row_label", "int64", doc="index of the class that is generated"),
        TensorSpec(
            "start_position", doc="position on the noise scale where the steps start; 1 is pure noise"
        ),
    )


def _sampler_parameters() -> tuple[Parameter, ...]:
    return (
        steps_parameter(
            DEFAULT_STEPS,
            "heun takes two for each noise level but one for the last; if even, the first is an Euler step",
        ),
        sampler_parameter("dpmpp2m"),
        Parameter(
            "eta",
            "float",
            0,
            0,
            1,
            doc="fraction of new noise in the steps of ddim: 0 is deterministic, 1 is ancestral sampling; "
            "other samplers ignore it",
        ),
    )


def _noise(data_spec: DataSpec) -> tuple[Noise, ...]:
    shape = data_spec.tensor.shape
    return (
        Noise("initial_noise", "normal", shape, 0, "noise from which the steps start"),
        Noise("step_noise", "normal", shape, 1, "new noise of each step, for stochastic samplers"),
        Noise("label_noise", "uniform", (), 2, "uniform number that draws the class when no label is given"),
    )
