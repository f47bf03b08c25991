"""What an artifact has to show: samples, ways between latents, densities, calibration.

Every exhibit follows from the operations that the manifest declares and is computed by the graphs in the
artifact, so models of one's own have exhibits too. Knows no family, and no page.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, Tensors, make_rows
from export.datasets import chorales, text
from export.datasets.loading import Split, first_half_mask
from export.evaluation.figures import cells
from export.evaluation.sample_quality import standard_error
from export.graphs.program import program_name
from export.report import charts, snippets
from export.report.snippets import required
from samovar.v1 import manifest_pb2

Rows = NDArray[Any]
Program = manifest_pb2.Program

IMAGE, VECTOR, TOKENS = (
    manifest_pb2.DataSpec.KIND_IMAGE,
    manifest_pb2.DataSpec.KIND_VECTOR,
    manifest_pb2.DataSpec.KIND_TOKENS,
)
COLUMNS = 10
SCORED = 200
LINES = 6
CELLS = 120
SEED = 0
_DRAWN = {IMAGE: 100, VECTOR: 2000, TOKENS: 3}
# A program may need a thousand numbers for each element, as one does that tries 256 levels in 10 classes.
_ELEMENTS_AT_ONCE = 15_000
# Of the points' extent.
_MARGIN = 1.1
# Of a score, and of a figure that is the mean of one with its sign changed.
KINDS = {
    manifest_pb2.Score.KIND_EXACT: "exact",
    manifest_pb2.Score.KIND_LOWER_BOUND: "lower bound",
    manifest_pb2.Score.KIND_ESTIMATE: "estimate",
    manifest_pb2.Score.KIND_UNNORMALIZED: "up to a constant",
}
NEGATED_KINDS = {**KINDS, manifest_pb2.Score.KIND_LOWER_BOUND: "upper bound"}


@dataclass(frozen=True)
class Section:
    """Something to look at, and a sentence that says how it came about."""

    title: str
    caption: str
    figure: Markup
    is_wide: bool = False


@dataclass(frozen=True)
class LoadedArtifact:
    """An artifact that runs, and the test rows of its data where they are at hand."""

    interpreter: Interpreter
    test: Split | None

    @property
    def value(self) -> manifest_pb2.DataSpec:
        """What one row is."""
        return self.interpreter.manifest.data_spec

    @cached_property
    def programs(self) -> Mapping[str, Program]:
        """Programs by name, methods included."""
        return {
            program_name(each.operation, each.variant): each for each in self.interpreter.manifest.programs
        }

    @cached_property
    def samples(self) -> Rows | None:
        """Rows drawn in the usual way; None where that takes more than labels."""
        usual = self.programs.get("sample")
        return self.draw("sample") if usual and not required(usual) else None

    @cached_property
    def shown(self) -> Split | None:
        """As many test rows as are shown, the classes in turn where there are classes."""
        return None if self.test is None else _by_class(self.test, self.value)

    @property
    def real(self) -> Rows | None:
        """Rows to show and to work on: test rows, else samples."""
        return self.samples if self.shown is None else self.shown.rows

    @property
    def origin(self) -> str:
        """What the rows to work on are."""
        return "samples, for the data set is not at hand" if self.test is None else "test rows"

    @property
    def is_plane(self) -> bool:
        """Whether rows are points whose first two coordinates can be drawn."""
        return self.value.kind == VECTOR and len(self.value.tensor.shape) == 1 < self.value.tensor.shape[0]

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Of both axes, around all points."""
        clouds = [rows[:, :2] for rows in (self.real, self.samples) if rows is not None]
        extent = _MARGIN * max((float(np.quantile(abs(cloud), 0.999)) for cloud in clouds), default=3.0)
        return -extent, extent

    def bright(self, images: Rows) -> NDArray[np.float64]:
        """Images by brightness, 0..1, as far as the value says what is dark and what is bright."""
        spec, levels = self.value.tensor, self.value.num_levels
        low = spec.minimum if spec.HasField("minimum") else 0.0
        high = spec.maximum if spec.HasField("maximum") else max(levels - 1.0, 1.0)
        return np.clip((images.astype(np.float64) - low) / (high - low), 0, 1)

    def only_input(self, name: str) -> str:
        """The one input that a program requires; nothing where it has more or none, or is not there."""
        needed = required(self.programs[name]) if name in self.programs else []
        return needed[0] if len(needed) == 1 else ""

    def has_labels(self, name: str) -> bool:
        """Whether a program can be asked for rows of a class."""
        labelled = any(each.tensor.name == "label" for each in self.programs[name].inputs)
        return labelled and bool(self.value.class_labels)

    def draw(self, name: str) -> Rows:
        """Rows of a program that needs none, the classes in turn where it takes a label."""
        count = _DRAWN[self.value.kind]
        labels = np.arange(count) % max(len(self.value.class_labels), 1)
        return self.play(name, {"label": labels} if self.has_labels(name) else {}, count)

    def play(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> Rows:
        """The main output of a program, [N, *shape]."""
        return next(iter(self.outputs(name, inputs, count).values()))

    def outputs(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> Tensors:
        """All outputs of a program by name, for as many rows as there are of inputs."""
        total = count or len(next(iter(inputs.values())))
        rows = make_rows(self.programs[name], SEED, range(total), inputs=inputs)
        size = max(1, _ELEMENTS_AT_ONCE // math.prod(self.value.tensor.shape))
        chunks = [self.interpreter.run(name, rows[first : first + size]) for first in range(0, total, size)]
        return {output: np.concatenate([chunk[output] for chunk in chunks]) for output in chunks[0]}


def _samples(subject: LoadedArtifact) -> Iterator[Section]:
    is_wide = _is_music(subject.value)
    if subject.test is not None and subject.real is not None:
        figure = _shown(subject, subject.real, "Test rows")
        yield Section("Test rows", "What the model never saw, for comparison.", figure, is_wide)
    for name, program in subject.programs.items():
        if program.operation == "sample" and not required(program):
            rows = subject.samples if name == "sample" else subject.draw(name)
            assert rows is not None
            settings = f", {_settings(program)}" if program.parameters else ""
            title = "Samples" if name == "sample" else f"Samples, {program.variant}"
            columns = " One class a column." if _has_column_a_class(subject, name) else ""
            caption = f"Seed {SEED}{settings}. {program.doc}{columns}"
            yield Section(title, caption, _shown(subject, rows, title), is_wide)


def _completions(subject: LoadedArtifact) -> Iterator[Section]:
    """What stands in for the lower half of images, where a program takes known pixels."""
    if subject.value.kind != IMAGE or subject.real is None:
        return
    real = subject.real[:COLUMNS]
    known = first_half_mask(real)
    for name, program in subject.programs.items():
        given = _input_like(program, subject.value.tensor)
        if any(each.tensor.name == "known" for each in program.inputs) and given:
            made = subject.play(name, {given: real, "known": known})
            sheet = np.concatenate([real * known, made, real])
            yield Section(
                f"Completed by {name}",
                f"Upper halves of {subject.origin}, the model's lower halves, and the originals. "
                f"{program.doc}",
                charts.tiles(subject.bright(sheet), COLUMNS, f"Completed by {name}"),
            )


def _edits(subject: LoadedArtifact) -> Iterator[Section]:
    """Rows made into rows of the next class, where a program takes a row and a label."""
    if subject.value.kind != IMAGE or subject.shown is None:
        return
    shown = subject.shown[: 3 * COLUMNS]
    labels = (shown.labels + 1) % max(len(subject.value.class_labels), 1)
    for name, program in subject.programs.items():
        if program.operation == "sample" and subject.only_input(name) and subject.has_labels(name):
            made = subject.play(name, {subject.only_input(name): shown.rows, "label": labels})
            caption = f"Each line of test rows above what they become as the next class. {program.doc}"
            figure = _pairs(subject, shown.rows, made, f"Changed by {name}")
            yield Section(f"Changed by {name}", caption, figure)


def _reconstructions(subject: LoadedArtifact) -> Iterator[Section]:
    given = subject.only_input("reconstruct")
    if given and subject.real is not None and subject.value.kind == IMAGE:
        real = subject.real[: 3 * COLUMNS]
        made = subject.play("reconstruct", {given: real})
        caption = f"Each line of {subject.origin} above its reconstructions."
        doc = subject.programs["reconstruct"].doc
        figure = _pairs(subject, real, made, "Reconstructions")
        yield Section("Reconstructions", f"{caption} {doc}", figure)


def _pairs(subject: LoadedArtifact, above: Rows, below: Rows, title: str) -> Markup:
    columns = _columns(subject.value)
    lines = [
        part[start : start + columns]
        for start in range(0, len(above) - columns + 1, columns)
        for part in (above, below)
    ]
    return charts.tiles(subject.bright(np.concatenate(lines)), columns, title)


def _ways(subject: LoadedArtifact) -> Iterator[Section]:
    """Rows on the way between two latents: those of real rows where there is an encoder, else draws."""
    given = subject.only_input("decode")
    if not given or not (subject.is_plane or subject.value.kind == IMAGE):
        return
    latent = next(each.tensor for each in subject.programs["decode"].inputs if each.tensor.name == given)
    ways, caption = _encoded_ways(subject, latent) or _drawn_ways(latent)
    rows = subject.play("decode", {given: ways.reshape(-1, *latent.shape), **_one_class_a_line(subject)})
    if subject.value.kind == IMAGE:
        figure = charts.tiles(subject.bright(rows), COLUMNS, "Between two")
    else:
        cloud = (rows if subject.real is None else subject.real)[: _DRAWN[VECTOR]]
        figure = charts.paths(rows.reshape(LINES, COLUMNS, -1), cloud, subject.limits, "Between two")
    yield Section("Between two", caption, figure)


def _one_class_a_line(subject: LoadedArtifact) -> dict[str, Rows]:
    """For a decoder that would draw a class for every row; one that has an encoder can leave it open."""
    if not subject.has_labels("decode") or "encode" in subject.programs:
        return {}
    return {"label": (np.arange(LINES) % len(subject.value.class_labels)).repeat(COLUMNS)}


def _drawn_ways(latent: manifest_pb2.TensorSpec) -> tuple[Rows, str]:
    """Latents [LINES, COLUMNS, *latent], and how they were chosen."""
    ends = np.random.default_rng(SEED).standard_normal((2, LINES, *latent.shape))
    return _arc(*ends), "Decoded along the arc from one draw of the latent to another."


def _encoded_ways(subject: LoadedArtifact, latent: manifest_pb2.TensorSpec) -> tuple[Rows, str] | None:
    """The same between codes of real rows; None where the decoder's latents are not the encoder's."""
    given = subject.only_input("encode")
    if not given or subject.real is None:
        return None
    code, *others = subject.programs["encode"].outputs
    if tuple(code.shape) != tuple(latent.shape):
        return None
    chosen = np.random.default_rng(SEED).permutation(len(subject.real))
    codes = subject.play("encode", {given: subject.real[np.resize(chosen, 2 * LINES)]})
    ends = codes.reshape(2, LINES, *latent.shape)
    if others and tuple(others[0].shape) == tuple(latent.shape):
        return _line(*ends), f"Decoded along the straight way between the means of two {subject.origin}."
    return _arc(*ends), f"Decoded along the arc between the latents of two {subject.origin}."


def _line(a: Rows, b: Rows) -> Rows:
    shares = np.linspace(0, 1, COLUMNS).reshape(-1, *[1] * (a.ndim - 1))
    return np.asarray(a[:, None] + shares * (b - a)[:, None], np.float32)


def _arc(a: Rows, b: Rows) -> Rows:
    """Slerp (White 2016): at the ends' distance from the origin, where draws from a normal lie."""
    flat = a.reshape(len(a), -1), b.reshape(len(b), -1)
    lengths = np.linalg.norm(flat[0], axis=1) * np.linalg.norm(flat[1], axis=1)
    angle = np.arccos(np.clip((flat[0] * flat[1]).sum(1) / lengths, -0.9999, 0.9999))[:, None]
    shares = np.linspace(0, 1, COLUMNS)
    to_a, to_b = (np.sin(part * angle) / np.sin(angle) for part in (1 - shares, shares))
    arc = to_a[..., None] * flat[0][:, None] + to_b[..., None] * flat[1][:, None]
    return np.asarray(arc.reshape(len(a), COLUMNS, *a.shape[1:]), np.float32)


def _density(subject: LoadedArtifact) -> Iterator[Section]:
    """Of points in the plane, on a grid, by a normalised score that draws no noise."""
    scores = (name for name, each in subject.programs.items() if _is_density(each))
    name = next(filter(subject.only_input, scores), "")
    if not name or tuple(subject.value.tensor.shape) != (2,):
        return
    program, (_, limit) = subject.programs[name], subject.limits
    nats = subject.outputs(name, {subject.only_input(name): cells(limit, CELLS)})[program.score.nats_output]
    density = np.exp(nats.astype(np.float64)).reshape(CELLS, CELLS)
    mass = density.sum() * (2 * limit / CELLS) ** 2
    caption = f"By {name}, {_kind(program, KINDS)}. It adds up to {mass:.3f} within these bounds."
    yield Section("Density", caption, charts.field(density, subject.limits, "Density"))


def _is_density(program: Program) -> bool:
    """Whether exp of what it answers is a density; of a noisy score it would be too large."""
    is_normalised = program.score.kind != manifest_pb2.Score.KIND_UNNORMALIZED
    return program.operation == "score" and is_normalised and not program.noise


def _scores(subject: LoadedArtifact) -> Iterator[Section]:
    """Of test rows beside samples: a model that fits gives both alike."""
    name = next((each for each in ("score", "energy") if subject.only_input(each)), "")
    rows = {"test rows": subject.test.rows if subject.test else None, "samples": subject.samples}
    series = {
        origin: _figures(subject, name, each[:SCORED])
        for origin, each in rows.items()
        if name and each is not None and len(each) >= COLUMNS
    }
    if series:
        program = subject.programs[name]
        means = "; ".join(f"{origin} {_mean(numbers)}" for origin, numbers in series.items())
        label, title = _label(subject, program), f"Distribution of the {name}"
        caption = f"{label}: {means}. {program.doc}"
        yield Section(title, caption, charts.histogram(series, label, title))


def _figures(subject: LoadedArtifact, name: str, rows: Rows) -> NDArray[np.float64]:
    """Energies, or scores with their sign changed: in nats of points, in bits per dimension otherwise."""
    program = subject.programs[name]
    outputs = subject.outputs(name, {subject.only_input(name): rows})
    if name == "energy":
        return np.asarray(next(iter(outputs.values())), np.float64)
    nats, score = -outputs[program.score.nats_output].astype(np.float64), program.score
    if subject.value.kind == VECTOR:
        return nats
    dimensions = outputs[score.row_dimensions_output] if score.row_dimensions_output else score.dimensions
    return np.asarray(nats / (np.maximum(dimensions, 1) * math.log(2)))


def _label(subject: LoadedArtifact, program: Program) -> str:
    if program.operation == "energy":
        return program.outputs[0].name
    unit = {VECTOR: "nats", TOKENS: "bits/token"}.get(subject.value.kind, "bits/dim")
    return f"negative log-density, {_kind(program, NEGATED_KINDS)}, {unit}"


def _kind(program: Program, kinds: Mapping[manifest_pb2.Score.Kind.ValueType, str]) -> str:
    return kinds.get(program.score.kind, "of a kind that is not stated")


def _mean(numbers: NDArray[np.float64]) -> str:
    return f"{numbers.mean():.3f} ± {standard_error(numbers):.3f} (mean of {len(numbers)})"


def _calibration(subject: LoadedArtifact) -> Iterator[Section]:
    given = subject.only_input("classify")
    if not given or subject.test is None:
        return
    test = subject.test[: 5 * SCORED]
    probabilities = subject.play("classify", {given: test.rows})
    hits = probabilities.argmax(1) == test.labels
    figure = charts.reliability(probabilities.max(1), hits, "Calibration")
    yield Section(
        "Calibration",
        f"How often the top label is right, by its probability, on {len(test)} test rows: {hits.mean():.3f} "
        "in all. A dot's area goes by its number of rows; on the dotted line probabilities can be believed.",
        figure,
    )


EXHIBITS: tuple[Callable[[LoadedArtifact], Iterator[Section]], ...] = (
    _samples,
    _completions,
    _edits,
    _reconstructions,
    _ways,
    _density,
    _scores,
    _calibration,
)


def _shown(subject: LoadedArtifact, rows: Rows, title: str) -> Markup:
    value, few = subject.value, rows[: _DRAWN[subject.value.kind]]
    if value.kind == IMAGE:
        return charts.tiles(subject.bright(few), _columns(value), title)
    if value.kind == TOKENS:
        return Markup("").join(_rolls(few, title) if _is_music(value) else _texts(few, value))
    if not subject.is_plane:
        return charts.histogram({title: few.reshape(-1)}, value.tensor.name, title)
    return charts.points(few, subject.limits, title)


def _is_music(value: manifest_pb2.DataSpec) -> bool:
    return tuple(value.vocabulary) == chorales.VOCABULARY


def _rolls(rows: Rows, title: str) -> Iterator[Markup]:
    for number, roll in enumerate(chorales.piano_roll(rows)):
        yield charts.roll(_sounding(roll), chorales.LOWEST, f"{title} {number + 1}")


def _texts(rows: Rows, value: manifest_pb2.DataSpec) -> Iterator[Markup]:
    for written in text.to_strings(rows, tuple(value.vocabulary)):
        yield Markup("<pre>{}</pre>").format(written)


def _sounding(roll: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the silence at the end."""
    (frames,) = np.nonzero(roll.any(0))
    return roll[:, : frames.max(initial=0) + 1]


def _columns(value: manifest_pb2.DataSpec) -> int:
    """A column for each class where they fit into a line."""
    classes = len(value.class_labels)
    return classes if 2 <= classes <= COLUMNS else COLUMNS


def _has_column_a_class(subject: LoadedArtifact, name: str) -> bool:
    value = subject.value
    return value.kind == IMAGE and subject.has_labels(name) and _columns(value) == len(value.class_labels)


def _by_class(part: Split, value: manifest_pb2.DataSpec) -> Split:
    """As many rows as are shown, the classes that there are in turn, as far as there are enough of each."""
    count = _DRAWN[value.kind]
    if value.kind != IMAGE or not value.class_labels:
        return part[:count]
    groups = [np.flatnonzero(part.labels == label) for label in np.unique(part.labels)]
    shortest = min(map(len, groups))
    turns = np.stack([group[:shortest] for group in groups], 1).reshape(-1)
    return part[turns[:count]]


def _input_like(program: Program, spec: manifest_pb2.TensorSpec) -> str:
    """The name of an input for rows of the model's own kind."""
    alike = (
        each.tensor.name
        for each in program.inputs
        if (each.tensor.dtype, list(each.tensor.shape), each.tensor.maximum)
        == (spec.dtype, list(spec.shape), spec.maximum)
    )
    return next(alike, "")


def _settings(program: Program) -> str:
    return ", ".join(f"{each.name} {snippets.default(each)}" for each in program.parameters)
