"""The programs of the GAN: sample and decode."""

import torch
from torch import Tensor, nn

from export.families.base import label_input
from export.families.gan.network import Generator
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, TensorSpec

# Marks an element of a latent that the request leaves open. The program draws it.
UNSET = 100.0


def build_programs(generator: Generator, data_spec: DataSpec) -> tuple[Program, ...]:
    """Return the programs in the order of the family's operations."""
    return _sample(generator, data_spec), _decode(generator, data_spec)


class _GeneratorModule(nn.Module):
    """Base of the program modules: the trained generator, and the classes' cumulative frequency."""

    cumulative_weights: Tensor

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator
        self.register_buffer("cumulative_weights", generator.class_weights.cumsum(0)[:-1])

    def generate(self, latent: Tensor, label: Tensor, label_noise: Tensor) -> Tensor:
        """Return the rows [B, *shape] of latents [B, Z]. Without a label, draw the class by its frequency."""
        drawn = (label_noise.unsqueeze(1) >= self.cumulative_weights).long().sum(1)
        label = torch.where(label < self.generator.num_classes, label, drawn)
        return self.generator.to_rows(self.generator(latent, label))


class Sample(_GeneratorModule):
    """Given or drawn latent, multiplied by the truncation -> row."""

    def forward(
        self, latent: Tensor, label: Tensor, truncation: Tensor, latent_noise: Tensor, label_noise: Tensor
    ) -> Tensor:
        latent = torch.where(latent < UNSET, latent, latent_noise)
        return self.generate(latent * truncation.unsqueeze(1), label, label_noise)


class Decode(_GeneratorModule):
    """Latent -> row."""

    def forward(self, latent: Tensor, label: Tensor, label_noise: Tensor) -> Tensor:
        return self.generate(latent, label, label_noise)


def _sample(generator: Generator, data_spec: DataSpec) -> Program:
    latent = TensorSpec(
        "latent",
        shape=(generator.latent_dimensions,),
        minimum=-UNSET,
        maximum=UNSET,
        doc=f"standard normal under the model; elements of {UNSET:g}, the default, are drawn",
    )
    noise_doc = "the elements of the latent that are not given"
    return Program(
        operation="sample",
        readout=Sample(generator),
        outputs=(data_spec.tensor,),
        doc="Draw the latents and classes that are not given, and decode them.",
        parameters=(
            Parameter(
                "truncation",
                "float",
                1,
                0,
                2,
                doc="factor of every latent: 1 is the model's own, smaller values give less varied samples",
            ),
        ),
        inputs=(Input(latent, optional=True, default=UNSET), _label(data_spec)),
        noise=(
            Noise("latent_noise", "normal", (generator.latent_dimensions,), 0, noise_doc),
            _label_noise(1),
        ),
    )


def _decode(generator: Generator, data_spec: DataSpec) -> Program:
    shape = (generator.latent_dimensions,)
    return Program(
        operation="decode",
        readout=Decode(generator),
        outputs=(data_spec.tensor,),
        doc="Decode a latent to a row, as sample does.",
        inputs=(
            Input(TensorSpec("latent", shape=shape, doc="standard normal under the model")),
            _label(data_spec),
        ),
        noise=(_label_noise(1),),
    )


def _label(data_spec: DataSpec) -> Input:
    return label_input(data_spec, "draws it by the classes' frequency")


def _label_noise(stream: int) -> Noise:
    return Noise("label_noise", "uniform", (), stream, "draws the class if no label is given")
