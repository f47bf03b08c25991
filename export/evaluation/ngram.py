"""N-gram model, the baseline for sequence models.

Interpolated Witten-Bell smoothing ("The zero-frequency problem", 1991): after a context c that was seen n(c)
times with t(c) different successors,

    p(x | c) = (n(c, x) + t(c) p(x | c')) / (n(c) + t(c)),

where c' is c without its oldest token. The empty context falls back to the uniform distribution over the
vocabulary. Token 0 is padding.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = 5

Context = tuple[int, ...]


class WittenBell:
    """N-gram model of order `order`: a token depends on the `order` - 1 tokens before it.

    Args:
        rows: training rows [N, context] of tokens, padded with 0 at the end.
        num_symbols: size of the vocabulary without the padding.
        order: the n of the n-gram.
    """

    def __init__(self, rows: NDArray[Any], num_symbols: int, order: int = ORDER) -> None:
        self.num_symbols, self.order = num_symbols, order
        self._successors: defaultdict[Context, Counter[int]] = defaultdict(Counter)
        for tokens in _unpad(rows):
            for end, token in enumerate(tokens):
                for start in range(max(0, end - order + 1), end + 1):
                    self._successors[tuple(tokens[start:end])][token] += 1
        self._totals = {context: counts.total() for context, counts in self._successors.items()}

    def probability(self, context: Sequence[int], token: int) -> float:
        """Return p(token | the last `order` - 1 tokens of `context`)."""
        suffix = tuple(context)[max(0, len(context) - self.order + 1) :]
        probability = 1 / self.num_symbols
        for start in range(len(suffix), -1, -1):
            counts = self._successors.get(suffix[start:])
            if counts is None:
                break
            total = self._totals[suffix[start:]]
            probability = (counts[token] + len(counts) * probability) / (total + len(counts))
        return probability

    def log_probabilities(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Return the log-probability of each row in nats, float64 [N]; rows are padded with 0 at the end."""
        return np.array(
            [
                sum(
                    np.log(self.probability(tokens[max(0, end - self.order + 1) : end], token))
                    for end, token in enumerate(tokens)
                )
                for tokens in _unpad(rows)
            ]
        )


def _unpad(rows: NDArray[Any]) -> Iterator[list[int]]:
    for row in rows.tolist():
        yield row[: row.index(0)] if 0 in row else row
