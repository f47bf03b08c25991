"""An n-gram model: what a sequence model has to beat.

Witten & Bell, "The zero-frequency problem" (1991), interpolated over the orders:
after a context c that was seen n(c) times with t(c) different successors,

    p(x | c) = (n(c, x) + t(c) p(x | c')) / (n(c) + t(c)),

where c' is c without its oldest token, and p(x) without any context falls back on
the uniform mass of the vocabulary. Knows rows of tokens in which 0 is no token.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ORDER = 5

Context = tuple[int, ...]


class WittenBell:
    """Counts of tokens after contexts of up to order - 1 tokens, from rows [N, context]."""

    def __init__(self, rows: NDArray[Any], symbols: int, order: int = ORDER) -> None:
        self.symbols, self.order = symbols, order
        self._successors: defaultdict[Context, Counter[int]] = defaultdict(Counter)
        for tokens in _tokens(rows):
            for end, token in enumerate(tokens):
                for start in range(max(0, end - order + 1), end + 1):
                    self._successors[tuple(tokens[start:end])][token] += 1
        self._totals = {context: after.total() for context, after in self._successors.items()}

    def mass(self, context: Sequence[int], token: int) -> float:
        """p(token | the last order - 1 tokens of the context)."""
        known = tuple(context)[max(0, len(context) - self.order + 1) :]
        mass = 1 / self.symbols
        for start in range(len(known), -1, -1):
            after = self._successors.get(known[start:])
            if after is None:
                break
            mass = (after[token] + len(after) * mass) / (self._totals[known[start:]] + len(after))
        return mass

    def log_masses(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """log-mass of each row [N] in nats, each from its own beginning."""
        return np.array(
            [
                sum(
                    np.log(self.mass(tokens[max(0, end - self.order + 1) : end], token))
                    for end, token in enumerate(tokens)
                )
                for tokens in _tokens(rows)
            ]
        )


def _tokens(rows: NDArray[Any]) -> Iterator[list[int]]:
    for row in rows.tolist():
        yield row[: row.index(0)] if 0 in row else row
