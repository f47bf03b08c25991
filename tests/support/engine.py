"""A running engine over one small program, with a clock and graphs that a test controls."""

import threading
from collections.abc import Mapping, Sequence

import torch

from server.core.request import Request
from server.engine.engine import Engine
from server.engine.scheduler import BatchingPolicy, Limits, Scheduler
from server.execution.device_operations import DeviceOperations
from server.execution.program_runner import ProgramRunner
from server.runtime import Graph
from tests.support import programs
from tests.support.programs import KEY, Reader, RecordingObserver, admit, new_runner, request

Tensors = Sequence[torch.Tensor]


class Gate:
    """A graph that waits for permission: `open` lets that many calls of the wrapped graph through."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._allowed = threading.Semaphore(0)
        self._entered = threading.Semaphore(0)

    def __call__(self, inputs: Tensors) -> Tensors:
        self._entered.release()
        assert self._allowed.acquire(timeout=500), "the gate was not opened"
        return self._graph(inputs)

    def await_call(self) -> None:
        assert self._entered.acquire(timeout=500), "the graph was not called"

    def open(self, calls: int = 1) -> None:
        self._allowed.release(calls)


class Clock:
    """A clock that advances only when a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A running engine over one small program, pipelined if its device works asynchronously."""

    def __init__(
        self,
        graphs: Mapping[str, Graph] = programs.GRAPHS,
        limits: Limits | None = None,
        batching: BatchingPolicy | None = None,
        runner: type[ProgramRunner] = ProgramRunner,
        operations: DeviceOperations | None = None,
    ) -> None:
        self.observer = RecordingObserver()
        self.clock = Clock()
        depth = 1 if operations and operations.is_async else 0
        self.engine = Engine(Scheduler(limits, batching), self.observer, self.clock, pipeline_depth=depth)
        self.engine.add(KEY, new_runner(graphs=graphs, runner=runner, operations=operations))
        self.engine.start()

    def submit(self, **fields: object) -> tuple[Request, Reader]:
        reader, submitted = Reader(), request(**fields)  # type: ignore[arg-type]
        self.engine.submit(submitted, reader.deliver)
        return submitted, reader


def bytes_alone(seed: int, index: int, steps: int, scale: float = 1.0) -> bytes:
    """Return a row's bytes when no other row is computed."""
    runner = new_runner(buckets=(8,))
    admit(runner, request(steps=steps, seed=seed, first_row=index, parameters={"scale": scale}))
    while True:
        for readout in runner.advance().wait():
            value: bytes = readout.rows.outputs["value"].tobytes()
            return value
