"""Throughput of a server, compared with a loop over the same graphs.

The loop calls init, step and readout of one full batch again and again. Its tensors stay in place and its
noise is drawn beforehand: it has no queue, no seeds, and no rows that enter or leave.
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
from benchmarks.report import Result, Section, Table
from benchmarks.servers import Server, device, samovar_server
from benchmarks.statistics import ratio, spread
from benchmarks.suites.base import Bench, per_second
from samovar._messages import CallOptions
from server.core.spec import GraphSpec, ProgramSpec, TensorSpec
from server.engine.program_queue import RESERVED_SHARE
from server.models import artifact
from server.runtime import RUNTIMES, Device, Graph, bind_graph, device_context
from server.runtime.cuda_graph import capture

BUCKETS = (8, 16, 32, 64)
TARGET_BUCKETS = (8, 64)
MAX_ROWS = 100_000
STEPPING_TABLE, SINGLE_CALL_TABLE = "efficiency-steps", "efficiency-single-call"

TEXT = """\
Row steps per second of one long request, divided by those of a loop over the same ONNX graphs with the same
batch size on the same device. The server draws noise, admits new rows when old ones finish, reads rows out
and sends them; the loop does none of this, and its noise is drawn beforehand. The server has as many slots as
it needs for this batch size, plus the slots that it reserves for shorter requests. Programs without steps
have no target: they cannot prepare the next rows or send the last ones during a step."""


@dataclass(frozen=True)
class Case:
    """Program to measure.

    Attributes:
        model: model name.
        steps: steps of a row; 0 for a program without steps.
        parameter: the parameter that sets the steps; "" if they are fixed.
        operation: name of the program.
        level: level of the rows in the program queue, which leaves slots to lower levels.
    """

    model: str
    steps: int = 0
    parameter: str = ""
    operation: str = "sample"
    level: int = 0

    @property
    def parameters(self) -> Mapping[str, int]:
        return {self.parameter: self.steps} if self.parameter else {}

    @property
    def calls(self) -> int:
        """Calls of a graph in which a row is computed."""
        return max(1, self.steps)

    def num_slots(self, bucket: int) -> int:
        """Return the smallest number of slots of which rows of this level may fill `bucket`."""
        return next(size for size in itertools.count(bucket) if self.num_rows(size) >= bucket)

    def num_rows(self, slots: int) -> int:
        """Return how many of some slots rows of this level may fill."""
        return slots - math.ceil(self.level * slots * RESERVED_SHARE)


STEPPING = (
    Case(artifacts.DIFFUSION, 20, "steps", level=1),
    Case(artifacts.PIXELCNN, 64),
    Case(artifacts.EBM, 100, "steps", level=2),
    Case(artifacts.LSTM, 128, "tokens"),
)
SINGLE_CALL = (
    Case(artifacts.VAE),
    Case(artifacts.GAN),
    Case(artifacts.REALNVP),
    Case(artifacts.MLP, operation="classify"),
    Case(artifacts.CNN, operation="classify"),
)


def run(bench: Bench) -> Section:
    """Measure each family with each batch size."""
    buckets = BUCKETS[-1:] if bench.is_quick else BUCKETS
    tables = tuple(
        Table(
            name,
            title,
            ("model", "rows per step", f"server, {unit}/s", f"loop, {unit}/s", "server / loop"),
            [row for bucket in buckets for row in _measure_bucket(bench, bench.select_cases(cases), bucket)],
        )
        for name, title, cases, unit in (
            (STEPPING_TABLE, "programs with steps", STEPPING, "row steps"),
            (SINGLE_CALL_TABLE, "programs without steps", SINGLE_CALL, "rows"),
        )
    )
    return Section("Engine efficiency", TEXT, results(tables), tables)


def results(tables: Sequence[Table]) -> list[Result]:
    """Return the ratios that have a target."""
    ratios = {
        (case.model, bucket): table.cell("server / loop", case.model, str(bucket))
        for table in tables
        if table.name == STEPPING_TABLE
        for bucket in sorted(TARGET_BUCKETS, reverse=True)
        for case in STEPPING
    }
    return [
        Result(f"{model}, {bucket} rows per step: server / loop", ratio, f"≥ {_target(model, bucket):.2f}")
        for (model, bucket), ratio in ratios.items()
        if ratio
    ]


def _target(model: str, bucket: int) -> float:
    return 0.9 if bucket == max(TARGET_BUCKETS) and model != artifacts.LSTM else 0.7


def _measure_bucket(bench: Bench, cases: Sequence[Case], bucket: int) -> Iterator[tuple[str, ...]]:
    """Measure with one batch size, with one server for all cases that need as many slots."""
    for num_slots, group in itertools.groupby(
        sorted(cases, key=lambda case: case.level), lambda case: case.num_slots(bucket)
    ):
        same_slots = list(group)
        models = bench.models(*(case.model for case in same_slots))
        options = ("--max-batch-rows", str(num_slots), "--intra-op-threads", "1")
        with samovar_server(models, *options) as server:
            for case in same_slots:
                yield _measure(bench, case, bucket, server, models)


def _measure(bench: Bench, case: Case, bucket: int, server: Server, models: Path) -> tuple[str, ...]:
    loop = Loop(models / case.model / "1", case, bucket)
    has_target = case in STEPPING and bucket in TARGET_BUCKETS
    seconds = bench.scale(0.4, 1.2 if has_target else 0.4)
    server_rates, loop_rates = [], []
    for _ in range(bench.repeats if has_target else bench.few_repeats):
        loop_rates.append(loop.rate(seconds))
        rows = round(loop_rates[-1] * seconds / case.calls)
        server_rates.append(server_rate(server, case, loop.program, rows))
    rates = (spread(server_rates), spread(loop_rates), ratio(server_rates, loop_rates))
    return case.model, str(bucket), *map(str, rates)


def server_rate(server: Server, case: Case, program: ProgramSpec, rows: int) -> float:
    """Return the row steps per second of one request of `rows` rows, at most MAX_ROWS."""
    with samovar.Client(server.address, timeout=None) as client:
        _call(client, case, program, 1)
        before, start = server.metric("samovar_step_rows_sum"), time.perf_counter()
        _call(client, case, program, min(max(rows, 1), MAX_ROWS))
        seconds = time.perf_counter() - start
    return (server.metric("samovar_step_rows_sum") - before) / seconds


def _call(client: samovar.Client, case: Case, program: ProgramSpec, rows: int) -> None:
    options = CallOptions(seed=1, parameters=case.parameters, priority="interactive")
    if case.operation == "sample":
        client.sample(case.model, rows, **options)
        return
    inputs = {
        item.tensor.name: np.zeros((rows, *item.tensor.shape), item.tensor.dtype) for item in program.inputs
    }
    getattr(client, case.operation)(case.model, inputs, **options)


class Loop:
    """Graphs of a program, bound to the tensors of one full batch.

    Args:
        directory: the artifact.
        case: the program, and the steps of a row.
        bucket: rows of the batch.
        format_: format of the graphs.
        on: device of the graphs; with `cuda_graphs`, each of them is captured as a CUDA graph.
    """

    def __init__(
        self, directory: Path, case: Case, bucket: int, format_: str = "onnx", on: Device | None = None
    ) -> None:
        _, spec = artifact.read(directory)
        self.program = spec.programs[case.operation]
        self._case, self._bucket, self._format = case, bucket, format_
        self._device = on or Device(device())
        self._files = spec.files[format_]
        with device_context(self._device.torch):
            tensors = make_tensors(self.program, bucket, {**self.program.defaults(), **case.parameters})
            tensors["num_steps"].fill_(case.steps)
            self._tensors = {name: tensor.to(self._device.torch) for name, tensor in tensors.items()}
            self._next_state = {spec.name: self._tensors[spec.name].clone() for spec in self.program.state}
            self._run_batch = self._bind()

    def rate(self, seconds: float) -> float:
        """Return the row steps per second of complete batches, over at least `seconds`."""
        with device_context(self._device.torch):
            return self._case.calls * self._bucket * per_second(self._run_batch, seconds)

    def _bind(self) -> Callable[[], None]:
        """Return a function that runs one batch; its steps alternate between two state buffers."""
        program, tensors, num_steps = self.program, self._tensors, self._case.steps
        buffers = [tensors, {**tensors, **self._next_state}]
        states = [[buffer[spec.name] for spec in program.state] for buffer in buffers]
        init = self._bind_graph(program.init, tensors, states[0])
        steps = [self._bind_graph(program.step, buffers[side], states[1 - side]) for side in (0, 1)]
        outputs = zeros(program.outputs, self._bucket, self._device.torch)
        readout = self._bind_graph(program.readout, buffers[num_steps % 2], outputs)
        step_index = tensors["step_index"]

        def run_batch() -> None:
            step_index.zero_()
            init()
            for step in range(num_steps):
                steps[step % 2]()
                step_index.add_(1)
            readout()
            if self._device.is_cuda:
                torch.cuda.current_stream(self._device.torch).synchronize()

        return run_batch

    def _bind_graph(
        self, graph: GraphSpec | None, tensors: Mapping[str, torch.Tensor], outputs: list[torch.Tensor]
    ) -> Callable[[], None]:
        if graph is None:
            return lambda: None
        loaded: Graph = RUNTIMES[self._format](self._files[graph.name], graph, self._device)
        call = bind_graph(loaded, [tensors[spec.name] for spec in graph.inputs], outputs)
        return capture(call, outputs) if self._device.is_cuda and self._device.cuda_graphs else call


def make_tensors(program: ProgramSpec, rows: int, parameters: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Return all tensors that the graphs of a program read, [rows, *shape] by name.

    State is zero, and noise is drawn once for all steps.
    """
    specs = program.tensors()
    tensors = dict(zip(specs, zeros(tuple(specs.values()), rows, torch.device("cpu")), strict=True))
    for name, value in parameters.items():
        tensors[name].fill_(value)
    for item in program.inputs:
        tensors[item.tensor.name].fill_(item.default)
    for noise in program.noise:
        tensor = tensors[noise.tensor.name]
        if noise.distribution == "normal":
            tensor.normal_()
        else:
            tensor.uniform_(0.01, 0.99)
    return tensors


def zeros(specs: Sequence[TensorSpec], rows: int, device: torch.device) -> list[torch.Tensor]:
    """Return a tensor of zeros [rows, *shape] for each spec."""
    return [
        torch.zeros((rows, *spec.shape), dtype=getattr(torch, spec.dtype), device=device) for spec in specs
    ]
