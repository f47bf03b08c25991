"""Interface of the sections, and how they show rows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from export.datasets import chorales, text
from export.report import charts
from export.report.loaded_artifact import IMAGE, NUM_ROWS, TOKENS, LoadedArtifact, Rows
from samovar.v1 import manifest_pb2

# Images in a line.
COLUMNS = 10


@dataclass(frozen=True)
class Section:
    """Figure with a title and a caption; a wide one takes the whole width of the page."""

    title: str
    caption: str
    figure: Markup
    is_wide: bool = False


class MakeSections(Protocol):
    """Function that returns the sections of one kind for an artifact; none if they do not apply to it."""

    def __call__(self, artifact: LoadedArtifact) -> Iterator[Section]: ...


def show_rows(artifact: LoadedArtifact, rows: Rows, title: str) -> Markup:
    """Return a figure of the first rows: an image grid, piano rolls, text, a scatter plot or a histogram."""
    data_spec, shown = artifact.data_spec, rows[: NUM_ROWS[artifact.data_spec.kind]]
    if data_spec.kind == IMAGE:
        return charts.image_grid(artifact.brightness(shown), num_columns(data_spec), title)
    if data_spec.kind == TOKENS:
        return Markup("").join(
            _piano_rolls(shown, title) if is_music(data_spec) else _texts(shown, data_spec)
        )
    if not artifact.is_planar:
        return charts.histogram({title: shown.reshape(-1)}, data_spec.tensor.name, title)
    return charts.scatter(shown, artifact.limits, title)


def show_pairs(artifact: LoadedArtifact, above: Rows, below: Rows, title: str) -> Markup:
    """Return an image grid in which each line of `above` is followed by the same images of `below`."""
    columns = num_columns(artifact.data_spec)
    lines = [
        images[start : start + columns]
        for start in range(0, len(above) - columns + 1, columns)
        for images in (above, below)
    ]
    return charts.image_grid(artifact.brightness(np.concatenate(lines)), columns, title)


def num_columns(data_spec: manifest_pb2.DataSpec) -> int:
    """Return the images in a line: one for each class if there are 2 to COLUMNS classes, else COLUMNS."""
    num_classes = len(data_spec.class_labels)
    return num_classes if 2 <= num_classes <= COLUMNS else COLUMNS


def is_music(data_spec: manifest_pb2.DataSpec) -> bool:
    """Return whether tokens are notes of the chorales."""
    return tuple(data_spec.vocabulary) == chorales.VOCABULARY


def _piano_rolls(rows: Rows, title: str) -> Iterator[Markup]:
    for number, roll in enumerate(chorales.piano_roll(rows), 1):
        yield charts.piano_roll(_trim_silence(roll), chorales.LOWEST, f"{title} {number}")


def _trim_silence(roll: NDArray[np.bool_]) -> NDArray[np.bool_]:
    (frames,) = np.nonzero(roll.any(0))
    return roll[:, : frames.max(initial=0) + 1]


def _texts(rows: Rows, data_spec: manifest_pb2.DataSpec) -> Iterator[Markup]:
    for string in text.to_strings(rows, tuple(data_spec.vocabulary)):
        yield Markup("<pre>{}</pre>").format(string)
