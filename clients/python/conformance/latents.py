"""Checks of interpolation and edits in a latent space, with samovar.latent.

A model that encodes interpolates between rows, and edits rows by an attribute vector. Another model that
decodes interpolates between random latents, and moves them along the difference of two others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np

import samovar
from conformance.requests import Array, tensor_problems
from conformance.results import Check, Outcome
from conformance.sample_inputs import SampleInputs
from samovar import latent

# Largest difference by kind of data type between equal rows whose latents were computed in two ways.
_TOLERANCES = {"i": 1, "u": 1, "f": 1e-3}


def checks(client: samovar.Client, model: samovar.Model, sample_inputs: SampleInputs) -> Iterator[Check]:
    """Yield the checks of a model that decodes; none for other models."""
    if "decode" not in model.operations:
        return
    latent_checks = _LatentChecks(client, model, sample_inputs)
    if _can_round_trip(model):
        operation, ends, edit = "encode+decode", "rows", "edit rows by an attribute vector"
        interpolate, run_edit = latent_checks.interpolate_rows, latent_checks.edit_rows
    else:
        operation, ends, edit = "decode", "latents", "edit latents by a direction"
        interpolate, run_edit = latent_checks.interpolate_latents, latent_checks.edit_latents
    for path in get_args(latent.Path):
        name, run = f"interpolate {ends} by {path}", partial(interpolate, path)
        yield Check(model.name, operation, name, sample_inputs.num_rows, run)
    yield Check(model.name, operation, edit, sample_inputs.num_rows, run_edit)


@dataclass(frozen=True)
class _LatentChecks:
    client: samovar.Client
    model: samovar.Model
    sample_inputs: SampleInputs

    def interpolate_rows(self, path: latent.Path) -> Outcome:
        ends = self.sample_inputs.rows_for(self.model, self.model.data_spec.tensor)[:2]
        return self._check_ends(path, ends, self._encode(ends))

    def interpolate_latents(self, path: latent.Path) -> Outcome:
        seeds = np.array([1, 2])
        return self._check_ends(path, seeds, np.concatenate([self._draw(1, seed) for seed in (1, 2)]))

    def edit_rows(self) -> Outcome:
        """Check that an edit by 0 returns the decoded latents, and that an edit by 1 changes rows."""
        rows = self.sample_inputs.rows_for(self.model, self.model.data_spec.tensor)
        half = len(rows) // 2
        edit = partial(latent.edit, self.client, self.model.name, rows, version=self.model.version)
        direction = latent.attribute(
            self.client, self.model.name, rows[:half], rows[half:], version=self.model.version
        )
        original = self._decode(self._encode(rows))
        problems = [] if _is_close(edit(direction, 0.0), original) else ["an edit by 0 changes rows"]
        return self._check_change(edit(direction, 1.0), original, *problems)

    def edit_latents(self) -> Outcome:
        """Check that latents moved along the difference of two others are decoded to other rows."""
        num_rows = self.sample_inputs.num_rows
        latents, ends = (self._draw(count, seed=count) for count in (num_rows, 2))
        return self._check_change(self._decode(latents + (ends[1] - ends[0])), self._decode(latents))

    def _check_ends(self, path: latent.Path, ends: Array, latents: Array) -> Outcome:
        """Check that an interpolation between `ends` [2, ...] starts and ends at their decoded latents."""
        count = self.sample_inputs.num_rows
        rows = latent.interpolate(
            self.client, self.model.name, ends[0], ends[1], count, path, version=self.model.version
        )
        expected = self._decode(latents[[0] * (count - 1) + [1]])
        is_close = _is_close(rows[[0, -1]], expected[[0, -1]])
        problems = [] if is_close else ["the ends differ from the decoded latents of the ends"]
        return self._outcome(rows, f"{_change(rows[-1:], rows[:1]):.0%} of elements change", *problems)

    def _check_change(self, rows: Array, original: Array, *problems: str) -> Outcome:
        change = _change(rows, original)
        unchanged = [] if change else ["the edit changes nothing"]
        return self._outcome(rows, f"{change:.0%} of elements change", *problems, *unchanged)

    def _outcome(self, rows: Array, summary: str, *problems: str) -> Outcome:
        found = tensor_problems(self.model.data_spec.tensor, rows, len(rows))
        return Outcome(rows.shape, summary, (*found, *problems))

    def _encode(self, rows: Array) -> Array:
        return latent.encode(self.client, self.model.name, rows, version=self.model.version)

    def _decode(self, latents: Array) -> Array:
        return latent.decode(self.client, self.model.name, latents, version=self.model.version)

    def _draw(self, count: int, seed: int) -> Array:
        return latent.draw(self.client, self.model.name, count, seed=seed, version=self.model.version)


def _is_close(rows: Array, others: Array) -> bool:
    differences = np.abs(rows.astype(np.float64) - others.astype(np.float64))
    return bool((differences <= _TOLERANCES[rows.dtype.kind]).all())


def _change(rows: Array, original: Array) -> float:
    """Return the fraction of elements that differ."""
    return float((rows != original).mean())


def _can_round_trip(model: samovar.Model) -> bool:
    """Return whether `decode` needs nothing but the first output of `encode`."""
    if not {"encode", "decode"} <= set(model.operations):
        return False
    required = [input_.tensor.shape for input_ in model.operations["decode"].inputs if not input_.optional]
    return required == [model.operations["encode"].outputs[0].shape]
