"""Inputs for requests: samples of the models, or random numbers within the declared bounds."""

from collections.abc import Sequence

import numpy as np

import samovar
from conformance.requests import SEED, Array
from samovar.model import DataKind

_PROMPT_TOKENS = 5


class SampleInputs:
    """Rows for every input of every model. The rows of an input are the same in every call.

    Args:
        client: connection to the server, which draws the samples.
        models: models to sample from.
        num_rows: number of rows of each input.
    """

    def __init__(self, client: samovar.Client, models: Sequence[samovar.Model], num_rows: int) -> None:
        self.num_rows = num_rows
        self._samples: dict[object, Array] = {}
        for model in models:
            key = _row_type(model.data_spec.tensor)
            if "sample" in model.operations and key not in self._samples:
                result = client.sample(model.name, num_rows, seed=SEED, version=model.version)
                self._samples[key] = result.value

    def rows_for(self, model: samovar.Model, spec: samovar.TensorSpec) -> Array:
        """Return rows for an input of a model, [num_rows, *spec.shape] of type spec.dtype."""
        samples = self._samples.get(_row_type(spec))
        if samples is None or _row_type(spec) != _row_type(model.data_spec.tensor):
            return self._random_rows(spec)
        is_prompt = model.data_spec.kind is DataKind.TOKENS and spec.name != model.data_spec.tensor.name
        return _truncate(samples) if is_prompt else samples

    def _random_rows(self, spec: samovar.TensorSpec) -> Array:
        generator, shape = np.random.default_rng(SEED), (self.num_rows, *spec.shape)
        if spec.dtype.kind == "f":
            return np.clip(generator.standard_normal(shape), spec.minimum, spec.maximum).astype(spec.dtype)
        low = 0 if spec.minimum is None else int(spec.minimum)
        high = low + 1 if spec.maximum is None else int(spec.maximum)
        return generator.integers(low, high + 1, shape).astype(spec.dtype)


def _truncate(tokens: Array) -> Array:
    """Return the first tokens of each row, padded with 0, so that the model has tokens to add."""
    return np.where(np.arange(tokens.shape[1]) < _PROMPT_TOKENS, tokens, 0).astype(tokens.dtype)


def _row_type(spec: samovar.TensorSpec) -> tuple[object, ...]:
    return spec.dtype, spec.shape, spec.minimum, spec.maximum
