"""Parameters and inputs that several programs of the diffusion model share."""

from dataclasses import replace

from export.families.base import label_input
from export.families.diffusion.solvers import SAMPLERS
from export.graphs.program import DataSpec, Input, Parameter

MAX_STEPS = 200


def steps_parameter(default: int, doc: str, minimum: int = 1) -> Parameter:
    """Return the parameter `steps`; `doc` says how they are used."""
    return Parameter("steps", "integer", default, minimum, MAX_STEPS, doc=f"number of steps; {doc}")


def sampler_parameter(default: str) -> Parameter:
    """Return the parameter `sampler`, one of SAMPLERS."""
    return Parameter.choice(
        "sampler", SAMPLERS, "numerical method of the steps; dpmpp2m needs the fewest steps", default
    )


def row_input(data_spec: DataSpec, doc: str) -> Input:
    """Return the required input that holds a data row."""
    return Input(replace(data_spec.tensor, doc=doc))


def sampled_label_input(data_spec: DataSpec) -> Input:
    """Return the label to generate. Without it, the program draws one by class frequency."""
    return label_input(data_spec, "draws a class by its frequency in the training rows")


def known_label_input(data_spec: DataSpec) -> Input:
    """Return the label of a given row. Without it, the model covers all classes together."""
    return label_input(data_spec, "uses the model of all classes together")


def coordinate_space(data_spec: DataSpec) -> str:
    """Return the space of which a score is a probability or a density."""
    return f"integers 0..{data_spec.num_levels - 1}" if data_spec.num_levels else data_spec.tensor.doc


def scaled_space(data_spec: DataSpec) -> str:
    """Return the scale of the rows that the denoiser takes."""
    return "scaled to -1..1" if data_spec.num_levels else f"in {data_spec.tensor.doc}"
