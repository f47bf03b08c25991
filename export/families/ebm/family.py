"""The energy-based family for the exporter: presets, golden requests, quality and figures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets.loading import Dataset, first_half_mask
from export.evaluation.figures import Heatmap, ImageGrid, Plot, Scatter
from export.evaluation.sample_quality import (
    NUM_SETS,
    SampleEvaluator,
    density_grid,
    mean_quality,
    negative_log_density,
    run_in_chunks,
    two_sample_test,
)
from export.families.base import Preset
from export.families.ebm import mcmc, scoring
from export.families.ebm.energy import EnergyModel
from export.families.ebm.mcmc import GIVEN
from export.families.ebm.scoring import DRAW
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Chains compared with test points; chains in a panel of the figure; numbers of steps after which panels
# show chains.
NUM_COMPARED_CHAINS, NUM_PANEL_IMAGES = 1000, 100
PROGRESS_STEPS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300)
# The density figure covers the square from -PLOT_LIMIT to PLOT_LIMIT, in PLOT_CELLS x PLOT_CELLS cells.
PLOT_LIMIT, PLOT_CELLS = 2.5, 200


# For points, in the presets starter and medium.
POINTS = Preset(
    width=128,
    depth=3,
    training=Settings(steps=7500, batch_rows=256, weight_decay=0, ema_decay=0.999),
    evaluation_rows=10_000,
)


class Family:
    """Exporter family of energy-based models."""

    name = "ebm"
    description = (
        "Energy-based model: a base density reweighted by a network, trained by noise-contrastive estimation "
        " "
        "(Gutmann & Hyvarinen 2012)."
    )
    operations: tuple[str, ...] = ("sample", "sample:langevin", "energy", "score")
    unsupported_operations: Mapping[str, str] = {
        "encode": "the model has no latents; use energy to compare rows",
        "decode": "the model has no latents; use sample to generate a row from noise",
        "reconstruct": "the model has no latents; use sample with start=given to continue a chain from a row",
        "classify": "the model is trained without labels",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=16, depth=1, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=32,
            depth=2,
            training=Settings(steps=2400, weight_decay=0.1),
            by_kind={"vector": POINTS},
        ),
        "medium": Preset(
            width=24,
            depth=3,
            training=Settings(steps=6000, seconds=900, learning_rate=1e-3),
            by_kind={"vector": POINTS},
        ),
        "full": Preset(
            width=64,
            depth=3,
            training=Settings(steps=40_000, batch_rows=128, learning_rate=1e-3, ema_decay=0.999),
            evaluation_rows=1000,
            by_kind={
                "vector": Preset(
                    width=256,
                    depth=3,
                    training=Settings(steps=40_000, batch_rows=512, weight_decay=0, ema_decay=0.999),
                    evaluation_rows=10_000,
                )
            },
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> EnergyModel:
        """Return an untrained model, whose density is the base density."""
        return EnergyModel(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return two sampling programs, energy and score. Estimates log Z, which takes minutes for images."""
        assert isinstance(network, EnergyModel)
        return *mcmc.build_programs(network, data.spec), *scoring.build_programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests: chains with all kinds of inputs, energies and scores."""
        name, rows = data.spec.tensor.name, data.test.rows[:3]
        inputs, known = {name: rows}, {name: rows, "known": first_half_mask(rows)}
        start, steps = {"start": GIVEN}, {"steps": 12}
        blurred = (Example("score", seed=6, parameters={"blur": DRAW}, inputs=inputs),)
        return (
            Example("sample", seed=1, parameters=steps),
            Example("sample", seed=2, first_row=5, parameters={**steps, **start}, inputs=inputs),
            Example("sample", seed=3, parameters=steps, inputs=known),
            Example("sample:langevin", seed=4, parameters=steps),
            Example(
                "sample:langevin", seed=5, parameters={**steps, **start, "noise_scale": 0.5}, inputs=known
            ),
            Example("energy", inputs=inputs),
            Example("score", inputs=inputs),
            *(blurred if data.spec.kind == "image" else ()),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Measure the density of test rows, log Z, the similarity of samples to test rows, and acceptance."""
        rows = data.test.rows[: preset.evaluation_rows]
        if data.spec.kind == "vector":
            scores = _scores(interpreter, rows)
            doc = f"Estimate, with Z by quadrature. In {data.spec.tensor.doc}."
            return [
                negative_log_density(scores["log_density"], doc),
                _log_partition(interpreter, rows, scores, "log Z"),
                two_sample_test(
                    data, _sampler(interpreter), min(NUM_COMPARED_CHAINS, preset.evaluation_rows)
                ),
                _acceptance(interpreter),
            ]
        blurred = _scores(interpreter, rows, {"blur": DRAW})
        space = interpreter.program("score").score.coordinate_space
        doc = f"Estimate, with Z by annealed importance sampling. Of {space}."
        scores = _scores(interpreter, rows)
        return [
            negative_log_density(blurred["log_density"], doc),
            _log_partition(interpreter, rows, scores, "log Z, forwards"),
            _log_partition(interpreter, rows, scores, "log Z, backwards", "_reverse"),
            *SampleEvaluator.train(data, preset.evaluator).similarity(
                _sampler(interpreter), preset.evaluation_rows
            ),
            _acceptance(interpreter),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return test rows and samples; for points the density, for images progress and inpainting."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows[:NUM_COMPARED_CHAINS], PLOT_LIMIT),
                Scatter("samples", _chains(interpreter, NUM_COMPARED_CHAINS)["point"], PLOT_LIMIT),
                Heatmap("density", density_grid(interpreter, "score", PLOT_LIMIT, PLOT_CELLS), PLOT_LIMIT),
            ]
        images = data.test.rows[:NUM_PANEL_IMAGES]
        halves = {"image": images, "known": first_half_mask(images)}
        progress = np.stack(
            [_chains(interpreter, 10, {"steps": steps})["image"] for steps in PROGRESS_STEPS], 1
        )
        return [
            ImageGrid("test images", images),
            ImageGrid("samples", _chains(interpreter, NUM_PANEL_IMAGES)["image"]),
            ImageGrid(
                f"chains after {', '.join(map(str, PROGRESS_STEPS))} steps", np.concatenate(list(progress))
            ),
            ImageGrid(
                "upper halves of the test images, inpainted",
                _chains(interpreter, NUM_PANEL_IMAGES, {}, halves)["image"],
            ),
        ]


