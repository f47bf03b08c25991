"""Walks and edits in a latent space, through samovar.latent: between rows where a model encodes, or draws."""

from collections.abc import Iterator
from functools import partial
from typing import get_args

import numpy as np

import samovar
from conformance.requests import Array, misfits
from conformance.results import Exercise, Found
from conformance.sample_inputs import SampleInputs
from samovar import latent

# Between levels of an image, and between numbers, that went through float32 on two ways.
_NEAR = {"i": 1, "u": 1, "f": 1e-3}


def exercises(client: samovar.Client, model: samovar.Model, pantry: SampleInputs) -> Iterator[Exercise]:
    """What to do with a model that decodes."""
    if "decode" not in model.operations:
        return
    encodes = _encodes(model)
    name, ends = ("encode+decode", "rows") if encodes else ("decode", "draws")
    for path in get_args(latent.Path):
        do = partial(_walk, client, model, pantry, path, encodes)
        yield Exercise(model.name, name, f"interpolate {ends} by {path}", pantry.rows, do)
    what = f"edit {ends} by {'an attribute vector' if encodes else 'a direction'}"
    edit = partial(_attribute if encodes else _direction, client, model, pantry)
    yield Exercise(model.name, name, what, pantry.rows, edit)


def _walk(
    client: samovar.Client, model: samovar.Model, pantry: SampleInputs, path: latent.Path, encodes: bool
) -> Found:
    """A walk begins and ends where its ends, decoded, are."""
    name, version, count = model.name, model.version, pantry.rows
    if encodes:
        ends = pantry.give(model, model.data_spec.tensor)[:2]
        codes = latent.encode(client, name, ends, version=version)
    else:
        ends = np.array([1, 2])
        codes = np.concatenate([latent.draw(client, name, 1, seed=seed, version=version) for seed in (1, 2)])
    walk = latent.interpolate(client, name, ends[0], ends[1], count, path, version=version)
    still = latent.decode(client, name, codes[[0] * (count - 1) + [1]], version=version)
    wrong = [] if _near(walk[[0, -1]], still[[0, -1]]) else ["its ends are not those that were given"]
    return _found(model, walk, f"{_moved(walk[-1:], walk[:1]):.0%} change", *wrong)


def _attribute(client: samovar.Client, model: samovar.Model, pantry: SampleInputs) -> Found:
    """An edit by nothing is a row decoded again; by an attribute vector, another row."""
    rows = pantry.give(model, model.data_spec.tensor)
    half = len(rows) // 2
    go = partial(latent.edit, client, model.name, rows, version=model.version)
    direction = latent.attribute(client, model.name, rows[:half], rows[half:], version=model.version)
    codes = latent.encode(client, model.name, rows, version=model.version)
    still = latent.decode(client, model.name, codes, version=model.version)
    wrong = [] if _near(go(direction, 0.0), still) else ["an edit by nothing changes rows"]
    return _edited(model, go(direction, 1.0), still, *wrong)


def _direction(client: samovar.Client, model: samovar.Model, pantry: SampleInputs) -> Found:
    """Draws moved along the difference of two others are decoded to other rows."""
    codes, ends = (
        latent.draw(client, model.name, count, seed=count, version=model.version)
        for count in (pantry.rows, 2)
    )
    still, moved = (
        latent.decode(client, model.name, codes + amount * (ends[1] - ends[0]), version=model.version)
        for amount in (0, 1)
    )
    return _edited(model, moved, still)


def _edited(model: samovar.Model, rows: Array, before: Array, *wrong: str) -> Found:
    moved = _moved(rows, before)
    return _found(model, rows, f"{moved:.0%} moved", *wrong, *([] if moved else ["the edit moves nothing"]))


def _found(model: samovar.Model, rows: Array, rightly: str, *wrong: str) -> Found:
    return Found(rows.shape, rightly, (*misfits(model.data_spec.tensor, rows, len(rows)), *wrong))


def _near(rows: Array, others: Array) -> bool:
    tolerance = _NEAR[rows.dtype.kind]
    return bool((np.abs(rows.astype(np.float64) - others.astype(np.float64)) <= tolerance).all())


def _moved(rows: Array, before: Array) -> float:
    return float((rows != before).mean())


def _encodes(model: samovar.Model) -> bool:
    """Whether the outputs of encode are the inputs of decode."""
    if not {"encode", "decode"} <= set(model.operations):
        return False
    required = [each.tensor.shape for each in model.operations["decode"].inputs if not each.optional]
    return required == [model.operations["encode"].outputs[0].shape]
