"""Results of a step, which may still be on their way from the device."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.core.request import Request, Rows
from server.execution.device_operations import Arrays

Array = NDArray[Any]
# Rows of one request by their positions in a readout, and whether they are finite.
Group = tuple[Request, Array | slice, bool]


@dataclass(frozen=True)
class Readout:
    """Rows of one request that were read out: finished rows, or previews of unfinished ones.

    Finite and non-finite rows of a request are in separate readouts.
    """

    request: Request
    rows: Rows
    steps_done: Sequence[int]
    is_finished: bool
    is_finite: bool = True


@dataclass(frozen=True)
class Finished:
    """Rows of a request that left their slots, and the steps that they had taken together."""

    rows: int
    steps: int


@dataclass(frozen=True)
class PendingReadout:
    """Rows that were read out on the device.

    Attributes:
        groups: positions of the rows of each request.
        row: row indices, [B].
        steps_done: steps that the rows have taken, [B].
        names: names of the outputs.
        arrays: waits for the outputs, in the order of `names`, and then whether the state is finite, [B].
        is_finished: whether the rows left their slots.
    """

    groups: Sequence[tuple[Request, Array | slice]]
    row: Array
    steps_done: Array
    names: Sequence[str]
    arrays: Arrays
    is_finished: bool

    def finished(self) -> dict[Request, Finished]:
        """Return the rows that left their slots, by request."""
        if not self.is_finished:
            return {}
        steps = {request: self.steps_done[members] for request, members in self.groups}
        return {request: Finished(len(done), int(done.sum())) for request, done in steps.items()}

    def wait(self) -> list[Readout]:
        """Wait for the outputs, and return the rows by request."""
        *outputs, is_state_finite = self.arrays()
        arrays = dict(zip(self.names, outputs, strict=True))
        is_finite = _finite(arrays, is_state_finite)
        groups: list[Group] = [(*group, True) for group in self.groups]
        if not is_finite.all():
            groups = list(_split_by_finite(groups, is_finite))
        return [
            Readout(
                request,
                Rows(
                    indices=self.row[members].tolist(),
                    outputs={name: array[members] for name, array in arrays.items()},
                ),
                self.steps_done[members].tolist(),
                self.is_finished,
                are_finite,
            )
            for request, members, are_finite in groups
        ]


@dataclass(frozen=True)
class StepResult:
    """Result of a turn: what is known when its work has been given to the device, and what is not.

    Attributes:
        rows: rows that took part.
        bucket: batch size of the call, padding included.
        finished: rows that left their slots, by request.
        wait: waits for the step; returns its readouts.
        device_seconds: returns the seconds of the turn on an asynchronous device, after `wait`; else None.
        num_oom: batches that did not fit into memory and were split.
        steps: steps that the turn took, all with the same rows.
    """

    rows: int
    bucket: int
    finished: Mapping[Request, Finished] = field(default_factory=dict)
    wait: Callable[[], list[Readout]] = list
    device_seconds: Callable[[], float | None] = lambda: None
    num_oom: int = 0
    steps: int = 1


def _finite(outputs: Mapping[str, Array], is_state_finite: Array) -> NDArray[np.bool_]:
    """Return which rows have finite outputs and state: quantized outputs hide a non-finite state."""
    is_finite: NDArray[np.bool_] = is_state_finite
    for array in outputs.values():
        if array.dtype.kind == "f":
            is_finite = is_finite & np.isfinite(array).reshape(len(array), -1).all(1)
    return is_finite


def _split_by_finite(groups: Iterable[Group], is_finite: NDArray[np.bool_]) -> Iterator[Group]:
    for request, members, _ in groups:
        positions = np.arange(len(is_finite))[members]
        for are_finite in (True, False):
            selected = positions[is_finite[positions] == are_finite]
            if len(selected):
                yield request, selected, are_finite
