"""The energy-based model as the exporter sees it: sizes, programs, golden examples, quality and pictures."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets.loading import Dataset, first_half_mask
from export.evaluation.figures import Drawing, Heatmap, Panel, Scatter
from export.evaluation.sample_quality import (
    SETS,
    SampleEvaluator,
    density,
    mean,
    negative_log_density,
    play,
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

# Of chains that are measured and drawn, and the ages at which they are drawn.
CHAINS, PICTURED = 1000, 100
PROGRESS = (1, 2, 5, 10, 20, 50, 100, 150, 200, 300)
# The picture of a density: -LIMIT..LIMIT on both axes, in so many cells each.
LIMIT, CELLS = 2.5, 200


# Of the starter and of medium.
POINTS = Preset(
    width=128,
    depth=3,
    training=Settings(steps=7500, batch_rows=256, weight_decay=0, ema_decay=0.999),
    evaluation_rows=10_000,
)


class Family:
    """The energy-based model as the exporter sees it."""

    name = "ebm"
    description = (
        "Energy-based model: a base density tilted by a network, learned by noise-contrastive estimation "
        "(Gutmann & Hyvarinen 2012)."
    )
    operations: tuple[str, ...] = ("sample", "sample:langevin", "energy", "score")
    unsupported_operations: Mapping[str, str] = {
        "encode": "it has no latents; energy says how likely a row is",
        "decode": "it has no latents; sample walks from noise to a row",
        "reconstruct": "it has no latents to go through; sample with start=given walks on from a row",
        "classify": "it has learned the rows of all classes together",
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
        """An untrained model, beginning as its base."""
        return EnergyModel(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample by MALA and by unadjusted Langevin steps, energy and score; log Z is estimated here."""
        assert isinstance(network, EnergyModel)
        return *mcmc.programs(network, data.spec), *scoring.programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Chains from noise and from rows, free and with known coordinates; energies and scores of rows."""
        name, rows = data.spec.tensor.name, data.test.rows[:3]
        given, known = {name: rows}, {name: rows, "known": first_half_mask(rows)}
        start, few = {"start": GIVEN}, {"steps": 12}
        drawn = (Example("score", seed=6, parameters={"blur": DRAW}, inputs=given),)
        return (
            Example("sample", seed=1, parameters=few),
            Example("sample", seed=2, first_row=5, parameters={**few, **start}, inputs=given),
            Example("sample", seed=3, parameters=few, inputs=known),
            Example("sample:langevin", seed=4, parameters=few),
            Example("sample:langevin", seed=5, parameters={**few, **start, "noise_scale": 0.5}, inputs=known),
            Example("energy", inputs=given),
            Example("score", inputs=given),
            *(drawn if data.spec.kind == "image" else ()),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """The density of test rows, the estimates of log Z, and how samples compare with test rows."""
        rows = data.test.rows[: preset.evaluation_rows]
        if data.spec.kind == "vector":
            weighed = _scores(interpreter, rows)
            doc = f"Estimate, with Z by quadrature. In {data.spec.tensor.doc}."
            return [
                negative_log_density(weighed["log_density"], doc),
                _log_normaliser(interpreter, rows, weighed, "log Z"),
                two_sample_test(data, _sampler(interpreter), min(CHAINS, preset.evaluation_rows)),
                _acceptance(interpreter),
            ]
        weighed = _scores(interpreter, rows, {"blur": DRAW})
        doc = f"Estimate, with Z by annealed importance sampling. Of {interpreter.program('score').score.coordinate_space}."
        still = _scores(interpreter, rows)
        return [
            negative_log_density(weighed["log_density"], doc),
            _log_normaliser(interpreter, rows, still, "log Z, forwards"),
            _log_normaliser(interpreter, rows, still, "log Z, backwards", "_reverse"),
            *SampleEvaluator.train(data, preset.evaluator).similarity(
                _sampler(interpreter), preset.evaluation_rows
            ),
            _acceptance(interpreter),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples, with the density of points, or the progress of chains and inpainting."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows[:CHAINS], LIMIT),
                Scatter("samples", _chains(interpreter, CHAINS)["point"], LIMIT),
                Heatmap("density", density(interpreter, "score", LIMIT, CELLS), LIMIT),
            ]
        images = data.test.rows[:PICTURED]
        halves = {"image": images, "known": first_half_mask(images)}
        progress = np.stack([_chains(interpreter, 10, {"steps": steps})["image"] for steps in PROGRESS], 1)
        return [
            Panel("test images", images),
            Panel("samples", _chains(interpreter, PICTURED)["image"]),
            Panel(f"chains after {', '.join(map(str, PROGRESS))} steps", np.concatenate(list(progress))),
            Panel(
                "upper halves of the test images, inpainted",
                _chains(interpreter, PICTURED, {}, halves)["image"],
            ),
        ]


def _chains(
    interpreter: Interpreter,
    count: int,
    parameters: Mapping[str, float] | None = None,
    inputs: Mapping[str, NDArray[np.generic]] | None = None,
    seed: int = SETS,
) -> Tensors:
    rows = make_rows(interpreter.program("sample"), seed, range(count), parameters, inputs)
    return interpreter.run("sample", rows, f"  {count} chains")


def _sampler(interpreter: Interpreter) -> Callable[[int, int], NDArray[np.generic]]:
    """Sets of samples as in `measure.sampler`, but all chains of a set in one batch: they are long."""

    def draw(count: int, number: int) -> NDArray[np.generic]:
        return _chains(interpreter, count, seed=number)[interpreter.manifest.data_spec.tensor.name]

    return draw


def _scores(
    interpreter: Interpreter, rows: NDArray[np.generic], parameters: Mapping[str, float] | None = None
) -> Tensors:
    given = {interpreter.manifest.data_spec.tensor.name: rows}
    asked = make_rows(interpreter.program("score"), 0, range(len(rows)), parameters, given)
    return play(interpreter, "score", asked, "scores of test rows")


def _log_normaliser(
    interpreter: Interpreter, rows: NDArray[np.generic], weighed: Tensors, name: str, way: str = ""
) -> manifest_pb2.Quality:
    given = {interpreter.manifest.data_spec.tensor.name: rows[:1]}
    asked = make_rows(interpreter.program("energy"), 0, range(1), inputs=given)
    energy = interpreter.run("energy", asked)["energy"][0]
    return manifest_pb2.Quality(
        name=name,
        value=float(-energy - weighed[f"log_density{way}"][0]),
        unit="nats",
        standard_error=float(weighed[f"standard_error{way}"][0]),
        doc=f"Estimate, of the model by itself. {interpreter.program('score').doc}",
    )


def _acceptance(interpreter: Interpreter) -> manifest_pb2.Quality:
    shares = _chains(interpreter, PICTURED)["acceptance"]
    doc = (
        "Of the model by itself: the share of MALA proposals that are accepted at the default step size, "
        f"over {len(shares)} chains."
    )
    return mean("acceptance", shares, "", doc)


FAMILY = Family()
