"""Small programs, graphs and requests, to test the engine without a trained model."""

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch

from server.core.request import Admission, Completed, Event, Failed, Preview, Request, Rows
from server.core.spec import (
    GraphSpec,
    InputSpec,
    NoiseSpec,
    ParameterSpec,
    ProgramKey,
    ProgramSpec,
    StepSchedule,
    TensorSpec,
)
from server.execution.device_operations import DeviceOperations
from server.execution.program_runner import ProgramRunner
from server.runtime import Device, Graph

Tensors = Sequence[torch.Tensor]

KEY = ProgramKey("toy", "1", "python", "sample")
TOTAL = TensorSpec("total", "float32", (2,))
INDEX = TensorSpec("step_index", "int64")
NOISE = NoiseSpec(TensorSpec("noise", "float32", (2,)), "normal", stream=1)
START = InputSpec(TensorSpec("start", "float32", (2,)), optional=True, default=0.0)
STEPS = ParameterSpec("steps", "integer", default=3, minimum=1, maximum=1000)
SCALE = ParameterSpec("scale", "float", default=1.0, minimum=0.0, maximum=10.0)

# A random walk: the start plus the scaled noise and the index of every step.
WALK = ProgramSpec(
    operation="sample",
    init=GraphSpec("begin", (START.tensor,), (TOTAL,)),
    step=GraphSpec("walk", (TOTAL, INDEX, SCALE.tensor, NOISE.tensor), (TOTAL,)),
    readout=GraphSpec("end", (TOTAL,), (TensorSpec("value", "float32", (2,)),)),
    state=(TOTAL,),
    steps=StepSchedule(parameter="steps"),
    parameters=(STEPS, SCALE),
    inputs=(START,),
    noise=(NOISE,),
    previewable=True,
)

# A program without steps, like a classifier or a decoder.
ECHO = ProgramSpec(
    operation="decode",
    readout=GraphSpec("end", (START.tensor,), (TensorSpec("value", "float32", (2,)),)),
    inputs=(START,),
)


def walk(inputs: Tensors) -> Tensors:
    total, index, scale, noise = inputs
    return [total + scale[:, None] * noise + index[:, None]]


def identity(inputs: Tensors) -> Tensors:
    return [inputs[0].clone()]


GRAPHS: Mapping[str, Graph] = {"begin": identity, "walk": walk, "end": identity}


def new_runner(
    spec: ProgramSpec = WALK,
    graphs: Mapping[str, Graph] = GRAPHS,
    buckets: Sequence[int] = (1, 2, 4, 8),
    prefetch_executor: Executor | None = None,
    runner: type[ProgramRunner] = ProgramRunner,
    operations: DeviceOperations | None = None,
) -> ProgramRunner:
    return runner(spec, graphs, buckets, Device(), prefetch_executor, operations)


@dataclass
class Reader:
    """Collects the events of a request; `wait` returns them once the request has ended."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        self.events += events
        if isinstance(events[-1], Completed | Failed):
            self.ended.set()

    def wait(self) -> list[Event]:
        assert self.ended.wait(500), "the request did not end"
        return self.events

    @property
    def num_rows(self) -> int:
        """Finished rows so far."""
        return sum(len(event.indices) for event in self.events if isinstance(event, Rows))

    def await_rows(self, rows: int) -> None:
        """Wait until `rows` rows have finished."""
        for _ in range(30_000):
            if self.num_rows >= rows:
                return
            time.sleep(0.001)
        raise AssertionError(f"only {self.num_rows} of {rows} rows finished within 30 s")

    def rows(self) -> dict[int, bytes]:
        """Wait, and return the bytes of each finished row by its index."""
        found: dict[int, bytes] = {}
        for event in self.wait():
            if isinstance(event, Rows):
                for index, row in zip(event.indices, event.outputs["value"], strict=True):
                    assert index not in found, f"row {index} was delivered twice"
                    found[index] = row.tobytes()
        return found

    def previews(self) -> list[Preview]:
        return [event for event in self.events if isinstance(event, Preview)]

    def error(self) -> Exception:
        last = self.wait()[-1]
        assert isinstance(last, Failed)
        return last.error


def request(
    rows: int = 1, steps: int = 3, parameters: Mapping[str, float] | None = None, **fields: object
) -> Request:
    """Return a request of the random walk."""
    values = {"steps": steps, "scale": 1.0, **(parameters or {})}
    return Request(KEY, rows, steps, parameters=values, **fields)  # type: ignore[arg-type]


def admit(runner: ProgramRunner, *requests: Request) -> None:
    """Put all rows of requests into slots."""
    runner.admit([Admission(queued, 0, queued.rows) for queued in requests])


@dataclass
class RecordingObserver:
    """Engine observer that records all callbacks."""

    dequeued: int = 0
    step_rows: list[int] = field(default_factory=list)
    discarded_steps: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    restarts: int = 0
    rows: int = 0

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None:
        self.dequeued += 1

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        self.step_rows.append(rows)

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None:
        self.rows += rows

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None:
        self.discarded_steps[reason] = self.discarded_steps.get(reason, 0) + steps

    def on_error(self, program: ProgramKey, kind: str) -> None:
        self.errors.append(kind)

    def on_restart(self) -> None:
        self.restarts += 1
