"""Results of calls as frozen data, and the assembly of streamed rows."""

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
    """Reproducibility guarantee of a result: equal bytes, or only equal random numbers."""

    UNSPECIFIED = "unspecified"
    BITWISE = "bitwise"
    SEEDED = "seeded"


@dataclass(frozen=True)
class RunInfo:
    """What computed a result. Together with the request it is enough to compute the result again.

    Attributes:
        artifact_sha256: SHA-256 of the artifact's manifest, as hexadecimal.
        version: The model's version.
        format: The format of the graphs: "onnx", "torchscript" or "torch_export".
        seed: The seed of the random numbers.
        steps: Number of steps of a row that does not exit early.
        determinism: The reproducibility guarantee.
    """

    artifact_sha256: str
    version: str
    format: str
    seed: int
    steps: int
    determinism: Determinism


@dataclass(frozen=True)
class Timings:
    """Seconds spent in each phase on the server.

    Attributes:
        queue: Seconds in the queue before the first step.
        run: Seconds from the first step to the last row.
        compute: Seconds inside the model's graphs.
    """

    queue: float = 0.0
    run: float = 0.0
    compute: float = 0.0

    def __add__(self, other: "Timings") -> "Timings":
        return Timings(self.queue + other.queue, self.run + other.run, self.compute + other.compute)


@dataclass(frozen=True, eq=False)
class Result:
    """Output rows of a call, in the order of the request.

    Attributes:
        outputs: Arrays by name, [rows, *shape]; the primary output first.
        run: What computed the rows.
        timings: Seconds spent in each phase.
    """

    outputs: Mapping[str, Array]
    run: RunInfo
    timings: Timings

    @property
    def value(self) -> Array:
        """The primary output: the first that the operation declares, [rows, *shape]."""
        return next(iter(self.outputs.values()))


@dataclass(frozen=True, eq=False)
class Scores(Result):
    """Scores of rows in nats, and their meaning.

    Attributes:
        outputs: Further outputs of the operation by name, [rows, *shape].
        nats: The scores in nats, [rows].
        bits_per_dimension: -nats / (dimensions x ln 2), [rows]; None for unnormalized scores.
        standard_error: Standard error of the nats, [rows]; None unless the score is a Monte Carlo estimate.
        kind: Relation of the score to the log-density.
        dimensions: Number of dimensions of a row.
        coordinate_space: Coordinates of the density, such as "integers 0..16".
        draws: Number of Monte Carlo draws per row; 0 if there are none.
    """

    nats: Array
    bits_per_dimension: Array | None
    standard_error: Array | None
    kind: ScoreKind
    dimensions: int
    coordinate_space: str
    draws: int

    @property
    def value(self) -> Array:
        """The scores in nats, [rows]."""
        return self.nats

    def columns(self) -> dict[str, Array]:
        """Return all arrays by name: the nats first, then the others that are present."""
        columns = {
            "nats": self.nats,
            "standard_error": self.standard_error,
            "bits_per_dimension": self.bits_per_dimension,
            **self.outputs,
        }
        return {name: column for name, column in columns.items() if column is not None}


@dataclass(frozen=True, eq=False)
class Rows:
    """Finished rows of a stream.

    Attributes:
        indices: Indices of the rows, [rows].
        outputs: Arrays by name in the order of `indices`, [rows, *shape].
    """

    indices: NDArray[np.int64]
    outputs: Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Preview:
    """Unfinished rows of a stream, read out after some of their steps.

    Attributes:
        indices: Indices of the rows, [rows].
        steps_done: Number of steps that each row has completed, [rows].
        outputs: Arrays by name in the order of `indices`, [rows, *shape].
    """

    indices: NDArray[np.int64]
    steps_done: NDArray[np.int64]
    outputs: Mapping[str, Array]


Event = Rows | Preview


