"""The RealNVP family for the exporter: presets, golden requests, quality and figures."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset
from export.evaluation.figures import Heatmap, ImageGrid, Plot, Scatter
from export.evaluation.sample_quality import (
    SampleEvaluator,
    bits_per_dimension,
    density_grid,
    make_sampler,
    negative_log_density,
    run_in_chunks,
    two_sample_test,
)
from export.families.base import Preset
from export.families.realnvp.network import RealNVP
from export.families.realnvp.programs import DRAW, build_programs
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Draws of the bound on the likelihood of test images.
MEASURED_DRAWS = 100
# Images in a panel of the figure.
NUM_PANEL_IMAGES = 100
# The density figure covers the square from -PLOT_LIMIT to PLOT_LIMIT, in PLOT_CELLS x PLOT_CELLS cells.
PLOT_LIMIT, PLOT_CELLS = 2.5, 200


# For points, in the presets starter and medium.
POINTS = Preset(
    width=64,
    depth=12,
    training=Settings(steps=8000, batch_rows=256),
    evaluation_rows=10_000,
)


class Family:
    """Exporter family of RealNVP flows."""

    name = "realnvp"
    description = "Normalizing flow of affine couplings (RealNVP, Dinh et al. 2017)."
    operations: tuple[str, ...] = ("sample", "reconstruct", "encode", "decode", "score")
    unsupported_operations: Mapping[str, str] = {
        "energy": "the model's density is normalized; use score for the log-density",
        "classify": "the model is trained without labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=2, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=192,
            depth=12,
            dropout=0.25,
            training=Settings(steps=1600),
            by_kind={"vector": POINTS},
        ),
        "medium": Preset(
            width=384,
            depth=8,
            dropout=0.05,
            training=Settings(steps=4000, learning_rate=1e-3),
            by_kind={"vector": POINTS},
        ),
        "full": Preset(
            width=1024,
            depth=16,
            dropout=0.2,
            training=Settings(steps=30_000, batch_rows=128, learning_rate=5e-4),
            by_kind={
                "vector": Preset(
                    width=128,
                    depth=16,
                    training=Settings(steps=40_000, batch_rows=512),
                    evaluation_rows=10_000,
                )
            },
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> RealNVP:
        """Return an untrained flow. Its couplings and affine maps start as the identity."""
        return RealNVP(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return sample, reconstruct, encode, decode and score."""
        assert isinstance(network, RealNVP)
        return build_programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests on the first test rows, with and without parameters."""
        data_spec, is_point = data.spec, data.spec.kind == "vector"
        rows = {data_spec.tensor.name: data.test.rows[:3]}
        latents = torch.linspace(-2, 2, 3 * math.prod(data_spec.tensor.shape)).reshape(3, -1).numpy()
        image_examples = (
            Example("encode", seed=3, parameters={"dequantization": DRAW}, inputs=rows),
            Example("score", seed=4, parameters={"draws": 25}, inputs=rows),
        )
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"temperature": 0.7}),
            *(Example(operation, inputs=rows) for operation in ("reconstruct", "encode", "score")),
            Example("decode", inputs={"latent": latents}),
            *(() if is_point else image_examples),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Measure the density of test rows and the similarity of samples to test rows."""
        draw, count = make_sampler(interpreter), preset.evaluation_rows
        rows = data.test.rows[:count]
        if data.spec.kind == "vector":
            return [
                negative_log_density(_scores(interpreter, rows), f"In {data.spec.tensor.doc}."),
                two_sample_test(data, draw, count),
            ]
        bounds = [
            bits_per_dimension(_scores(interpreter, rows, {"draws": draws}), rows[0].size, draws)
            for draws in (MEASURED_DRAWS, 1)
        ]
        return [*bounds, *SampleEvaluator.train(data, preset.evaluator).similarity(draw, count)]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return test rows next to samples; for points the density, for images a lower temperature."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows, PLOT_LIMIT),
                Scatter("samples", _samples(interpreter, len(data.test)), PLOT_LIMIT),
                Heatmap("density", density_grid(interpreter, "score", PLOT_LIMIT, PLOT_CELLS), PLOT_LIMIT),
            ]
        return [
            ImageGrid("test images", data.test.rows[:NUM_PANEL_IMAGES]),
            ImageGrid("samples", _samples(interpreter, NUM_PANEL_IMAGES)),
            ImageGrid(
                "samples, temperature 0.7", _samples(interpreter, NUM_PANEL_IMAGES, {"temperature": 0.7})
            ),
        ]


def _samples(
    interpreter: Interpreter, count: int, parameters: Mapping[str, float] | None = None
) -> NDArray[np.generic]:
    rows = make_rows(interpreter.program("sample"), 0, range(count), parameters)
    return interpreter.run("sample", rows)[interpreter.manifest.data_spec.tensor.name]


def _scores(
    interpreter: Interpreter, data_rows: NDArray[np.generic], parameters: Mapping[str, float] | None = None
) -> NDArray[np.float32]:
    program, inputs = interpreter.program("score"), {interpreter.manifest.data_spec.tensor.name: data_rows}
    rows = make_rows(program, 0, range(len(data_rows)), parameters, inputs)
    return run_in_chunks(interpreter, "score", rows, "log-density of test rows")[program.score.nats_output]


FAMILY = Family()
