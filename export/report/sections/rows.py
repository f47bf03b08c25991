"""Sections that show rows: test rows, samples, inpainting, edits and reconstructions."""

from collections.abc import Iterator

import numpy as np

from export.datasets.loading import first_half_mask
from export.report import charts, snippets
from export.report.loaded_artifact import IMAGE, SEED, LoadedArtifact, Program
from export.report.sections.base import COLUMNS, Section, is_music, num_columns, show_pairs, show_rows
from export.report.snippets import required_inputs
from samovar.v1 import manifest_pb2


def sample_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return test rows, and samples of each `sample` program that has no required inputs."""
    is_wide = is_music(artifact.data_spec)
    if artifact.test is not None and artifact.example_rows is not None:
        figure = show_rows(artifact, artifact.example_rows, "Test rows")
        yield Section("Test rows", "Rows that the model was not trained on, for comparison.", figure, is_wide)
    for name, program in artifact.programs.items():
        if program.operation == "sample" and not required_inputs(program):
            rows = artifact.samples if name == "sample" else artifact.sample(name)
            assert rows is not None
            settings = f", {_format_defaults(program)}" if program.parameters else ""
            title = "Samples" if name == "sample" else f"Samples, {program.variant}"
            columns = " Each column is a class." if _has_class_columns(artifact, name) else ""
            caption = f"Seed {SEED}{settings}. {program.doc}{columns}"
            yield Section(title, caption, show_rows(artifact, rows, title), is_wide)


def inpainting_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return images whose lower half the model fills in, for each program that takes a mask `known`."""
    if artifact.data_spec.kind != IMAGE or artifact.example_rows is None:
        return
    originals = artifact.example_rows[:COLUMNS]
    known = first_half_mask(originals)
    for name, program in artifact.programs.items():
        image_input = _find_row_input(program, artifact.data_spec.tensor)
        if any(spec.tensor.name == "known" for spec in program.inputs) and image_input:
            completed = artifact.run(name, {image_input: originals, "known": known})
            images = np.concatenate([originals * known, completed, originals])
            yield Section(
                f"Completed by {name}",
                f"From top to bottom: the upper halves of {artifact.example_origin}, completed by the model, "
                f"and the originals. {program.doc}",
                charts.image_grid(artifact.brightness(images), COLUMNS, f"Completed by {name}"),
            )


def edit_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return test rows edited into the next class, for each program that takes a row and a label."""
    if artifact.data_spec.kind != IMAGE or artifact.shown_test is None:
        return
    test = artifact.shown_test[: 3 * COLUMNS]
    labels = (test.labels + 1) % max(len(artifact.data_spec.class_labels), 1)
    for name, program in artifact.programs.items():
        if program.operation == "sample" and artifact.single_input(name) and artifact.takes_label(name):
            edited = artifact.run(name, {artifact.single_input(name): test.rows, "label": labels})
            caption = (
                f"Lines of test rows, each above the same rows edited into the next class. {program.doc}"
            )
            figure = show_pairs(artifact, test.rows, edited, f"Edited by {name}")
            yield Section(f"Edited by {name}", caption, figure)


def reconstruction_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return images and their reconstructions."""
    image_input = artifact.single_input("reconstruct")
    if image_input and artifact.example_rows is not None and artifact.data_spec.kind == IMAGE:
        originals = artifact.example_rows[: 3 * COLUMNS]
        reconstructed = artifact.run("reconstruct", {image_input: originals})
        caption = f"Lines of {artifact.example_origin}, each above its reconstructions."
        doc = artifact.programs["reconstruct"].doc
        figure = show_pairs(artifact, originals, reconstructed, "Reconstructions")
        yield Section("Reconstructions", f"{caption} {doc}", figure)


def _has_class_columns(artifact: LoadedArtifact, name: str) -> bool:
    data_spec = artifact.data_spec
    return (
        data_spec.kind == IMAGE
        and artifact.takes_label(name)
        and num_columns(data_spec) == len(data_spec.class_labels)
    )


def _find_row_input(program: Program, row: manifest_pb2.TensorSpec) -> str:
    """Return the first input with the dtype, shape and maximum of a row; "" if no input matches."""
    names = (
        spec.tensor.name
        for spec in program.inputs
        if (spec.tensor.dtype, list(spec.tensor.shape), spec.tensor.maximum)
        == (row.dtype, list(row.shape), row.maximum)
    )
    return next(names, "")


def _format_defaults(program: Program) -> str:
    return ", ".join(
        f"{parameter.name} {snippets.format_default(parameter)}" for parameter in program.parameters
    )
