"""A request for rows, its progress, and what is delivered to whoever waits for it.

Arrays pass through here unread: this module and the scheduler know counts only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from server.core.spec import ProgramKey

# A window that holds whatever there is.
UNBOUNDED = 1 << 32


@dataclass(frozen=True)
class RowInputs:
    """What every row of a request computes: parameters, and inputs with batch axis 1 or rows."""

    parameters: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """What the inputs hold."""
        return sum(array.nbytes for array in self.inputs.values())


@dataclass(frozen=True)
class Rows:
    """Finished rows: the index of each, and the outputs in the same order."""

    indices: Sequence[int]
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Preview:
    """A readout of rows that are still on the way."""

    rows: Rows
    steps_done: Sequence[int]


@dataclass(frozen=True)
class Timings:
    """Where a request's time went, in seconds: waiting, then in the batch, of which in graphs."""

    queue: float
    run: float
    compute: float


@dataclass(frozen=True)
class Completed:
    """The last event of a request that succeeded."""

    timings: Timings


@dataclass(frozen=True)
class Failed:
    """The last event of a request that did not."""

    error: Exception


Event = Rows | Preview | Completed | Failed
Deliver = Callable[[Sequence[Event]], None]


@dataclass(eq=False)
class Request:
    """Rows to compute and where to deliver them. The scheduler owns the counts, the engine the times.

    At most `window` rows are on the way that the reader has not taken; inputs and those rows hold
    `held_bytes` until the reader leaves. A batch request lets interactive ones go first. The rows that
    are `lost` came out non-finite: they count as finished, and the request fails when the others are done.
    """

    program: ProgramKey
    rows: int
    steps: int
    deliver: Deliver
    seed: int = 0
    first_row: int = 0
    inputs: RowInputs = RowInputs()
    deadline: float | None = None
    preview_every: int = 0
    max_unread_rows: int = UNBOUNDED
    is_batch: bool = False
    has_early_exit: bool = False
    buffered_bytes: int = 0

    admitted: int = 0
    finished: int = 0
    nonfinite_rows: tuple[int, ...] = ()
    acknowledged: int = 0
    is_buffered: bool = False
    close_reason: str = ""
    submitted_at: float = 0.0
    started_at: float = 0.0
    model_seconds: float = 0.0
    deficit: int = 0
    level: int = 0

    @property
    def row_cost(self) -> int:
        """What a row takes of its slot's time, in steps."""
        return max(1, self.steps)

    @property
    def is_closed(self) -> bool:
        return bool(self.close_reason)

    @property
    def num_active(self) -> int:
        return self.admitted - self.finished

    @property
    def num_waiting(self) -> int:
        return self.rows - self.admitted

    @property
    def num_admissible(self) -> int:
        """Rows that may enter now: no more are on the way than the reader has room for."""
        return min(self.num_waiting, self.max_unread_rows - (self.admitted - self.acknowledged))

    @property
    def is_complete(self) -> bool:
        return self.finished == self.rows
