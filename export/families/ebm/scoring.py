"""The programs energy (with its gradient) and score (log-density with the estimated log Z)."""

import torch
from torch import Tensor

from export.families.ebm.energy import EnergyModel, ModelModule
from export.families.ebm.log_partition import (
    GRID_CELLS,
    GRID_LIMIT,
    NUM_TEMPERATURES,
    LogPartition,
    estimate_log_partition,
)
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, TensorSpec
from export.probability.batch_invariant_ops import batch_invariant_sum

BLURS = ("none", "draw")
DRAW = BLURS.index("draw")


class _Energy(ModelModule):
    """Row -> energy, gradient and norm of the gradient."""

    def evaluate(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        energy, gradient = self.model.energy(self.model.to_coordinates(rows))
        norm = batch_invariant_sum(gradient.square()).sqrt()
        return energy, gradient.reshape(-1, *self.model.shape), norm


class PointEnergy(_Energy):
    """Point -> energy, gradient and norm of the gradient."""

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.evaluate(point)


class ImageEnergy(_Energy):
    """Image -> energy, gradient and norm of the gradient."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.evaluate(image)


class PointScore(ModelModule):
    """Point -> -E - log Z, and the standard error of log Z."""

    def __init__(self, model: EnergyModel, partition: LogPartition) -> None:
        super().__init__(model)
        self.partition = partition

    def forward(self, point: Tensor) -> tuple[Tensor, Tensor]:
        energy, _ = self.model.energy(point)
        return -energy - self.partition.log_z, torch.zeros_like(energy) + self.partition.standard_error


class ImageScore(ModelModule):
    """Image, or the image with noise -> -E - log Z and its standard error, for both estimates of log Z."""

    def __init__(self, model: EnergyModel, partition: LogPartition) -> None:
        super().__init__(model)
        self.partition = partition

    def forward(self, image: Tensor, blur: Tensor, blur_noise: Tensor) -> tuple[Tensor, ...]:
        noise = self.model.smoothing_std * (blur == DRAW).to(blur_noise.dtype).unsqueeze(1) * blur_noise
        energy, _ = self.model.energy(self.model.to_coordinates(image) + noise)
        zeros, partition = torch.zeros_like(energy), self.partition
        return (
            -energy - partition.log_z,
            zeros + partition.standard_error,
            -energy - partition.reverse_log_z,
            zeros + partition.reverse_standard_error,
        )


def build_programs(model: EnergyModel, data_spec: DataSpec) -> tuple[Program, Program]:
    """Return energy and score. Estimates log Z, which takes minutes for images."""
    score = _point_score if data_spec.kind == "vector" else _image_score
    return _energy(model, data_spec), score(model, data_spec)


def _energy(model: EnergyModel, data_spec: DataSpec) -> Program:
    is_point = data_spec.kind == "vector"
    unit = "coordinate" if is_point else "pixel scaled to -1..1"
    location = "the point" if is_point else "the scaled image, without noise"
    return Program(
        operation="energy",
        readout=PointEnergy(model) if is_point else ImageEnergy(model),
        outputs=(
            TensorSpec(
                "energy",
                doc=f"energy of {location}, in nats; lower is more probable, and only differences are "
                "meaningful",
            ),
            TensorSpec(
                "gradient", shape=data_spec.tensor.shape, doc=f"gradient of the energy, in nats per {unit}"
            ),
            TensorSpec("gradient_norm", minimum=0, doc=f"Euclidean norm of the gradient, in nats per {unit}"),
        ),
        doc="Compute the energy of a row: its negative log-density, unnormalized.",
        inputs=(Input(data_spec.tensor),),
        score=Score("unnormalized", model.dimensions, _coordinate_space(model, data_spec), "energy"),
    )


def _coordinate_space(model: EnergyModel, data_spec: DataSpec) -> str:
    return model.coordinate_space if model.smoothing_std else data_spec.tensor.doc


def _point_score(model: EnergyModel, data_spec: DataSpec) -> Program:
    partition = estimate_log_partition(model)
    return Program(
        operation="score",
        readout=PointScore(model, partition),
        outputs=(
            TensorSpec("log_density", doc="log-density of the point, -E - log Z, in nats"),
            TensorSpec(
                "standard_error",
                minimum=0,
                doc="error of log Z, in nats: its change on a grid with half as many cells on each axis",
            ),
        ),
        doc=f"Compute the log-density of a point, -E - log Z, where log Z = {partition.log_z:.4f} is the "
        f"result of quadrature over {GRID_CELLS} x {GRID_CELLS} cells within "
        f"-{GRID_LIMIT:g}..{GRID_LIMIT:g}.",
        inputs=(Input(data_spec.tensor),),
        score=Score(
            "estimate",
            model.dimensions,
            _coordinate_space(model, data_spec),
            "log_density",
            "standard_error",
        ),
    )


def _image_score(model: EnergyModel, data_spec: DataSpec) -> Program:
    partition = estimate_log_partition(model)
    return Program(
        operation="score",
        readout=ImageScore(model, partition),
        outputs=(
            TensorSpec(
                "log_density",
                doc="log-density of the noisy image, -E - log Z, in nats; not a probability of integers",
            ),
            TensorSpec(
                "standard_error", minimum=0, doc="standard error of log Z, in nats; the same for all rows"
            ),
            TensorSpec(
                "log_density_reverse",
                doc="the same with log Z from chains that run from the model to the base",
            ),
            TensorSpec(
                "standard_error_reverse",
                minimum=0,
                doc="standard error of that log Z, in nats, for independent chains",
            ),
        ),
        doc="Compute the log-density of an image, or of an image with noise, under the density of noisy "
        f"images. log Z = {partition.log_z:.3f} +- {partition.standard_error:.3f} by annealed importance "
        f"sampling, whose error is downwards on average, and {partition.reverse_log_z:.3f} +- "
        f"{partition.reverse_standard_error:.3f} in the reverse direction, whose error is upwards if the "
        f"chains had converged ({model.num_chains} chains, {NUM_TEMPERATURES} temperatures).",
        parameters=(
            Parameter.choice(
                "blur",
                BLURS,
                "none: score the image itself; draw: add a draw of the noise, chosen by the seed; the mean "
                "over rows is then a proper score",
            ),
        ),
        inputs=(Input(data_spec.tensor),),
        noise=(Noise("blur_noise", "normal", (model.dimensions,), 0, "noise on the pixels, for blur draw"),),
        score=Score(
            "estimate",
            model.dimensions,
            _coordinate_space(model, data_spec),
            "log_density",
            "standard_error",
        ),
    )
