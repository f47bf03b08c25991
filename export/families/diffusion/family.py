"""The diffusion model as the exporter sees it: presets, golden requests, figures and pictures."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset, Split, first_half_mask
from export.evaluation.figures import Drawing, Heatmap, Panel, Scatter
from export.evaluation.sample_quality import (
    SETS,
    SampleEvaluator,
    density,
    mean,
    mean_bits,
    negative_log_density,
    play,
    sampler,
    two_sample_test,
)
from export.families.base import Preset
from export.families.diffusion import inversion, ode_likelihood, sampling, variational_bound
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.solvers import DDIM, HEUN
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# What is measured: draws of the bound, rows by the ODE and rows there and back.
MEASURED_DRAWS, MEASURED_BY_ODE, ROUND_TRIPS = 20, 200, 200
# The picture of a density: -LIMIT..LIMIT on both axes, in so many cells each.
LIMIT, CELLS = 2.5, 150


# Of the starter and of medium.
POINTS = Preset(
    width=128,
    depth=4,
    training=Settings(
        steps=7000,
        batch_rows=512,
        learning_rate=1.5e-3,
        weight_decay=0,
        ema_decay=0.999,
    ),
    evaluation_rows=10_000,
)


class Family:
    """The diffusion model as the exporter sees it."""

    name = "diffusion"
    description = (
        "Class-conditional diffusion model (EDM, Karras et al. 2022) with DDIM, Heun and DPM-Solver++(2M)."
    )
    operations: tuple[str, ...] = (
        "sample",
        "sample:guided",
        "sample:edit",
        "sample:inpaint",
        "encode",
        "decode",
        "reconstruct",
        "score",
        "score:ode",
    )
    unsupported_operations: Mapping[str, str] = {
        "energy": "score bounds the normalised log-density and score:ode estimates it, so nothing is left "
        "unnormalised",
        "classify": "it learns rows given their class; what that says of a row's class is not measured",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(
            width=8, depth=1, training=Settings(steps=1), evaluator=Settings(steps=1), evaluation_rows=20
        ),
        "starter": Preset(
            width=32,
            depth=1,
            training=Settings(steps=1000, batch_rows=128),
            by_kind={"vector": POINTS},
        ),
        "medium": Preset(
            width=24,
            depth=1,
            training=Settings(steps=2500, seconds=1200),
            by_kind={"vector": POINTS},
        ),
        "full": Preset(
            width=96,
            depth=2,
            dropout=0.1,
            training=Settings(steps=20_000, batch_rows=256, learning_rate=5e-4),
            by_kind={
                "vector": Preset(
                    width=256,
                    depth=4,
                    training=Settings(steps=40_000, batch_rows=512, weight_decay=0, ema_decay=0.999),
                    evaluation_rows=10_000,
                )
            },
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> Denoiser:
        """An untrained denoiser, preconditioned by the spread of the training rows."""
        return Denoiser(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Samples in four ways, latents, and two scores."""
        assert isinstance(network, Denoiser)
        made = sampling.programs(network, data.spec)
        readout = made[0].readout
        assert isinstance(readout, sampling.Readout)
        return (
            *made,
            *inversion.programs(network, data.spec, readout),
            variational_bound.program(network, data.spec),
            ode_likelihood.program(network, data.spec),
        )

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """A few short requests to each program, and the default one to sample."""
        tensor, rows = data.spec.tensor, data.test.rows[:2]
        labels: dict[str, NDArray[np.generic]] = {"label": np.arange(2)}
        given: dict[str, NDArray[np.generic]] = {tensor.name: rows}
        known, few = first_half_mask(rows), {"steps": 4}
        latent = np.linspace(-2, 2, rows.size, dtype=np.float32).reshape(2, -1)
        return (
            Example("sample", seed=1, rows=2),
            Example("sample", 2, 5, 2, {"sampler": HEUN, "steps": 9}, labels),
            Example("sample", 3, 0, 2, {"sampler": DDIM, "steps": 5, "eta": 1}, labels),
            Example("sample:guided", 4, 0, 2, few, labels),
            Example("sample:edit", 5, 0, 2, {**few, "strength": 0.4}, {**given, **labels}),
            Example("sample:inpaint", 6, 0, 2, {"steps": 5, "rounds": 2}, {**given, "known": known}),
            # Shorter walks jump so far from the row that they magnify its last bits.
            Example("encode", 0, 0, 2, {"steps": 12}, given),
            Example("decode", 0, 0, 2, few, {"latent": latent, **labels}),
            Example("reconstruct", 0, 0, 2, {"steps": 23}, {**given, **labels}),
            Example("score", 7, 0, 2, {"draws": 4}, given),
            Example("score:ode", 8, 0, 2, {"steps": 13}, {**given, **labels}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """The density of test rows, and how samples compare with them."""
        part = data.test[: preset.evaluation_rows]
        if data.spec.kind == "vector":
            return [
                *_log_densities(interpreter, part, data.spec.tensor.doc),
                two_sample_test(data, partial(_samples, interpreter), len(part)),
                _round_trip(interpreter, part),
            ]
        return [
            *_bits_per_dimension(interpreter, part, data),
            *_similarity(interpreter, part, SampleEvaluator.train(data, preset.evaluator)),
            _round_trip(interpreter, part),
        ]

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples; of points their density, of images what becomes of given ones."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows, LIMIT),
                Scatter("samples", _samples(interpreter, len(data.test), 0), LIMIT),
                Heatmap("density", density(interpreter, "score:ode", LIMIT, CELLS), LIMIT),
            ]
        classes = min(10, len(data.spec.class_labels))
        order = np.concatenate([np.flatnonzero(data.test.labels == label)[:10] for label in range(classes)])
        images, labels = data.test.rows[order], data.test.labels[order]
        made, turned = {"label": labels}, {"image": images, "label": (labels + 1) % classes}
        halves = {"image": images, "known": first_half_mask(images)}
        return [
            Panel("test images", images),
            Panel(f"samples, {sampling.DEFAULT_STEPS} steps", _play(interpreter, "sample", made, SETS)),
            Panel(f"guidance {sampling.GUIDANCE}", _play(interpreter, "sample:guided", made, SETS)),
            Panel("edited into the next class", _play(interpreter, "sample:edit", turned, SETS)),
            Panel("upper halves, inpainted", _play(interpreter, "sample:inpaint", halves, SETS)),
        ]


def _play(
    interpreter: Interpreter, name: str, inputs: Mapping[str, NDArray[np.generic]], seed: int = 0
) -> NDArray[np.generic]:
    """What a program makes of inputs, all rows in one batch."""
    count = len(next(iter(inputs.values())))
    rows = make_rows(interpreter.program(name), seed, range(count), inputs=inputs)
    return interpreter.run(name, rows)[interpreter.program(name).outputs[0].name]


def _samples(interpreter: Interpreter, count: int, seed: int) -> NDArray[np.generic]:
    """Points are so small that one batch takes them all."""
    rows = make_rows(interpreter.program("sample"), seed, range(count))
    return interpreter.run("sample", rows)[interpreter.manifest.data_spec.tensor.name]


def _scores(
    interpreter: Interpreter,
    name: str,
    rows: NDArray[np.generic],
    parameters: Mapping[str, float] | None = None,
    labels: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Log-densities of rows in nats, of images under a progress bar."""
    program, value = interpreter.program(name), interpreter.manifest.data_spec
    given = {value.tensor.name: rows} | ({} if labels is None else {"label": labels})
    asked = make_rows(program, 0, range(len(rows)), parameters, given)
    answers = play(interpreter, name, asked, name) if value.num_levels else interpreter.run(name, asked)
    return answers[program.score.nats_output].astype(np.float64)


def _log_densities(interpreter: Interpreter, part: Split, space: str) -> list[manifest_pb2.Quality]:
    """The estimate and the bound of test points, without their labels."""
    draws = {"draws": MEASURED_DRAWS}
    by_ode, bounded = (
        _scores(interpreter, "score:ode", part.rows),
        _scores(interpreter, "score", part.rows, draws),
    )
    main = negative_log_density(by_ode, f"Estimate by the probability-flow ODE. In {space}.")
    other = negative_log_density(bounded, f"Upper bound, {MEASURED_DRAWS} draws each. In {space}.")
    other.name = f"{other.name}, bound"
    return [main, other]


def _bits_per_dimension(interpreter: Interpreter, part: Split, data: Dataset) -> list[manifest_pb2.Quality]:
    """The bounds and the estimate of test rows."""
    shares = np.bincount(data.train.labels, minlength=len(data.spec.class_labels)) / len(data.train)
    draws, some = {"draws": MEASURED_DRAWS}, part[:MEASURED_BY_ODE]
    given = _scores(interpreter, "score", part.rows, draws, part.labels) + np.log(shares[part.labels])
    kind = f"Upper bound, {MEASURED_DRAWS} draws each"
    return [
        _bits(given, part, "bound", f"{kind}, of the mixture over classes that sample draws from."),
        _bits(_scores(interpreter, "score", part.rows, draws), part, "bound without labels", f"{kind}."),
        _bits(_scores(interpreter, "score:ode", some.rows), some, "ODE without labels", "Estimate."),
    ]


def _bits(nats: NDArray[np.float64], part: Split, detail: str, doc: str) -> manifest_pb2.Quality:
    whole = f"{doc} Of {len(part)} test rows of integers (no offset)."
    return mean_bits(nats, part.rows[0].size, detail, whole)


def _similarity(interpreter: Interpreter, part: Split, judge: SampleEvaluator) -> list[manifest_pb2.Quality]:
    """How samples compare with test rows, and whether they show the label that they were asked for."""
    labels = np.arange(len(part)) % len(interpreter.manifest.data_spec.class_labels)
    plain, guided = (
        judge.agreement(_labelled(interpreter, name, labels), labels) for name in ("sample", "sample:guided")
    )
    guided.name = f"label agreement, guidance {sampling.GUIDANCE}"
    return [*judge.similarity(sampler(interpreter), len(part)), plain, guided]


def _labelled(interpreter: Interpreter, name: str, labels: NDArray[np.int64]) -> NDArray[np.generic]:
    rows = make_rows(interpreter.program(name), SETS, range(len(labels)), inputs={"label": labels})
    return play(interpreter, name, rows, f"labelled samples, {name}")["image"]


def _round_trip(interpreter: Interpreter, part: Split) -> manifest_pb2.Quality:
    value, part = interpreter.manifest.data_spec, part[:ROUND_TRIPS]
    again = _play(interpreter, "reconstruct", {value.tensor.name: part.rows, "label": part.labels})
    errors = np.abs(again.astype(np.float64) - part.rows).reshape(len(part), -1).mean(1)
    return mean(
        "round trip error",
        errors,
        "levels" if value.num_levels else "",
        f"Mean absolute difference of an element after {inversion.DEFAULT_STEPS} steps of encode and as "
        f"many of decode, by heun, of {len(part)} test rows.",
    )


FAMILY = Family()
