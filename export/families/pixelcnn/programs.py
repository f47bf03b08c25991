"""The programs of the PixelCNN: sample, score and classify."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.families.base import label_input
from export.families.pixelcnn.network import LOG_ZERO, PixelCNN
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec

# Divisor of the logits for a temperature of 0: all levels but the most likely get probability 0.
_MIN_TEMPERATURE = 1e-4


def build_programs(pixelcnn: PixelCNN, data_spec: DataSpec) -> tuple[Program, ...]:
    """Return the programs in the order of the family's operations."""
    return _sample(pixelcnn, data_spec), _score(pixelcnn, data_spec), _classify(pixelcnn, data_spec)


class _PixelCNNModule(nn.Module):
    """Base of the program modules that use the trained network."""

    def __init__(self, pixelcnn: PixelCNN) -> None:
        super().__init__()
        self.pixelcnn = pixelcnn


class SampleInit(_PixelCNNModule):
    """Known pixels and a label -> canvas with the known pixels, and the label.

    Without a label, the label is drawn from its posterior given the known pixels.
    """

    def forward(
        self, image: Tensor, known: Tensor, label: Tensor, label_noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        canvas = torch.where(known == 1, image, torch.zeros_like(image)).to(torch.int64)
        log_joint = self.pixelcnn.log_joint(canvas, known == 1)
        drawn = _sample_by_inversion(log_joint, label_noise)
        return canvas, torch.where(label < self.pixelcnn.num_classes, label, drawn)


class SampleStep(_PixelCNNModule):
    """Draw the pixel at step_index in raster order, by inversion of a uniform number. Keep known pixels."""

    def forward(
        self,
        canvas: Tensor,
        drawn_label: Tensor,
        known: Tensor,
        pixel_noise: Tensor,
        temperature: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        order = torch.arange(self.pixelcnn.dimensions, device=canvas.device)
        is_current = order == step_index.unsqueeze(1)
        features = self.pixelcnn.features(canvas, drawn_label)
        # The product with a one-hot row selects the features of one pixel. The head then computes only its
        # logits.
        current = (is_current.to(features.dtype).unsqueeze(1) @ features).squeeze(1)
        logits = self.pixelcnn.logits(current)
        logits = logits - logits.amax(-1, keepdim=True)
        scaled = logits / temperature.clamp(min=_MIN_TEMPERATURE).unsqueeze(1)
        drawn = _sample_by_inversion(scaled, pixel_noise).reshape(-1, 1, 1)
        is_written = is_current.reshape(canvas.shape) & (known == 0)
        return torch.where(is_written, drawn, canvas), drawn_label


def _sample_by_inversion(logits: Tensor, uniform: Tensor) -> Tensor:
    """Return the index, int64 [B], at which the cumulative softmax of logits [B, N] reaches uniform [B]."""
    cumulative = logits.softmax(-1).cumsum(-1)
    return (uniform.unsqueeze(1) >= cumulative[:, :-1]).long().sum(-1)


class SampleReadout(nn.Module):
    """Canvas -> image. Pixels that are neither known nor drawn yet are 0."""

    def forward(self, canvas: Tensor) -> Tensor:
        return canvas.to(torch.uint8)


class ScoreStep(_PixelCNNModule):
    """Add the term of class step_index to the mass of every prefix of the image.

    With a label there is only its term, and the row is done after one step.
    """

    def forward(
        self, image: Tensor, label: Tensor, log_prefix_masses: Tensor, step_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        has_label = label < self.pixelcnn.num_classes
        # In a slot without a row, step_index exceeds the last class. The index must still be valid.
        current = torch.where(has_label, label, step_index.clamp(max=self.pixelcnn.num_classes - 1))
        log_weight = self.pixelcnn.log_class_weights[current]
        log_weight = torch.where(has_label, torch.zeros_like(log_weight), log_weight).unsqueeze(1)
        terms = self.pixelcnn.log_masses(image, current).cumsum(1) + log_weight
        log_zero = torch.full_like(log_prefix_masses, LOG_ZERO)
        previous = torch.where((step_index == 0).unsqueeze(1), log_zero, log_prefix_masses)
        return _log_add(previous, terms), has_label


def _log_add(log_a: Tensor, log_b: Tensor) -> Tensor:
    largest = torch.maximum(log_a, log_b)
    return largest + torch.log((log_a - largest).exp() + (log_b - largest).exp())


class ScoreReadout(nn.Module):
    """Log-masses of the prefixes -> log-mass of the image, and that of each pixel given those before it."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, log_prefix_masses: Tensor) -> tuple[Tensor, Tensor]:
        previous = functional.pad(log_prefix_masses[:, :-1], (1, 0))
        by_pixel = (log_prefix_masses - previous).reshape(-1, *self.shape)
        return log_prefix_masses[:, -1], by_pixel


class Classify(_PixelCNNModule):
    """Image -> posterior probabilities of the classes, by Bayes' rule."""

    def forward(self, image: Tensor) -> Tensor:
        return self.pixelcnn.log_joint(image, torch.ones_like(image, dtype=torch.bool)).softmax(-1)


def _sample(pixelcnn: PixelCNN, data_spec: DataSpec) -> Program:
    image, shape = data_spec.tensor, pixelcnn.shape
    return Program(
        operation="sample",
        init=SampleInit(pixelcnn),
        step=SampleStep(pixelcnn),
        readout=SampleReadout(),
        outputs=(image,),
        doc="Draw the pixels in raster order, one in each step, given the known pixels.",
        state=(
            TensorSpec("canvas", "int64", shape, doc="known and drawn pixels; 0 elsewhere"),
            TensorSpec("drawn_label", "int64", doc="index of the class label, given or drawn"),
        ),
        steps=Steps(fixed=pixelcnn.dimensions),
        parameters=(
            Parameter(
                "temperature", "float", 1, 0, 2,
                doc="divides the logits: 1 is the model's own distribution, 0 takes the most likely level",
            ),
        ),
        inputs=(
            label_input(data_spec, "draws it by the classes' frequency and the known pixels"),
            *_known_pixels(image),
        ),
        noise=(
            Noise("pixel_noise", "uniform", (), 0, "draws the pixel of the step, by inversion"),
            Noise("label_noise", "uniform", (), 1, "draws the class if no label is given"),
        ),
        previewable=True,
    )  # fmt: skip


def _known_pixels(image: TensorSpec) -> tuple[Input, Input]:
    known_doc = (
        "1 for pixels to keep. Exact when the known pixels come first in raster order, for example the upper "
        "rows. Other masks, as in inpainting, give an approximation: each pixel is drawn given the pixels "
        "before it and ignores known pixels after it"
    )
    pixels = TensorSpec("image", image.dtype, image.shape, image.minimum, image.maximum, "the known pixels")
    return (
        Input(TensorSpec("known", "uint8", image.shape, 0, 1, known_doc), optional=True),
        Input(pixels, optional=True),
    )


def _score(pixelcnn: PixelCNN, data_spec: DataSpec) -> Program:
    return Program(
        operation="score",
        step=ScoreStep(pixelcnn),
        readout=ScoreReadout(pixelcnn.shape),
        outputs=(
            TensorSpec("log_mass", doc="log-mass of the image in nats, with or without the label"),
            TensorSpec(
                "log_mass_by_pixel",
                shape=pixelcnn.shape,
                doc="log-mass of each pixel given the pixels before it, in nats; the sum is log_mass",
            ),
        ),
        doc="Log-mass of an image of integers: p(x | label), or p(x) = sum of p(label) p(x | label).",
        state=(
            TensorSpec(
                "log_prefix_masses",
                shape=(pixelcnn.dimensions,),
                doc="log-mass of the first 1, 2, ... pixels, summed over the classes so far",
            ),
            TensorSpec("is_done", "bool", doc="true after one step if a label is given"),
        ),
        steps=Steps(fixed=pixelcnn.num_classes, done_flag="is_done"),
        inputs=(
            Input(data_spec.tensor),
            label_input(data_spec, "scores the mixture of the classes by their frequency"),
        ),
        score=Score("exact", pixelcnn.dimensions, f"integers 0..{pixelcnn.num_levels - 1}", "log_mass"),
    )


def _classify(pixelcnn: PixelCNN, data_spec: DataSpec) -> Program:
    doc = "posterior probability of each class"
    return Program(
        operation="classify",
        readout=Classify(pixelcnn),
        outputs=(TensorSpec("probabilities", "float32", (pixelcnn.num_classes,), 0, 1, doc),),
        doc="Bayes' rule: p(label | x) from p(x | label) and the classes' frequency in the training rows.",
        inputs=(Input(data_spec.tensor),),
    )
