"""Sections that evaluate rows: density of the plane, distribution of scores, and calibration."""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from export.evaluation.figures import cell_centers
from export.evaluation.sample_quality import standard_error
from export.report import charts
from export.report.loaded_artifact import TOKENS, VECTOR, LoadedArtifact, Program, Rows
from export.report.sections.base import Section
from samovar.v1 import manifest_pb2

# Kinds of a score, and of a figure that is the mean of a score with its sign changed.
KINDS = {
    manifest_pb2.Score.KIND_EXACT: "exact",
    manifest_pb2.Score.KIND_LOWER_BOUND: "lower bound",
    manifest_pb2.Score.KIND_ESTIMATE: "estimate",
    manifest_pb2.Score.KIND_UNNORMALIZED: "up to a constant",
}
NEGATED_KINDS = {**KINDS, manifest_pb2.Score.KIND_LOWER_BOUND: "upper bound"}
# Cells of the density on each axis.
_NUM_CELLS = 120
# Rows that are scored, at most and at least.
_MAX_SCORED, _MIN_SCORED = 200, 10
_MAX_CLASSIFIED = 1000


def density_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return the density of points in the plane, by the first program that computes one."""
    names = (name for name, program in artifact.programs.items() if _is_density(program))
    name = next(filter(artifact.single_input, names), "")
    if not name or tuple(artifact.data_spec.tensor.shape) != (2,):
        return
    program, (_, limit) = artifact.programs[name], artifact.limits
    points = cell_centers(limit, _NUM_CELLS)
    nats = artifact.run_all(name, {artifact.single_input(name): points})[program.score.nats_output]
    values = np.exp(nats.astype(np.float64)).reshape(_NUM_CELLS, _NUM_CELLS)
    mass = values.sum() * (2 * limit / _NUM_CELLS) ** 2
    caption = f"By {name}, {_format_kind(program, KINDS)}. The integral over the figure is {mass:.3f}."
    yield Section("Density", caption, charts.heatmap(values, artifact.limits, "Density"))


def _is_density(program: Program) -> bool:
    """Return whether exp(score) is a density. If the score has noise, exp(score) is too large on average."""
    is_normalized = program.score.kind != manifest_pb2.Score.KIND_UNNORMALIZED
    return program.operation == "score" and is_normalized and not program.noise


def score_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return the scores or energies of test rows and samples; those of a model that fits are alike."""
    name = next((name for name in ("score", "energy") if artifact.single_input(name)), "")
    rows = {"test rows": artifact.test.rows if artifact.test else None, "samples": artifact.samples}
    series = {
        origin: _evaluate(artifact, name, values[:_MAX_SCORED])
        for origin, values in rows.items()
        if name and values is not None and len(values) >= _MIN_SCORED
    }
    if series:
        program = artifact.programs[name]
        means = "; ".join(f"{origin} {_format_mean(values)}" for origin, values in series.items())
        label, title = _axis_label(artifact, program), f"Distribution of the {name}"
        caption = f"{label}: {means}. {program.doc}"
        yield Section(title, caption, charts.histogram(series, label, title))


def _evaluate(artifact: LoadedArtifact, name: str, rows: Rows) -> NDArray[np.float64]:
    """Return energies, or negative scores: of points in nats, of other rows in bits per dimension."""
    program = artifact.programs[name]
    outputs = artifact.run_all(name, {artifact.single_input(name): rows})
    if name == "energy":
        return np.asarray(next(iter(outputs.values())), np.float64)
    nats, score = -outputs[program.score.nats_output].astype(np.float64), program.score
    if artifact.data_spec.kind == VECTOR:
        return nats
    dimensions = outputs[score.row_dimensions_output] if score.row_dimensions_output else score.dimensions
    return np.asarray(nats / (np.maximum(dimensions, 1) * math.log(2)))


def _axis_label(artifact: LoadedArtifact, program: Program) -> str:
    if program.operation == "energy":
        return program.outputs[0].name
    unit = {VECTOR: "nats", TOKENS: "bits/token"}.get(artifact.data_spec.kind, "bits/dim")
    return f"negative log-density, {_format_kind(program, NEGATED_KINDS)}, {unit}"


def _format_kind(program: Program, kinds: Mapping[manifest_pb2.Score.Kind.ValueType, str]) -> str:
    return kinds.get(program.score.kind, "of unknown kind")


def _format_mean(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.3f} ± {standard_error(values):.3f} (mean of {len(values)})"


def calibration_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return the reliability diagram of a classifier on test rows."""
    row_input = artifact.single_input("classify")
    if not row_input or artifact.test is None:
        return
    test = artifact.test[:_MAX_CLASSIFIED]
    probabilities = artifact.run("classify", {row_input: test.rows})
    is_correct = probabilities.argmax(1) == test.labels
    figure = charts.reliability_diagram(probabilities.max(1), is_correct, "Calibration")
    yield Section(
        "Calibration",
        f"Accuracy by the probability of the predicted label, on {len(test)} test rows; overall accuracy "
        f"{is_correct.mean():.3f}. The area of a dot is proportional to its number of rows. Perfectly "
        "calibrated probabilities lie on the dotted line.",
        figure,
    )
