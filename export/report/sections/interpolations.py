"""Section that decodes points between two latents: along a line (lerp), or along an arc (slerp, White 2016).

Latents of a standard normal distribution lie at nearly the same distance from the origin. Slerp keeps that
distance, so it is used for draws and for encoded rows. Lerp is used between posterior means.
"""

from collections.abc import Callable, Iterator

import numpy as np

from export.report import charts
from export.report.loaded_artifact import IMAGE, NUM_ROWS, SEED, VECTOR, LoadedArtifact, Rows
from export.report.sections.base import COLUMNS, Section
from samovar.interpolation import lerp, slerp
from samovar.v1 import manifest_pb2

# Pairs of latents; each is one line of the figure.
NUM_PAIRS = 6

Interpolate = Callable[[Rows, Rows, Rows], Rows]


def interpolation_sections(artifact: LoadedArtifact) -> Iterator[Section]:
    """Return rows decoded between two latents: of example rows if there is an encoder, else of draws."""
    latent_input = artifact.single_input("decode")
    if not latent_input or not (artifact.is_planar or artifact.data_spec.kind == IMAGE):
        return
    inputs = artifact.programs["decode"].inputs
    latent = next(spec.tensor for spec in inputs if spec.tensor.name == latent_input)
    latents, caption = _between_encoded(artifact, latent) or _between_draws(latent)
    flat = latents.reshape(-1, *latent.shape)
    rows = artifact.run("decode", {latent_input: flat, **_labels(artifact)})
    if artifact.data_spec.kind == IMAGE:
        figure = charts.image_grid(artifact.brightness(rows), COLUMNS, "Interpolation")
    else:
        points = (rows if artifact.example_rows is None else artifact.example_rows)[: NUM_ROWS[VECTOR]]
        paths = rows.reshape(NUM_PAIRS, COLUMNS, -1)
        figure = charts.paths(paths, points, artifact.limits, "Interpolation")
    yield Section("Interpolation", caption, figure)


def interpolate_pairs(starts: Rows, ends: Rows, interpolate: Interpolate) -> Rows:
    """Return COLUMNS points from each start to its end.

    Args:
        starts: [N, *shape].
        ends: [N, *shape].
        interpolate: lerp or slerp.

    Returns:
        float32 [N, COLUMNS, *shape], from the start to the end.
    """
    weights = np.linspace(0, 1, COLUMNS)
    return np.stack([interpolate(start, end, weights) for start, end in zip(starts, ends, strict=True)])


def _labels(artifact: LoadedArtifact) -> dict[str, Rows]:
    """Return one label for each pair if the decoder would draw one for each row; encoded rows need none."""
    if not artifact.takes_label("decode") or "encode" in artifact.programs:
        return {}
    labels = np.arange(NUM_PAIRS) % len(artifact.data_spec.class_labels)
    return {"label": labels.repeat(COLUMNS)}


def _between_draws(latent: manifest_pb2.TensorSpec) -> tuple[Rows, str]:
    """Return latents [NUM_PAIRS, COLUMNS, *latent] and the caption."""
    starts, ends = np.random.default_rng(SEED).standard_normal((2, NUM_PAIRS, *latent.shape))
    return interpolate_pairs(starts, ends, slerp), "Decoded along the arc between two draws of the latent."


def _between_encoded(artifact: LoadedArtifact, latent: manifest_pb2.TensorSpec) -> tuple[Rows, str] | None:
    """Return latents [NUM_PAIRS, COLUMNS, *latent] and the caption; None if `encode` has another latent."""
    row_input = artifact.single_input("encode")
    if not row_input or artifact.example_rows is None:
        return None
    code, *others = artifact.programs["encode"].outputs
    if tuple(code.shape) != tuple(latent.shape):
        return None
    order = np.random.default_rng(SEED).permutation(len(artifact.example_rows))
    codes = artifact.run("encode", {row_input: artifact.example_rows[np.resize(order, 2 * NUM_PAIRS)]})
    starts, ends = codes.reshape(2, NUM_PAIRS, *latent.shape)
    # An encoder with a second output of the same shape returns the mean and the deviation of a posterior.
    if others and tuple(others[0].shape) == tuple(latent.shape):
        caption = f"Decoded along the line between the posterior means of two {artifact.example_origin}."
        return interpolate_pairs(starts, ends, lerp), caption
    caption = f"Decoded along the arc between the latents of two {artifact.example_origin}."
    return interpolate_pairs(starts, ends, slerp), caption
