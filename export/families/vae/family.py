"""The VAE family for the exporter: presets, golden requests, quality and figures."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset, first_half_mask
from export.evaluation.figures import ImageGrid
from export.evaluation.sample_quality import SampleEvaluator, bits_per_dimension, make_sampler, run_in_chunks
from export.families.base import Preset
from export.families.vae.network import LATENT_DIMENSIONS, VAE
from export.families.vae.programs import build_programs
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Draws of the bound on the likelihood of test images.
MEASURED_DRAWS = 500
# Images in a panel of the figure.
NUM_PANEL_IMAGES = 100


class Family:
    """Exporter family of variational autoencoders."""

    name = "vae"
    description = (
        "Variational autoencoder (Kingma & Welling 2013), trained on the bound of Burda et al. (2015)."
    )
    operations = ("sample", "sample:inpaint", "reconstruct", "encode", "decode", "score")
    unsupported_operations: Mapping[str, str] = {
        "energy": "the log-density is an integral without a closed form; use score for a lower bound",
        "classify": "the model is trained without labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(width=384, depth=2, dropout=0.1, training=Settings(steps=1300)),
        "medium": Preset(
            width=512,
            depth=2,
            training=Settings(steps=5000, learning_rate=1e-3),
        ),
        "full": Preset(
            width=1024,
            depth=3,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=128, learning_rate=1e-3),
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> VAE:
        """Return an untrained autoencoder with LATENT_DIMENSIONS latent dimensions."""
        return VAE(data.spec.tensor.shape, data.spec.num_levels, LATENT_DIMENSIONS, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return sample, sample:inpaint, reconstruct, encode, decode and score."""
        assert isinstance(network, VAE)
        return build_programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests on the first test rows, with and without parameters."""
        images = data.test.rows[:3]
        latents = torch.linspace(-2, 2, 3 * LATENT_DIMENSIONS).reshape(3, -1).numpy()
        upper_half = {"image": images, "known": first_half_mask(images)}
        few_steps = {"steps": 4, "chain": 0, "pixels": 0}
        return (
            Example("sample", seed=1),
            Example("sample", seed=2, first_row=7, parameters={"temperature": 0.7, "pixels": 0}),
            Example("sample:inpaint", seed=6, parameters={"steps": 3}, inputs=upper_half),
            Example("sample:inpaint", seed=7, parameters=few_steps, inputs=upper_half),
            Example("reconstruct", inputs={"image": images}),
            Example("reconstruct", seed=3, parameters={"latent": 1}, inputs={"image": images}),
            Example("encode", inputs={"image": images}),
            Example("decode", inputs={"latent": latents}),
            Example("decode", seed=8, parameters={"pixels": 1}, inputs={"latent": latents}),
            Example("score", seed=4, parameters={"draws": 25}, inputs={"image": images}),
            Example("score", seed=5, first_row=2, rows=2, inputs={"image": images[:2]}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Return bits per dimension of test images, and the distances between samples and test images."""
        images = data.test.rows[: preset.evaluation_rows]
        evaluator = SampleEvaluator.train(data, preset.evaluator)
        return [
            *(_bits_per_dimension(interpreter, images, draws) for draws in (MEASURED_DRAWS, 1)),
            *evaluator.similarity(make_sampler(interpreter), preset.evaluation_rows),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> list[ImageGrid]:
        """Return test images, their reconstructions, and samples."""
        images = data.test.rows[:NUM_PANEL_IMAGES]
        sample, reconstruct = (interpreter.program(name) for name in ("sample", "reconstruct"))
        sample_rows = make_rows(sample, 0, range(NUM_PANEL_IMAGES))
        image_rows = make_rows(reconstruct, 0, range(len(images)), inputs={"image": images})
        return [
            ImageGrid("test images", images),
            ImageGrid("their reconstructions", interpreter.run("reconstruct", image_rows)["image"]),
            ImageGrid("samples", interpreter.run("sample", sample_rows)["image"]),
        ]


def _bits_per_dimension(
    interpreter: Interpreter, images: NDArray[np.uint8], draws: int
) -> manifest_pb2.Quality:
    rows = make_rows(interpreter.program("score"), 0, range(len(images)), {"draws": draws}, {"image": images})
    outputs = run_in_chunks(interpreter, "score", rows, f"bound with {draws} draws")
    return bits_per_dimension(outputs["log_likelihood"], images[0].size, draws)


FAMILY = Family()
