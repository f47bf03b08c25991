"""How much of a bare loop's speed is left when the same graphs are served.

The bare loop calls init, step and readout of one full batch again and again on tensors that stay
where they are, with its noise already drawn: no queue, no seeds, no rows that come and go.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import samovar
from benchmarks import artifacts
from benchmarks.report import Section, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.spread import ratio, spread
from benchmarks.suites.base import Bench
from server import artifact
from server.runtime import RUNTIMES, Device, Graph, bound
from server.spec import GraphSpec, ProgramSpec

BUCKETS = (8, 64)

TEXT = """\
Rows × steps per second of one long request, over those of a bare loop on the same ONNX graphs at the same
batch size, in turns. The bare loop has its noise drawn beforehand; the server draws it while it runs,
admits new rows as old ones finish, reads them out and sends them. The targets: 0.90 at 64 rows for
diffusion, PixelCNN and EBM; 0.70 for LSTM tokens and at 8 rows."""


@dataclass(frozen=True)
class Case:
    """A program that takes many steps, and how many."""

    model: str
    steps: int
    parameter: str = ""

    @property
    def parameters(self) -> Mapping[str, int]:
        return {self.parameter: self.steps} if self.parameter else {}


CASES = (
    Case(artifacts.DIFFUSION, 20, "steps"),
    Case(artifacts.PIXELCNN, 64),
    Case(artifacts.EBM, 100, "steps"),
    Case(artifacts.LSTM, 128, "tokens"),
)


def run(bench: Bench) -> Section:
    """Measure every family in every bucket."""
    cases = CASES[:1] if bench.is_quick else CASES
    models = bench.models(*(case.model for case in cases))
    rows = []
    for bucket in BUCKETS[1 if bench.is_quick else 0 :]:
        with samovar_server(models, "--max-batch-rows", str(bucket), "--threads", "1") as server:
            rows += [_row(bench, case, bucket, server, models) for case in cases]
    columns = ("model", "rows a step", "served, row steps/s", "bare, row steps/s", "ratio")
    return Section("Engine efficiency", TEXT, (Table(columns, rows),))


def _row(bench: Bench, case: Case, bucket: int, server: Server, models: Path) -> tuple[str, ...]:
    loop = Loop(models / case.model / "1", case, bucket)
    seconds = bench.either(0.4, 1.5)
    served, bare = [], []
    for _ in range(bench.repeats):
        bare.append(loop.rate(seconds))
        served.append(served_rate(server, case, bucket, bare[-1], seconds))
    return case.model, str(bucket), str(spread(served)), str(spread(bare)), str(ratio(served, bare))


def served_rate(server: Server, case: Case, bucket: int, expected: float, seconds: float) -> float:
    """Row steps per second of one request that keeps every slot busy for about so long."""
    batches = max(1, round(expected * seconds / (bucket * case.steps)))
    with samovar.Client(server.address, timeout=None) as client:
        client.sample(case.model, 1, seed=0, parameters=case.parameters)
        before, start = server.metric("samovar_step_rows_sum"), time.perf_counter()
        client.sample(
            case.model, batches * bucket, seed=1, parameters=case.parameters, priority="interactive"
        )
        taken = time.perf_counter() - start
    return (server.metric("samovar_step_rows_sum") - before) / taken


class Loop:
    """A program's graphs bound to tensors of one full batch."""

    def __init__(self, directory: Path, case: Case, bucket: int) -> None:
        _, spec = artifact.read(directory)
        self._program, self._steps, self._bucket = spec.programs["sample"], case.steps, bucket
        self._files, self._graphs = spec.files["onnx"], spec.graphs()
        self._tables = tables(self._program, bucket, {**self._program.defaults(), **case.parameters})
        self._tables["num_steps"].fill_(case.steps)
        self._next = {tensor.name: self._tables[tensor.name].clone() for tensor in self._program.state}
        self._pass = self._bound()

    def rate(self, seconds: float) -> float:
        """Row steps per second over whole passes."""
        self._pass()
        start, passes = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            self._pass()
            passes += 1
        return passes * self._steps * self._bucket / (time.perf_counter() - start)

    def _bound(self) -> Callable[[], None]:
        """One pass of all rows: init, the steps from one side of the state's tables to the other, readout."""
        program, tables = self._program, self._tables
        sides = [tables, {**tables, **self._next}]
        states = [[side[tensor.name] for tensor in program.state] for side in sides]
        begin = self._call(program.init, tables, states[0])
        steps = [self._call(program.step, sides[side], states[1 - side]) for side in (0, 1)]
        results = [
            torch.zeros((self._bucket, *tensor.shape), dtype=getattr(torch, tensor.dtype))
            for tensor in program.outputs
        ]
        end = self._call(program.readout, sides[self._steps % 2], results)
        index = tables["step_index"]

        def run_once() -> None:
            index.zero_()
            begin()
            for step in range(self._steps):
                steps[step % 2]()
                index.add_(1)
            end()

        return run_once

    def _call(
        self, graph: GraphSpec | None, tables: Mapping[str, torch.Tensor], outputs: list[torch.Tensor]
    ) -> Callable[[], None]:
        if graph is None:
            return lambda: None
        opened: Graph = RUNTIMES["onnx"](self._files[graph.name], graph, Device())
        return bound(opened, [tables[tensor.name] for tensor in graph.inputs], outputs)


def tables(program: ProgramSpec, rows: int, parameters: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Everything that graphs read, for so many rows; noise once for all steps."""
    made = {
        name: torch.zeros((rows, *tensor.shape), dtype=getattr(torch, tensor.dtype))
        for name, tensor in program.tensors().items()
    }
    for name, value in parameters.items():
        made[name].fill_(value)
    for item in program.inputs:
        made[item.tensor.name].fill_(item.default)
    for noise in program.noise:
        table = made[noise.tensor.name]
        if noise.distribution == "normal":
            table.normal_()
        else:
            table.uniform_(0.01, 0.99)
    return made