@dataclass(frozen=True)
class ServerInfo:
    """Description of a server, with its limits and settings. A value of 0 means unknown.

    Attributes:
        version: The server's version.
        device: The device that runs the graphs.
        library_versions: Versions of the main libraries, by name.
        max_message_bytes: Largest message in bytes, in either direction.
        max_rows_per_request: Largest number of rows of one request.
        max_queued_rows: Largest number of queued rows of all requests; above it, calls raise Overloaded.
        max_batch_rows: Largest number of rows that share one step.
        max_buffered_bytes: Largest number of bytes in inputs and unread outputs of open requests; above
            it, calls raise Overloaded.
        max_concurrent_calls: Largest number of concurrent calls; above it, calls raise Overloaded.
        drr_quantum_rows: Quantum of deficit round robin in rows: rows that a request may place in one
            round while others wait.
        intra_op_threads: CPU threads of one graph call.
        formats: The loaded formats, in order of preference.
        cuda_graphs: True if steps on a GPU are replayed as CUDA graphs.
        grpc_workers: Worker processes that speak gRPC; 0 if the engine's process does.
        drain_timeout_seconds: Seconds that open calls have to finish when the server stops.
    """

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
    """Arrays of all rows of a stream, filled in as events arrive.

    Args:
        rows: Number of requested rows.
        first_row: Index of the first row.

    Attributes:
        outputs: Arrays by name, [rows, *shape]; zeros for rows that have not arrived.
    """

    def __init__(self, rows: int, first_row: int = 0) -> None:
        self.rows = rows
        self.first_row = first_row
        self.outputs: dict[str, Array] = {}
        self._finished = np.zeros(rows, bool)

    @property
    def num_finished(self) -> int:
        """Number of finished rows."""
        return int(self._finished.sum())

    def place(self, event: Event) -> None:
        """Copy finished or unfinished rows to their positions.

        Raises:
            ServerError: If a row was not requested.
        """
        positions = event.indices - self.first_row
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.rows:
            raise ServerError(f"unexpected rows: requested {self._requested}, got {event.indices.tolist()}")
        for name, array in event.outputs.items():
            if name not in self.outputs:
                self.outputs[name] = np.zeros((self.rows, *array.shape[1:]), array.dtype)
            self.outputs[name][positions] = array
        if isinstance(event, Rows):
            self._finished[positions] = True

    def complete(self) -> dict[str, Array]:
        """Return all outputs, rows in order.

        Raises:
            ServerError: If a row has not finished.
        """
        if not self._finished.all():
            raise ServerError(f"missing rows: requested {self._requested}, got {self.num_finished} of them")
        return self.outputs

    @property
    def _requested(self) -> str:
        return f"rows {self.first_row}..{self.first_row + self.rows - 1}"


class ReorderBuffer:
    """Buffer that releases finished rows in the order of their indices.

    Args:
        first_row: Index of the first row to release.
    """

    def __init__(self, first_row: int = 0) -> None:
        self._next = first_row
        self._buffered: dict[int, Mapping[str, Array]] = {}

    def push(self, rows: Rows) -> Rows | None:
        """Add rows and return those that come next in order; None if the next row is still missing."""
        for position, index in enumerate(rows.indices.tolist()):
            self._buffered[index] = {name: array[position] for name, array in rows.outputs.items()}
        first, ready = self._next, list[Mapping[str, Array]]()
        while self._next in self._buffered:
            ready.append(self._buffered.pop(self._next))
            self._next += 1
        if not ready:
            return None
        outputs = {name: np.stack([row[name] for row in ready]) for name in rows.outputs}
        return Rows(np.arange(first, self._next, dtype=np.int64), outputs)


ResultT = TypeVar("ResultT", bound=Result)


def merge(parts: Sequence[ResultT]) -> ResultT:
    """Concatenate the results of consecutive rows; the arrays are writable copies."""
    outputs = {name: np.concatenate([part.outputs[name] for part in parts]) for name in parts[0].outputs}
    return replace(parts[0], outputs=outputs, timings=sum((part.timings for part in parts), Timings()))


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """Concatenate the scores of consecutive rows; the arrays are writable copies."""
    return replace(
        merge(parts),
        nats=np.concatenate([part.nats for part in parts]),
        bits_per_dimension=_concatenate([part.bits_per_dimension for part in parts]),
        standard_error=_concatenate([part.standard_error for part in parts]),
    )


def _concatenate(arrays: Sequence[Array | None]) -> Array | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present) if present else None
