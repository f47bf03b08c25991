"""The diffusion family for the exporter: presets, golden requests, quality and figures."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets.loading import Dataset, Split, first_half_mask
from export.evaluation.figures import Heatmap, ImageGrid, Plot, Scatter
from export.evaluation.sample_quality import (
    NUM_SETS,
    SampleEvaluator,
    density_grid,
    make_sampler,
    mean_bits_per_dimension,
    mean_quality,
    negative_log_density,
    run_in_chunks,
    two_sample_test,
)
from export.families.base import Preset
from export.families.diffusion import inversion, ode_likelihood, sampling, variational_bound
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling_graphs import SampleReadout
from export.families.diffusion.solvers import DDIM, HEUN
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Draws of the bound; number of test images scored by the ODE; number of test rows encoded and decoded.
MEASURED_DRAWS, NUM_ODE_ROWS, NUM_ROUND_TRIPS = 20, 200, 200
# The density figure covers the square from -PLOT_LIMIT to PLOT_LIMIT, in PLOT_CELLS x PLOT_CELLS cells.
PLOT_LIMIT, PLOT_CELLS = 2.5, 150


# For points, in the presets starter and medium.
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
    """Exporter family of diffusion models."""

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
        "energy": "the model's density is normalized; use score or score:ode for the log-density",
        "classify": "the model generates rows of a class; its accuracy as a classifier is not measured",
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
        """Return an untrained denoiser, preconditioned by the standard deviation of the training rows."""
        return Denoiser(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return four sampling programs, three latent programs and two scores."""
        assert isinstance(network, Denoiser)
        readout = SampleReadout(network)
        return (
            *sampling.build_programs(network, data.spec, readout),
            *inversion.build_programs(network, data.spec, readout),
            variational_bound.build_program(network, data.spec),
            ode_likelihood.build_program(network, data.spec),
        )

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return short golden requests for each program, and one for sample with the default parameters."""
        tensor, rows = data.spec.tensor, data.test.rows[:2]
        labels: dict[str, NDArray[np.generic]] = {"label": np.arange(2)}
        inputs: dict[str, NDArray[np.generic]] = {tensor.name: rows}
        known, four_steps = first_half_mask(rows), {"steps": 4}
        latent = np.linspace(-2, 2, rows.size, dtype=np.float32).reshape(2, -1)
        return (
            Example("sample", seed=1, rows=2),
            Example("sample", 2, 5, 2, {"sampler": HEUN, "steps": 9}, labels),
            Example("sample", 3, 0, 2, {"sampler": DDIM, "steps": 5, "eta": 1}, labels),
            Example("sample:guided", 4, 0, 2, four_steps, labels),
            Example("sample:edit", 5, 0, 2, {**four_steps, "strength": 0.4}, {**inputs, **labels}),
            Example("sample:inpaint", 6, 0, 2, {"steps": 5, "rounds": 2}, {**inputs, "known": known}),
            # With fewer steps, encode amplifies the rounding errors of the row.
            Example("encode", 0, 0, 2, {"steps": 12}, inputs),
            Example("decode", 0, 0, 2, four_steps, {"latent": latent, **labels}),
            Example("reconstruct", 0, 0, 2, {"steps": 23}, {**inputs, **labels}),
            Example("score", 7, 0, 2, {"draws": 4}, inputs),
            Example("score:ode", 8, 0, 2, {"steps": 13}, {**inputs, **labels}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Measure the likelihood of test rows, the similarity of samples to them, and round trips."""
        test = data.test[: preset.evaluation_rows]
        if data.spec.kind == "vector":
            return [
                *_log_densities(interpreter, test, data.spec.tensor.doc),
                two_sample_test(data, partial(_samples, interpreter), len(test)),
                _round_trip(interpreter, test),
            ]
        return [
            *_bits_per_dimension(interpreter, test, data),
            *_similarity(interpreter, test, SampleEvaluator.train(data, preset.evaluator)),
            _round_trip(interpreter, test),
        ]

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return test rows and samples; for points also the density, for images also edits and inpainting."""
        if data.spec.kind == "vector":
            return [
                Scatter("test points", data.test.rows, PLOT_LIMIT),
                Scatter("samples", _samples(interpreter, len(data.test), 0), PLOT_LIMIT),
                Heatmap(
                    "density", density_grid(interpreter, "score:ode", PLOT_LIMIT, PLOT_CELLS), PLOT_LIMIT
                ),
            ]
        classes = min(10, len(data.spec.class_labels))
        order = np.concatenate([np.flatnonzero(data.test.labels == label)[:10] for label in range(classes)])
        images, labels = data.test.rows[order], data.test.labels[order]
        inputs, edits = {"label": labels}, {"image": images, "label": (labels + 1) % classes}
        halves = {"image": images, "known": first_half_mask(images)}
        return [
            ImageGrid("test images", images),
            ImageGrid(
                f"samples, {sampling.DEFAULT_STEPS} steps", _run(interpreter, "sample", inputs, NUM_SETS)
            ),
            ImageGrid(
                f"guidance {sampling.DEFAULT_GUIDANCE}", _run(interpreter, "sample:guided", inputs, NUM_SETS)
            ),
            ImageGrid("edited into the next class", _run(interpreter, "sample:edit", edits, NUM_SETS)),
            ImageGrid("upper halves, inpainted", _run(interpreter, "sample:inpaint", halves, NUM_SETS)),
        ]


def _run(
    interpreter: Interpreter, name: str, inputs: Mapping[str, NDArray[np.generic]], seed: int = 0
) -> NDArray[np.generic]:
    """Run a program on all inputs in one batch, and return its first output."""
    count = len(next(iter(inputs.values())))
    rows = make_rows(interpreter.program(name), seed, range(count), inputs=inputs)
    return interpreter.run(name, rows)[interpreter.program(name).outputs[0].name]


def _samples(interpreter: Interpreter, count: int, seed: int) -> NDArray[np.generic]:
    """Return samples of points, all in one batch, because points are small."""
    rows = make_rows(interpreter.program("sample"), seed, range(count))
    return interpreter.run("sample", rows)[interpreter.manifest.data_spec.tensor.name]


def _scores(
    interpreter: Interpreter,
    name: str,
    rows: NDArray[np.generic],
    parameters: Mapping[str, float] | None = None,
    labels: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """Return the log-density of each row in nats, float64 [N]. For images, show a progress bar."""
    program, data_spec = interpreter.program(name), interpreter.manifest.data_spec
    inputs = {data_spec.tensor.name: rows} | ({} if labels is None else {"label": labels})
    request = make_rows(program, 0, range(len(rows)), parameters, inputs)
    outputs = (
        run_in_chunks(interpreter, name, request, name)
        if data_spec.num_levels
        else interpreter.run(name, request)
    )
    return outputs[program.score.nats_output].astype(np.float64)


def _log_densities(interpreter: Interpreter, split: Split, space: str) -> list[manifest_pb2.Quality]:
    """Return the ODE estimate and the bound of the negative log-density, without labels."""
    draws = {"draws": MEASURED_DRAWS}
    estimates, bounds = (
        _scores(interpreter, "score:ode", split.rows),
        _scores(interpreter, "score", split.rows, draws),
    )
    estimate = negative_log_density(estimates, f"Estimate by the probability-flow ODE. In {space}.")
    bound = negative_log_density(bounds, f"Upper bound, {MEASURED_DRAWS} draws each. In {space}.")
    bound.name = f"{bound.name}, bound"
    return [estimate, bound]


def _bits_per_dimension(interpreter: Interpreter, split: Split, data: Dataset) -> list[manifest_pb2.Quality]:
    """Return two bounds and the ODE estimate of the bits per dimension of test images."""
    frequencies = np.bincount(data.train.labels, minlength=len(data.spec.class_labels)) / len(data.train)
    draws, ode_rows = {"draws": MEASURED_DRAWS}, split[:NUM_ODE_ROWS]
    with_labels = _scores(interpreter, "score", split.rows, draws, split.labels) + np.log(
        frequencies[split.labels]
    )
    doc = f"Upper bound, {MEASURED_DRAWS} draws each"
    return [
        _bits(with_labels, split, "bound", f"{doc}, for the mixture of classes from which sample draws."),
        _bits(_scores(interpreter, "score", split.rows, draws), split, "bound without labels", f"{doc}."),
        _bits(_scores(interpreter, "score:ode", ode_rows.rows), ode_rows, "ODE without labels", "Estimate."),
    ]


def _bits(nats: NDArray[np.float64], split: Split, detail: str, doc: str) -> manifest_pb2.Quality:
    full_doc = f"{doc} {len(split)} test rows of integers (no offset)."
    return mean_bits_per_dimension(nats, split.rows[0].size, detail, full_doc)


def _similarity(
    interpreter: Interpreter, split: Split, evaluator: SampleEvaluator
) -> list[manifest_pb2.Quality]:
    """Return the similarity of samples to test rows, and the agreement of samples with their labels."""
    labels = np.arange(len(split)) % len(interpreter.manifest.data_spec.class_labels)
    plain, guided = (
        evaluator.label_agreement(_samples_of_labels(interpreter, name, labels), labels)
        for name in ("sample", "sample:guided")
    )
    guided.name = f"label agreement, guidance {sampling.DEFAULT_GUIDANCE}"
    return [*evaluator.similarity(make_sampler(interpreter), len(split)), plain, guided]


def _samples_of_labels(interpreter: Interpreter, name: str, labels: NDArray[np.int64]) -> NDArray[np.generic]:
    rows = make_rows(interpreter.program(name), NUM_SETS, range(len(labels)), inputs={"label": labels})
    return run_in_chunks(interpreter, name, rows, f"labeled samples, {name}")["image"]


def _round_trip(interpreter: Interpreter, split: Split) -> manifest_pb2.Quality:
    data_spec, split = interpreter.manifest.data_spec, split[:NUM_ROUND_TRIPS]
    inputs = {data_spec.tensor.name: split.rows, "label": split.labels}
    decoded = _run(interpreter, "reconstruct", inputs)
    errors = np.abs(decoded.astype(np.float64) - split.rows).reshape(len(split), -1).mean(1)
    return mean_quality(
        "round trip error",
        errors,
        "levels" if data_spec.num_levels else "",
        f"Mean absolute difference of an element after {inversion.DEFAULT_STEPS} steps of encode and as "
        f"many of decode, by heun, over {len(split)} test rows.",
    )


FAMILY = Family()
