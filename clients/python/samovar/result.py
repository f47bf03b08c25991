"""What a call answers, as frozen data. Knows neither protobuf nor how the answer came."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from samovar.errors import ServerError
from samovar.model import ScoreKind
from samovar.tensors import Array


class Determinism(StrEnum):
    """How far equal requests have equal answers: the same bytes, or the same random numbers."""

    UNSPECIFIED = "unspecified"
    BITWISE = "bitwise"
    SEEDED = "seeded"


@dataclass(frozen=True)
class RunInfo:
    """What computed an answer: with the request, enough to compute it again."""

    artifact_sha256: str
    version: str
    format: str
    seed: int
    steps: int
    determinism: Determinism


@dataclass(frozen=True)
class Timings:
    """Seconds in the queue, from the first batch to the last row, and inside the model's graphs."""

    queue: float = 0.0
    run: float = 0.0
    compute: float = 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(self.queue + other.queue, self.run + other.run, self.compute + other.compute)


@dataclass(frozen=True, eq=False)
class Result:
    """Outputs by name, batch axis first, rows in the order of the request."""

    outputs: Mapping[str, Array]
    run: RunInfo
    timings: Timings

    @property
    def value(self) -> Array:
        """The main output: the first that the program declares."""
        return next(iter(self.outputs.values()))


@dataclass(frozen=True, eq=False)
class Scores(Result):
    """Scores [rows] in nats, and what they are; `outputs` holds what else the program says.

    `standard_error` (nats) is there for Monte Carlo scores, which take `draws` draws a row.
    `bits_per_dimension` is -nats / (dimensions x ln 2), where that means something.
    """

    nats: Array
    bits_per_dimension: Array | None
    standard_error: Array | None
    kind: ScoreKind
    dimensions: int
    space: str
    draws: int

    @property
    def value(self) -> Array:
        return self.nats

    def columns(self) -> dict[str, Array]:
        """Every number that there is, by name, the nats first."""
        columns = {
            "nats": self.nats,
            "standard_error": self.standard_error,
            "bits_per_dimension": self.bits_per_dimension,
            **self.outputs,
        }
        return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True, eq=False)
class Rows:
    """Finished rows of a stream: their indices [rows], and their outputs in that order."""

    indices: NDArray[np.int64]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Preview:
    """Rows on the way: their indices, the steps that each has done, and what a readout gives now."""

    indices: NDArray[np.int64]
    steps_done: NDArray[np.int64]
    outputs: Mapping[str, Array]


Event = Rows | Preview


@dataclass(frozen=True)
class ServerInfo:
    """What serves, and within which limits."""

    version: str
    device: str
    library_versions: Mapping[str, str]
    max_message_bytes: int
    max_rows_per_request: int
    max_queued_rows: int
    max_batch_rows: int
    max_buffered_bytes: int = 0
    max_concurrent_calls: int = 0
    drr_quantum_rows: int = 0
    intra_op_threads: int = 0
    formats: tuple[str, ...] = ()
    cuda_graphs: bool = False
    grpc_workers: int = 0
    drain_timeout_seconds: float = 0.0


class RowCollector:
    """The rows of one stream, each put in its place as it comes."""

    def __init__(self, rows: int, first_row: int = 0) -> None:
        self.rows = rows
        self.first_row = first_row
        self.outputs: dict[str, Array] = {}
        self._finished = np.zeros(rows, bool)

    @property
    def num_finished(self) -> int:
        return int(self._finished.sum())

    def place(self, event: Event) -> None:
        """Put rows, finished or not, where they belong."""
        places = event.indices - self.first_row
        if len(places) and not 0 <= places.min() <= places.max() < self.rows:
            raise ServerError(f"asked for {self._asked}, the server sent rows {event.indices.tolist()}")
        for name, array in event.outputs.items():
            if name not in self.outputs:
                self.outputs[name] = np.zeros((self.rows, *array.shape[1:]), array.dtype)
            self.outputs[name][places] = array
        if isinstance(event, Rows):
            self._finished[places] = True

    def complete(self) -> dict[str, Array]:
        """All outputs, rows in order; ServerError when rows are missing."""
        if not self._finished.all():
            raise ServerError(f"asked for {self._asked}, the server sent {self.num_finished} of them")
        return self.outputs

    @property
    def _asked(self) -> str:
        return f"rows {self.first_row}..{self.first_row + self.rows - 1}"


class InOrder:
    """Holds finished rows of one stream back until those before them have come."""

    def __init__(self, first_row: int = 0) -> None:
        self._next = first_row
        self._early: dict[int, Mapping[str, Array]] = {}

    def follow(self, rows: Rows) -> Rows | None:
        """The rows that come next, as far as they are there; None while the very next one is not."""
        for place, index in enumerate(rows.indices.tolist()):
            self._early[index] = {name: array[place] for name, array in rows.outputs.items()}
        first, ready = self._next, list[Mapping[str, Array]]()
        while self._next in self._early:
            ready.append(self._early.pop(self._next))
            self._next += 1
        if not ready:
            return None
        outputs = {name: np.stack([row[name] for row in ready]) for name in rows.outputs}
        return Rows(np.arange(first, self._next, dtype=np.int64), outputs)


R = TypeVar("R", bound=Result)


def merge(parts: Sequence[R]) -> R:
    """One result from those of consecutive rows; arrays are copied and writable."""
    outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
    return replace(parts[0], outputs=outputs, timings=sum((part.timings for part in parts), Timings()))


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The same for scores."""
    return replace(
        merge(parts),
        nats=np.concatenate([part.nats for part in parts]),
        bits_per_dimension=_joined([part.bits_per_dimension for part in parts]),
        standard_error=_joined([part.standard_error for part in parts]),
    )


def _joined(arrays: Sequence[Array | None]) -> Array | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
