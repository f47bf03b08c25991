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
from markupsafe import Markup, escape
from numpy.typing import NDArray

from export import chart, chorales, replay, text, usage
from export.data import Part
from export.program import program_name
from export.replay import Player
from export.usage import required
from samovar.v1 import manifest_pb2

Rows = NDArray[Any]
Program = manifest_pb2.Program

IMAGE, VECTOR, TOKENS = (
    manifest_pb2.Value.KIND_IMAGE,
    manifest_pb2.Value.KIND_VECTOR,
    manifest_pb2.Value.KIND_TOKENS,
)
COLUMNS = 10
SCORED = 200
LINES = 6
CELLS = 120
SEED = 0
_DRAWN = {IMAGE: 100, VECTOR: 2000, TOKENS: 4}
# Of the points' extent.
_MARGIN = 1.1
# Of a figure that is the mean of a score with its sign changed.
KINDS = {
    manifest_pb2.Score.KIND_EXACT: "exact",
    manifest_pb2.Score.KIND_LOWER_BOUND: "upper bound",
    manifest_pb2.Score.KIND_ESTIMATE: "estimate",
    manifest_pb2.Score.KIND_UNNORMALIZED: "up to a constant",
}


@dataclass(frozen=True)
class Exhibit:
    """Something to look at, and a sentence that says how it came about."""

    title: str
    caption: str
    figure: Markup
    is_wide: bool = False


