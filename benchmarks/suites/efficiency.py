"""How much of a bare loop's speed is left when the same graphs are served.

The bare loop calls init, step and readout of one full batch again and again on tensors that stay
where they are, with its noise already drawn: no queue, no seeds, no rows that come and go.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import samovar
from benchmarks import artifacts
from benchmarks.report import Section, Table
from benchmarks.servers import Server, device, samovar_server
from benchmarks.statistics import ratio, spread
from benchmarks.suites.base import Bench, per_second
from samovar._messages import CallOptions
from server.core.spec import GraphSpec, ProgramSpec, TensorSpec
from server.engine.program_queue import RESERVED_SHARE
from server.models import artifact
from server.runtime import RUNTIMES, Device, Graph, bind_graph

BUCKETS = (8, 16, 32, 64)
WITH_TARGETS = (8, 64)
MOST_ROWS = 100_000

TEXT = """\
Rows × steps per second of one long request, over those of a bare loop on the same ONNX graphs at the same
batch size on the same device, in turns. The bare loop has its noise drawn beforehand; the server draws it
while it runs, admits new rows as old ones finish, reads them out and sends them. It has as many slots as
that many rows need beside the slots that are kept for shorter ones. The targets: 0.90 at 64 rows for
diffusion, PixelCNN and EBM; 0.70 for LSTM tokens and at 8 rows. Programs of one shot take no step in which
to prepare the next rows or to send the last ones, so that all of that comes on top; they have no target."""


@dataclass(frozen=True)
class Case:
    """A program, how many steps its rows take, and what says so; no steps is one of one shot.

    Rows of a `level` leave some slots to shorter ones, as server/lane.py says.
    """

    model: str
    steps: int = 0
    parameter: str = ""
    operation: str = "sample"
    level: int = 0

    @property
    def parameters(self) -> Mapping[str, int]:
        return {self.parameter: self.steps} if self.parameter else {}

    def slots(self, bucket: int) -> int:
        """How many slots there must be for so many rows to be in them."""
        return next(
            size
            for size in itertools.count(bucket)
            if size - math.ceil(self.level * size * RESERVED_SHARE) >= bucket
        )

    @property
    def turns(self) -> int:
        """How often a row is in a batch."""
        return max(1, self.steps)


STEPPING = (
    Case(artifacts.DIFFUSION, 20, "steps", level=1),
    Case(artifacts.PIXELCNN, 64),
    Case(artifacts.EBM, 100, "steps", level=2),
    Case(artifacts.LSTM, 128, "tokens"),
)
ONE_SHOT = (
    Case(artifacts.VAE),
    Case(artifacts.GAN),
    Case(artifacts.REALNVP),
    Case(artifacts.MLP, operation="classify"),
    Case(artifacts.CNN, operation="classify"),
)


def run(bench: Bench) -> Section:
    """Measure every family in every bucket."""
    stepping, one_shot = map(bench.enough, (STEPPING, ONE_SHOT))
    buckets = BUCKETS[-1:] if bench.is_quick else BUCKETS
    tables = (
        _table([row for bucket in buckets for row in _rows(bench, cases, bucket)], unit)
        for cases, unit in ((stepping, "row steps"), (one_shot, "rows"))
    )
    return Section("Engine efficiency", TEXT, tuple(tables))


def _rows(bench: Bench, cases: Sequence[Case], bucket: int) -> Iterator[tuple[str, ...]]:
    """Measure in one bucket, in a server for those that need as many slots for it."""
    for slots, group in itertools.groupby(
        sorted(cases, key=lambda case: case.level), lambda case: case.slots(bucket)
    ):
        alike = list(group)
        models = bench.models(*(case.model for case in alike))
        with samovar_server(models, "--max-batch-rows", str(slots), "--intra-op-threads", "1") as server:
            for case in alike:
                yield _row(bench, case, bucket, server, models)


def _table(rows: list[tuple[str, ...]], unit: str) -> Table:
    columns = ("model", "rows a step", f"served, {unit}/s", f"bare, {unit}/s", "ratio")
    return Table(columns, rows, "Programs of steps" if unit == "row steps" else "Programs of one shot")


def _row(bench: Bench, case: Case, bucket: int, server: Server, models: Path) -> tuple[str, ...]:
    loop = Loop(models / case.model / "1", case, bucket)
    has_target = case in STEPPING and bucket in WITH_TARGETS
    seconds = bench.either(0.4, 1.2 if has_target else 0.4)
    served, bare = [], []
    for _ in range(bench.repeats if has_target else bench.few_repeats):
        bare.append(loop.rate(seconds))
        served.append(served_rate(server, case, loop.program, round(bare[-1] * seconds / case.turns)))
    return case.model, str(bucket), str(spread(served)), str(spread(bare)), str(ratio(served, bare))


def served_rate(server: Server, case: Case, program: ProgramSpec, rows: int) -> float:
    """Row steps per second of one request of about so many rows."""
    with samovar.Client(server.address, timeout=None) as client:
        _ask(client, case, program, 1)
        before, start = server.metric("samovar_step_rows_sum"), time.perf_counter()
        _ask(client, case, program, min(max(rows, 1), MOST_ROWS))
        taken = time.perf_counter() - start
    return (server.metric("samovar_step_rows_sum") - before) / taken


def _ask(client: samovar.Client, case: Case, program: ProgramSpec, rows: int) -> None:
    options = CallOptions(seed=1, parameters=case.parameters, priority="interactive")
    if case.operation == "sample":
        client.sample(case.model, rows, **options)
        return
    inputs = {
        item.tensor.name: np.zeros((rows, *item.tensor.shape), item.tensor.dtype) for item in program.inputs
    }
    getattr(client, case.operation)(case.model, inputs, **options)


class Loop:
    """A program's graphs bound to tensors of one full batch."""

    def __init__(self, directory: Path, case: Case, bucket: int) -> None:
        _, spec = artifact.read(directory)
        self.program = spec.programs[case.operation]
        self._case, self._bucket = case, bucket
        self._device = Device(device())
        self._files = spec.files["onnx"]
        made = tables(self.program, bucket, {**self.program.defaults(), **case.parameters})
        made["num_steps"].fill_(case.steps)
        self._tables = {name: table.to(self._device.torch) for name, table in made.items()}
        self._next = {tensor.name: self._tables[tensor.name].clone() for tensor in self.program.state}
        self._pass = self._bound()

    def rate(self, seconds: float) -> float:
        """Row steps per second over whole passes."""
        return self._case.turns * self._bucket * per_second(self._pass, seconds)

    def _bound(self) -> Callable[[], None]:
        """One pass of all rows: init, the steps from one side of the state's tables to the other, readout."""
        program, tables, number = self.program, self._tables, self._case.steps
        sides = [tables, {**tables, **self._next}]
        states = [[side[tensor.name] for tensor in program.state] for side in sides]
        begin = self._call(program.init, tables, states[0])
        steps = [self._call(program.step, sides[side], states[1 - side]) for side in (0, 1)]
        results = zeros(program.outputs, self._bucket, self._device.torch)
        end = self._call(program.readout, sides[number % 2], results)
        index = tables["step_index"]

        def run_once() -> None:
            index.zero_()
            begin()
            for step in range(number):
                steps[step % 2]()
                index.add_(1)
            end()

        return run_once

    def _call(
        self, graph: GraphSpec | None, tables: Mapping[str, torch.Tensor], outputs: list[torch.Tensor]
    ) -> Callable[[], None]:
        if graph is None:
            return lambda: None
        opened: Graph = RUNTIMES["onnx"](self._files[graph.name], graph, self._device)
        return bind_graph(opened, [tables[tensor.name] for tensor in graph.inputs], outputs)


def tables(program: ProgramSpec, rows: int, parameters: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Everything that graphs read, for so many rows; noise once for all steps."""
    specs = program.tensors()
    made = dict(zip(specs, zeros(tuple(specs.values()), rows, torch.device("cpu")), strict=True))
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


def zeros(specs: Sequence[TensorSpec], rows: int, place: torch.device) -> list[torch.Tensor]:
    """A table for each of the tensors, of so many rows."""
    return [
        torch.zeros((rows, *spec.shape), dtype=getattr(torch, spec.dtype), device=place) for spec in specs
    ]
