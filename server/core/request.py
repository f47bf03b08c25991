"""Requests for rows, and the events that answer them.

Arrays pass through unread: this module knows their number of bytes at most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.core.spec import ProgramKey

# Larger than the number of rows of any request: no limit on unread rows.
UNBOUNDED = 1 << 32


@dataclass(frozen=True, eq=False)
class Request:
    """Rows to compute by one program. Two requests are equal only if they are the same object.

    Attributes:
        program: the program that computes the rows.
        rows: number of rows, at least 1.
        steps: steps of each row.
        seed: seed of the random numbers.
        first_row: index of the first row; the others follow.
        parameters: value of every parameter of the program, the same for every row.
        inputs: arrays by name, [rows, *row shape], or [1, *row shape] when all rows share one.
        deadline: time on the monotonic clock, in seconds, after which the result is useless; None for never.
        preview_every: steps between previews of a row; 0 for no previews.
        max_unread_rows: rows that may be in progress or unread by the caller (backpressure).
        is_batch: whether interactive requests go first.
        has_early_exit: whether a row may end before its last step.
        buffered_bytes: bytes of the inputs and of the unread rows, held until the request is released.
    """

    program: ProgramKey
    rows: int
    steps: int
    seed: int = 0
    first_row: int = 0
    parameters: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    deadline: float | None = None
    preview_every: int = 0
    max_unread_rows: int = UNBOUNDED
    is_batch: bool = False
    has_early_exit: bool = False
    buffered_bytes: int = 0

    @property
    def indices(self) -> range:
        """Index of every row."""
        return range(self.first_row, self.first_row + self.rows)


@dataclass(frozen=True)
class Admission:
    """Rows of a request that enter the batch: the rows at offsets `first` to `first + count - 1`."""

    request: Request
    first: int
    count: int


@dataclass(frozen=True)
class Rows:
    """Finished rows: their indices, and outputs by name, [B, *row shape], in the same order."""

    indices: Sequence[int]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """Readout of unfinished rows, with the number of steps that each has completed."""

    rows: Rows
    steps_done: Sequence[int]


@dataclass(frozen=True)
class Timings:
    """Seconds that a request was queued, then in the batch, and of those in graphs."""

    queue: float
    run: float
    compute: float


@dataclass(frozen=True)
class Completed:
    """Last event of a request that succeeded."""

    timings: Timings


@dataclass(frozen=True)
class Failed:
    """Last event of a request that failed."""

    error: Exception


Event = Rows | Preview | Completed | Failed
# Takes events of a request in order; may be called on any thread and must not block.
Deliver = Callable[[Sequence[Event]], None]
