"""Tests of the n-gram baseline: normalized probabilities and the Witten-Bell estimate."""

import numpy as np
import pytest

from export.evaluation.ngram import WittenBell


def pad(tokens: list[int], context: int) -> np.ndarray:
    """Return one row [1, context] of tokens with zeros after them."""
    row = np.zeros((1, context), np.uint8)
    row[0, : len(tokens)] = tokens
    return row


@pytest.mark.parametrize("order", [1, 2, 4])
def test_witten_bell_probabilities_sum_to_one_and_score_sequences(order: int) -> None:
    rows = np.random.default_rng(1).integers(1, 4, (20, 9)).astype(np.uint8)
    model = WittenBell(rows, 3, order)
    for context in ([], [1], [2, 2], [3, 1, 2], [1, 1, 1, 1, 1]):
        assert sum(model.probability(context, token) for token in (1, 2, 3)) == pytest.approx(1)
    steps = [model.probability([1, 2, 3][:end], token) for end, token in enumerate([1, 2, 3, 1])]
    assert model.log_probabilities(pad([1, 2, 3, 1], 9)) == pytest.approx([np.log(steps).sum()])


def test_witten_bell_equals_values_computed_by_hand() -> None:
    """`aab`, with two symbols: p(b | a) = (1 + 2 p(b)) / (2 + 2) and p(b) = (1 + 2 / 2) / (3 + 2)."""
    model = WittenBell(pad([1, 1, 2], 4), 2, order=2)
    assert model.probability([], 2) == pytest.approx(2 / 5)
    assert model.probability([1], 2) == pytest.approx((1 + 2 * 2 / 5) / 4)
    assert model.probability([2], 2) == pytest.approx(2 / 5)