def _chains(
    interpreter: Interpreter,
    count: int,
    parameters: Mapping[str, float] | None = None,
    inputs: Mapping[str, NDArray[np.generic]] | None = None,
    seed: int = NUM_SETS,
) -> Tensors:
    rows = make_rows(interpreter.program("sample"), seed, range(count), parameters, inputs)
    return interpreter.run("sample", rows, f"  {count} chains")


def _sampler(interpreter: Interpreter) -> Callable[[int, int], NDArray[np.generic]]:
    """Return a function for sets of samples, like `make_sampler`, with all chains of a set in one batch.

    Chains have many steps, so a large batch is faster.
    """

    def draw(count: int, number: int) -> NDArray[np.generic]:
        return _chains(interpreter, count, seed=number)[interpreter.manifest.data_spec.tensor.name]

    return draw


def _scores(
    interpreter: Interpreter, rows: NDArray[np.generic], parameters: Mapping[str, float] | None = None
) -> Tensors:
    inputs = {interpreter.manifest.data_spec.tensor.name: rows}
    request = make_rows(interpreter.program("score"), 0, range(len(rows)), parameters, inputs)
    return run_in_chunks(interpreter, "score", request, "scores of test rows")


def _log_partition(
    interpreter: Interpreter, rows: NDArray[np.generic], scores: Tensors, name: str, suffix: str = ""
) -> manifest_pb2.Quality:
    inputs = {interpreter.manifest.data_spec.tensor.name: rows[:1]}
    request = make_rows(interpreter.program("energy"), 0, range(1), inputs=inputs)
    energy = interpreter.run("energy", request)["energy"][0]
    return manifest_pb2.Quality(
        name=name,
        value=float(-energy - scores[f"log_density{suffix}"][0]),
        unit="nats",
        standard_error=float(scores[f"standard_error{suffix}"][0]),
        doc=f"Estimate; a property of the model alone. {interpreter.program('score').doc}",
    )


def _acceptance(interpreter: Interpreter) -> manifest_pb2.Quality:
    rates = _chains(interpreter, NUM_PANEL_IMAGES)["acceptance"]
    doc = (
        "Fraction of MALA proposals that are accepted at the default step size, over "
        f"{len(rates)} chains; a property of the model alone."
    )
    return mean_quality("acceptance", rates, "", doc)


FAMILY = Family()