@dataclass(frozen=True)
class Subject:
    """An artifact that runs, and the test rows of its data where they are at hand."""

    player: Player
    test: Part | None

    @property
    def value(self) -> manifest_pb2.Value:
        """What one row is."""
        return self.player.manifest.value

    @cached_property
    def programs(self) -> Mapping[str, Program]:
        """Programs by name, methods included."""
        return {program_name(each.operation, each.method): each for each in self.player.manifest.programs}

    @cached_property
    def samples(self) -> Rows | None:
        """Rows drawn in the usual way; None where that takes more than labels."""
        usual = self.programs.get("sample")
        return self.draw("sample") if usual and not required(usual) else None

    @cached_property
    def real(self) -> Rows | None:
        """Rows to show and to work on: test rows, by class where there are classes, else samples."""
        return self.samples if self.test is None else _by_class(self.test, self.value)

    @property
    def origin(self) -> str:
        """What the rows to work on are."""
        return "samples, for the data set is not at hand" if self.test is None else "test rows"

    @cached_property
    def limits(self) -> tuple[float, float]:
        """Of both axes, around all points."""
        clouds = [rows[:, :2] for rows in (self.real, self.samples) if rows is not None]
        extent = _MARGIN * max((float(np.quantile(abs(cloud), 0.999)) for cloud in clouds), default=3.0)
        return -extent, extent

    def draw(self, name: str) -> Rows:
        """Rows of a program that needs none, the classes in turn where it takes a label."""
        count = _DRAWN[self.value.kind]
        classes = len(self.value.class_labels)
        labelled = any(given.tensor.name == "label" for given in self.programs[name].inputs) and classes
        return self.play(name, {"label": np.arange(count) % classes} if labelled else {}, count)

    def play(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> Rows:
        """The main output of a program, [N, *shape]."""
        return next(iter(self.outputs(name, inputs, count).values()))

    def outputs(self, name: str, inputs: Mapping[str, Rows], count: int = 0) -> replay.Tensors:
        """All outputs of a program by name, for as many rows as there are of inputs."""
        total = count or len(next(iter(inputs.values())))
        rows = replay.request(self.programs[name], SEED, range(total), inputs=inputs)
        return self.player.play(name, rows)


def _samples(subject: Subject) -> Iterator[Exhibit]:
    if subject.test is not None and subject.real is not None:
        yield Exhibit("Test rows", "What the model never saw, for comparison.", _shown(subject, subject.real))
    for name, program in subject.programs.items():
        if program.operation == "sample" and not required(program):
            rows = subject.samples if name == "sample" else subject.draw(name)
            assert rows is not None
            settings = f", {_settings(program)}" if program.parameters else ""
            title = "Samples" if name == "sample" else f"Samples, {program.method}"
            yield Exhibit(title, f"Seed {SEED}{settings}. {program.doc}", _shown(subject, rows, title))


def _completions(subject: Subject) -> Iterator[Exhibit]:
    """What stands in for the lower half of images, where a program takes known pixels."""
    if subject.value.kind != IMAGE or subject.real is None:
        return
    real = subject.real[:COLUMNS]
    known = np.zeros(real.shape, np.uint8)
    known[:, : real.shape[1] // 2] = 1
    for name, program in subject.programs.items():
        given = _input_like(program, subject.value.tensor)
        if {each.tensor.name for each in program.inputs} >= {"known"} and given:
            made = subject.play(name, {given: real, "known": known})
            sheet = np.concatenate([real * known, made, real])
            yield Exhibit(
                f"Completed by {name}",
                f"Upper halves of {subject.origin}, the model's lower halves, and the originals. "
                f"{program.doc}",
                chart.tiles(sheet, subject.value.levels, COLUMNS, f"Completed by {name}"),
            )


def _reconstructions(subject: Subject) -> Iterator[Exhibit]:
    program = subject.programs.get("reconstruct")
    if program is None or subject.real is None or subject.value.kind != IMAGE:
        return
    real = subject.real[: 3 * COLUMNS]
    made = subject.play("reconstruct", {required(program)[0]: real})
    pairs = [part[i : i + COLUMNS] for i in range(0, len(real), COLUMNS) for part in (real, made)]
    figure = chart.tiles(np.concatenate(pairs), subject.value.levels, COLUMNS, "Reconstructions")
    yield Exhibit(
        "Reconstructions", f"Each line of {subject.origin} above its reconstructions. {program.doc}", figure
    )


def _ways(subject: Subject) -> Iterator[Exhibit]:
    """Rows on the way between two latents: those of real rows where there is an encoder, else draws."""
    program = subject.programs.get("decode")
    if program is None or len(required(program)) != 1 or subject.value.kind == TOKENS:
        return
    latents, caption = _latent_ways(subject, program)
    inputs = {required(program)[0]: latents.reshape(-1, *latents.shape[2:])}
    if any(each.tensor.name == "label" for each in program.inputs):
        labels = np.arange(len(latents)) % max(len(subject.value.class_labels), 1)
        inputs["label"] = labels.repeat(COLUMNS)
    rows = subject.play("decode", inputs)
    if subject.value.kind == IMAGE:
        figure = chart.tiles(rows, subject.value.levels, COLUMNS, "Between two")
    else:
        cloud = rows if subject.real is None else subject.real
        figure = chart.paths(
            rows.reshape(*latents.shape[:2], -1), cloud[: _DRAWN[VECTOR]], subject.limits, "Between two"
        )
    yield Exhibit("Between two", caption, figure)


def _latent_ways(subject: Subject, decode: Program) -> tuple[Rows, str]:
    """Latents [LINES, COLUMNS, *latent], and how they were chosen."""
    latent = next(each.tensor for each in decode.inputs if each.tensor.name == required(decode)[0])
    encode = subject.programs.get("encode")
    encodes = encode is not None and tuple(encode.outputs[0].shape) == tuple(latent.shape)
    if encode is None or not encodes or subject.real is None or len(required(encode)) != 1:
        ends = np.random.default_rng(SEED).standard_normal((2, LINES, *latent.shape))
        return _arc(*ends), "Decoded along the arc from one draw of the latent to another."
    chosen = np.random.default_rng(SEED).permutation(len(subject.real))[: 2 * LINES]
    codes = subject.play("encode", {required(encode)[0]: subject.real[np.resize(chosen, 2 * LINES)]})
    ends = codes.reshape(2, LINES, *latent.shape)
    has_spread = len(encode.outputs) > 1 and tuple(encode.outputs[1].shape) == tuple(latent.shape)
    way = "straight way between the means" if has_spread else "arc between the latents"
    walk = _line if has_spread else _arc
    return walk(*ends), f"Decoded along the {way} of two {subject.origin}; the ends are reconstructions."


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


def _density(subject: Subject) -> Iterator[Exhibit]:
    """Of points in the plane, on a grid."""
    program = subject.programs.get("score")
    if program is None or tuple(subject.value.tensor.shape) != (2,):
        return
    low, high = subject.limits
    axis, width = np.linspace(low, high, CELLS, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    nats = subject.outputs("score", {required(program)[0]: grid})[program.score.nats]
    density = np.exp(nats.astype(np.float64)).reshape(CELLS, CELLS)
    mass = density.sum() * width**2
    caption = f"By score, {_kind(program)}. It adds up to {mass:.3f} within these bounds."
    yield Exhibit("Density", caption, chart.field(density, subject.limits, "Density"))


def _scores(subject: Subject) -> Iterator[Exhibit]:
    """Of test rows beside samples: a model that fits gives both alike."""
    name = next((each for each in ("score", "energy") if each in subject.programs), "")
    if not name or len(required(subject.programs[name])) != 1:
        return
    program = subject.programs[name]
    given = {"samples": subject.samples, "test rows": subject.test.rows if subject.test else None}
    series = {
        origin: _figures(subject, name, rows[:SCORED])
        for origin, rows in given.items()
        if rows is not None and len(rows) >= COLUMNS
    }
    if series:
        means = "; ".join(f"{origin} {_mean(numbers)}" for origin, numbers in series.items())
        unit = "energy" if name == "energy" else _unit(program)
        figure = chart.histogram(series, unit, f"Distribution of the {name}")
        yield Exhibit(f"Distribution of the {name}", f"{unit}: {means}. {program.doc}", figure)


def _figures(subject: Subject, name: str, rows: Rows) -> NDArray[np.float64]:
    """Energies, or scores with their sign changed: in nats of points, in bits per dimension otherwise."""
    program = subject.programs[name]
    outputs = subject.outputs(name, {required(program)[0]: rows})
    if name == "energy":
        return np.asarray(next(iter(outputs.values())), np.float64)
    nats, score = -outputs[program.score.nats].astype(np.float64), program.score
    if subject.value.kind == VECTOR:
        return nats
    dimensions = outputs[score.row_dimensions] if score.row_dimensions else score.dimensions
    return np.asarray(nats / (np.maximum(dimensions, 1) * math.log(2)))


def _unit(program: Program) -> str:
    measure = "bits/dim" if program.score.dimensions > 2 else "nats"
    return f"negative log-density, {_kind(program)}, {measure}"


def _kind(program: Program) -> str:
    return KINDS.get(program.score.kind, "of a kind that is not stated")


def _mean(numbers: NDArray[np.float64]) -> str:
    error = numbers.std(ddof=1) / math.sqrt(len(numbers))
    return f"{numbers.mean():.3f} ± {error:.3f} (mean of {len(numbers)})"


def _calibration(subject: Subject) -> Iterator[Exhibit]:
    program = subject.programs.get("classify")
    if program is None or subject.test is None or len(required(program)) != 1:
        return
    test = subject.test[: 5 * SCORED]
    probabilities = subject.play("classify", {required(program)[0]: test.rows})
    hits = probabilities.argmax(1) == test.labels
    figure = chart.reliability(probabilities.max(1), hits, "Calibration")
    yield Exhibit(
        "Calibration",
        f"How often the top label is right, by its probability, on {len(test)} test rows: {hits.mean():.3f} "
        "in all. A dot's area goes by its number of rows; on the dotted line probabilities can be believed.",
        figure,
    )


EXHIBITS: tuple[Callable[[Subject], Iterator[Exhibit]], ...] = (
    _samples,
    _completions,
    _reconstructions,
    _ways,
    _density,
    _scores,
    _calibration,
)


def _shown(subject: Subject, rows: Rows, title: str = "Test rows") -> Markup:
    value = subject.value
    if value.kind == IMAGE:
        return chart.tiles(rows[: _DRAWN[IMAGE]], value.levels, _columns(value), title)
    if value.kind == VECTOR:
        return chart.points(rows[: _DRAWN[VECTOR]], subject.limits, title)
    if tuple(value.vocabulary) == chorales.VOCABULARY:
        rolls = enumerate(chorales.roll(rows[: _DRAWN[TOKENS]]))
        return Markup("").join(
            chart.roll(_sounding(roll), chorales.LOWEST, f"{title} {number + 1}") for number, roll in rolls
        )
    written = text.written(rows[: _DRAWN[TOKENS]], tuple(value.vocabulary))
    return Markup("").join(Markup("<pre>{}</pre>").format(escape(each)) for each in written)


def _sounding(roll: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Without the silence at the end."""
    (frames,) = np.nonzero(roll.any(0))
    return roll[:, : frames.max(initial=0) + 1]


def _columns(value: manifest_pb2.Value) -> int:
    """A column for each class where they fit into a line."""
    classes = len(value.class_labels)
    return classes if 2 <= classes <= COLUMNS else COLUMNS


def _by_class(part: Part, value: manifest_pb2.Value) -> Rows:
    """As many rows as are shown, the classes in turn as far as there are enough of each."""
    count, classes = _DRAWN[value.kind], len(value.class_labels)
    if value.kind != IMAGE or not classes:
        return part.rows[:count]
    groups = [part.rows[part.labels == label][: -(-count // classes)] for label in range(classes)]
    shortest = min(map(len, groups))
    return np.stack([group[:shortest] for group in groups], 1).reshape(-1, *part.rows.shape[1:])


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
    return ", ".join(f"{each.name} {usage.default(each)}" for each in program.parameters)
