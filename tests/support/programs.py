"""Toy programs and graphs: enough to test everything below the edge, with nothing trained."""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch

from server.core.request import Completed, Deliver, Event, Failed, Preview, Request, RowInputs, Rows
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
from server.execution.program_runner import ProgramRunner
from server.runtime import Graph

Tensors = Sequence[torch.Tensor]

KEY = ProgramKey("toy", "1", "python", "sample")
TOTAL = TensorSpec("total", "float32", (2,))
INDEX = TensorSpec("step_index", "int64")
NOISE = NoiseSpec(TensorSpec("noise", "float32", (2,)), "normal", stream=1)
START = InputSpec(TensorSpec("start", "float32", (2,)), optional=True, default=0.0)
STEPS = ParameterSpec("steps", "integer", default=3, minimum=1, maximum=1000)
SCALE = ParameterSpec("scale", "float", default=1.0, minimum=0.0, maximum=10.0)

# A random walk: the sum of its start and of every step's scaled noise and step index.
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

# One call and no step, as a classifier or a decoder has.
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


def program(
    spec: ProgramSpec = WALK,
    graphs: Mapping[str, Graph] = GRAPHS,
    buckets: Sequence[int] = (1, 2, 4, 8),
    ahead: Executor | None = None,
) -> ProgramRunner:
    return ProgramRunner(spec, graphs, buckets, torch.device("cpu"), ahead)


@dataclass
class Reader:
    """Collects a request's events; `wait` returns them once the request has ended."""

    events: list[Event] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def deliver(self, events: Sequence[Event]) -> None:
        self.events += events
        if isinstance(events[-1], Completed | Failed):
            self.ended.set()

    def wait(self) -> list[Event]:
        assert self.ended.wait(30), "the request did not end within 30 s"
        return self.events

    def rows(self) -> dict[int, bytes]:
        """Every finished row's bytes, by row index."""
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
    reader: Reader | None = None,
    rows: int = 1,
    steps: int = 3,
    parameters: Mapping[str, float] | None = None,
    **settings: object,
) -> Request:
    """A request of the walk."""
    inputs = RowInputs({"steps": steps, "scale": 1.0, **(parameters or {})}, {})
    deliver: Deliver = (reader or Reader()).deliver
    return Request(KEY, rows, steps, **{"deliver": deliver, "inputs": inputs, **settings})  # type: ignore[arg-type]


@dataclass
class RecordingObserver:
    """An observer that remembers."""

    turns: list[int] = field(default_factory=list)
    wasted_steps: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    restarts: int = 0
    rows: int = 0

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        self.turns.append(rows)

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None:
        self.rows += rows

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None:
        self.wasted_steps[reason] = self.wasted_steps.get(reason, 0) + steps

    def on_error(self, program: ProgramKey, kind: str) -> None:
        self.faults.append(kind)

    def on_restart(self) -> None:
        self.restarts += 1
