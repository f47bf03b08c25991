"""What a row weighs: its energy with the energy's gradient, and its log-density by the estimated log Z."""

import torch
from torch import Tensor

from export.families.ebm.energy import EnergyModel, Part
from export.families.ebm.log_partition import GRID_CELLS, GRID_LIMIT, TEMPERATURES, Normaliser, normaliser
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_sum

BLURS = ("none", "draw")
DRAW = BLURS.index("draw")


class _Energy(Part):
    """A row -> its energy, the energy's gradient, and the gradient's length."""

    def of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, gradient = self.model.energy(self.model.coordinates(rows))
        return energy, gradient.reshape(-1, *self.model.shape), batch_invariant_sum(gradient.square()).sqrt()


class EnergyOfPoint(_Energy):
    """point -> energy, gradient and its norm."""

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.of(point)


class EnergyOfImage(_Energy):
    """image -> energy, gradient and its norm."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.of(image)


class ScorePoint(Part):
    """point -> -E - log Z, and the standard error of log Z."""

    def __init__(self, model: EnergyModel, known: Normaliser) -> None:
        super().__init__(model)
        self.known = known

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        energy, _ = self.model.energy(point)
        return -energy - self.known.log_z, torch.zeros_like(energy) + self.known.standard_error


class ScoreImage(Part):
    """image, or a draw around it -> -E - log Z and its standard error, by the way there and the way back."""

    def __init__(self, model: EnergyModel, known: Normaliser) -> None:
        super().__init__(model)
        self.known = known

    def forward(self, image: Tensor, blur: Tensor, blur_noise: Tensor) -> tuple[Tensor, ...]:
        drawn = self.model.smoothing * (blur == DRAW).to(blur_noise.dtype).unsqueeze(1) * blur_noise
        energy, _ = self.model.energy(self.model.coordinates(image) + drawn)
        zero, known = torch.zeros_like(energy), self.known
        there = -energy - known.log_z, zero + known.standard_error
        return *there, -energy - known.reverse, zero + known.reverse_standard_error


def programs(model: EnergyModel, value: DataSpec) -> tuple[Program, Program]:
    """energy, and score, for which log Z is estimated here."""
    score = _score_point if value.kind == "vector" else _score_image
    return _energy(model, value), score(model, value)


def _energy(model: EnergyModel, value: DataSpec) -> Program:
    points = value.kind == "vector"
    unit = "coordinate" if points else "pixel scaled to -1..1"
    where = "the point" if points else "the image as it is, scaled, without noise on it"
    return Program(
        operation="energy",
        readout=EnergyOfPoint(model) if points else EnergyOfImage(model),
        outputs=(
            TensorSpec(
                "energy", doc=f"energy of {where}, in nats: lower is likelier, only differences count"
            ),
            TensorSpec("gradient", shape=value.tensor.shape, doc=f"the energy's gradient there, by {unit}"),
            TensorSpec("gradient_norm", minimum=0, doc="its length"),
        ),
        doc="Unnormalised negative log-density of a row.",
        inputs=(Input(value.tensor),),
        score=Score("unnormalized", model.dimensions, _scored(model, value), "energy"),
    )


def _scored(model: EnergyModel, value: DataSpec) -> str:
    return model.space if model.smoothing else value.tensor.doc


def _score_point(model: EnergyModel, value: DataSpec) -> Program:
    known = normaliser(model)
    return Program(
        operation="score",
        readout=ScorePoint(model, known),
        outputs=(
            TensorSpec("log_density", doc="-E - log Z of the point, in nats"),
            TensorSpec(
                "standard_error", minimum=0, doc="of log Z, in nats: its change on a grid half as fine"
            ),
        ),
        doc=f"Log-density of a point, -E - log Z, with log Z = {known.log_z:.4f} by quadrature over "
        f"{GRID_CELLS} x {GRID_CELLS} cells within -{GRID_LIMIT:g}..{GRID_LIMIT:g}: exact to the grid.",
        inputs=(Input(value.tensor),),
        score=Score("estimate", model.dimensions, _scored(model, value), "log_density", "standard_error"),
    )


def _score_image(model: EnergyModel, value: DataSpec) -> Program:
    known = normaliser(model)
    return Program(
        operation="score",
        readout=ScoreImage(model, known),
        outputs=(
            TensorSpec("log_density", doc="-E - log Z, in nats, of a noisy image and not of integers"),
            TensorSpec("standard_error", minimum=0, doc="of log Z, in nats, the same for every row"),
            TensorSpec(
                "log_density_reverse", doc="the same with log Z from chains that walk back to the base"
            ),
            TensorSpec(
                "standard_error_reverse", minimum=0, doc="of that log Z, as if its chains were independent"
            ),
        ),
        doc="Log-density, among noisy images, of an image as it is or of one with noise on it. "
        f"log Z = {known.log_z:.3f} +- {known.standard_error:.3f} by annealed importance sampling, which "
        f"errs downwards, and {known.reverse:.3f} +- {known.reverse_standard_error:.3f} on the way back, "
        f"which errs upwards if those chains had settled ({model.chains} chains, {TEMPERATURES} "
        "temperatures).",
        parameters=(
            Parameter.choice(
                "blur",
                BLURS,
                "none: at the image itself; draw: at the image with a draw of the noise, by seed, whose mean "
                "over rows is a proper score",
            ),
        ),
        inputs=(Input(value.tensor),),
        noise=(Noise("blur_noise", "normal", (model.dimensions,), 0, "standard normal"),),
        score=Score("estimate", model.dimensions, _scored(model, value), "log_density", "standard_error"),
    )
