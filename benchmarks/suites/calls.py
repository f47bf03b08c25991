"""One-row calls, compared with a gRPC server that does nothing; larger calls, compared with the forward pass.

The same bytes go to several servers, one after the other: Samovar with the decoder of a VAE and with an MLP
of two floats, with and without gRPC workers, and a no-op grpc.aio server that returns 4 KiB.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import artifacts
from benchmarks.load import CLIENTS_PER_CONNECTION, ClosedLoop, LoadResult
from benchmarks.report import Line, Plot, Result, Section, Table
from benchmarks.servers import Server, device, noop_server, samovar_server
from benchmarks.statistics import LATENCY_COLUMNS, latency_cells, ratio, spread
from benchmarks.suites.base import Bench, per_second
from samovar.tensors import pack
from samovar.v1 import inference_pb2 as pb
from server.models import artifact
from server.runtime import RUNTIMES, Device

METHOD = "/samovar.v1.Inference/Decode"
CLIENTS = (1, 8, 32, 128)
LARGE_ROWS = (16, 256)
GRPC_WORKERS = (1, 2)
REPLY_BYTES = 4096
# The input of each model, and its size.
INPUTS = {artifacts.DECODER: ("latent", 32), artifacts.TINY: ("point", 2)}
# Targets for the rate relative to the no-op server.
TARGETS = {artifacts.DECODER: "≥ 0.75", artifacts.TINY: "≥ 0.8"}
LARGE_TABLE = "calls-large"

TEXT = f"""\
The same request of one row goes to Samovar and to a no-op `grpc.aio` server (plain asyncio), which returns 4
KiB and does not parse the request. Samovar serves `decoder`, the decoder of a VAE, and `tiny`, an MLP of two
floats. *n gRPC workers* is a server with `--grpc-workers n`: processes that serve gRPC on one port for one
engine. Every {CLIENTS_PER_CONNECTION} clients share a connection. Clients send bytes and do not parse
replies; while they use less than one core, they do not limit the rate. CPU time is that of all processes of
the server. Larger calls are compared with a loop over the decoder's graph."""


@dataclass(frozen=True)
class Target:
    """Server and the request that it gets."""

    name: str
    server: Server
    request: bytes

    def measure(self, bench: Bench, clients: int, seconds: float) -> "Sample":
        """Run a closed loop."""
        cpu, start = self.server.cpu_seconds, time.perf_counter()
        load = ClosedLoop(self.server.address, METHOD, self.request, clients, seconds)
        result = bench.clients.run_closed(load)
        cores = (self.server.cpu_seconds - cpu) / (time.perf_counter() - start)
        return Sample(result, cores)


@dataclass(frozen=True)
class Sample:
    """Result of a closed loop, and the CPU cores that the server used."""

    load: LoadResult
    cores: float

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.load.rate

    @property
    def cpu_per_call(self) -> float:
        """CPU seconds of the server for each call."""
        return self.cores / self.rate


# The samples of each target, by its name.
Samples = dict[str, list[Sample]]


def run(bench: Bench) -> Section:
    """Measure one-row calls for each number of clients, then larger calls."""
    models = bench.models(*INPUTS)
    counts = CLIENTS[::2] if bench.is_quick else CLIENTS
    with _start_targets(bench, models) as targets:
        samples = {count: _measure(bench, targets, count) for count in counts}
        large = _measure_large(bench, targets[1].server, models)
    tables = (*(_table(count, samples[count]) for count in counts), large)
    return Section("One-row calls", TEXT, results(tables), tables, (_plot(samples),))


def results(tables: Sequence[Table]) -> list[Result]:
    """Return the ratios to the no-op server, the latency of one client, and the ratio to the forward pass."""
    found = []
    for table in tables:
        if table.name in (_table_name(32), _table_name(128)):
            clients = table.name.rpartition("-")[2]
            found += [
                Result(f"{name}, {clients} clients: calls/s, Samovar / no-op server", value, TARGETS[model])
                for model in INPUTS
                for name in (model, f"{model}, 1 gRPC worker")
                if (value := table.cell("ratio to no-op", name))
            ]
        if table.name == _table_name(1):
            p50 = table.cell("p50 ms", artifacts.DECODER)
            found.insert(0, Result("decoder, 1 client: p50 latency, ms", p50, "≤ 1.3"))
        if table.name == LARGE_TABLE:
            found += [
                Result(
                    f"decoder, 256 rows, {row[1]} client{'s' * (row[1] != '1')}: rows/s, Samovar / loop",
                    row[4],
                    "≥ 0.9",
                )
                for row in table.rows
                if row[0] == "256" and row[1] in ("1", "32")
            ]
    return found


@contextmanager
def _start_targets(bench: Bench, models: Path) -> Iterator[list[Target]]:
    """Yield the no-op server, then each model without and with gRPC workers."""
    with ExitStack() as stack:
        noop = stack.enter_context(noop_server(REPLY_BYTES))
        servers = {"": stack.enter_context(samovar_server(models))}
        for count in () if bench.is_quick else GRPC_WORKERS:
            name = f", {count} gRPC worker{'s' if count > 1 else ''}"
            servers[name] = stack.enter_context(samovar_server(models, "--grpc-workers", str(count)))
        targets = [
            Target(f"{model}{name}", server, make_request(model, 1))
            for model in INPUTS
            for name, server in servers.items()
        ]
        yield [Target("no-op grpc.aio", noop, make_request(artifacts.DECODER, 1)), *targets]


def make_request(model: str, rows: int, served_name: str = "") -> bytes:
    """Return a serialized Decode request of random rows; `served_name` replaces the model name in it."""
    name, width = INPUTS[model]
    array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    selector = pb.ModelSelector(name=served_name or model)
    return pb.TransformRequest(model=selector, inputs={name: pack(array)}, seed=7).SerializeToString()


def _measure(bench: Bench, targets: list[Target], clients: int) -> Samples:
    samples: Samples = {target.name: [] for target in targets}
    for _ in range(bench.repeats):
        for target in targets:
            samples[target.name].append(target.measure(bench, clients, bench.scale(0.3, 0.8)))
    return samples


def _table_name(clients: int) -> str:
    return f"calls-clients-{clients}"


def _table(clients: int, samples: Samples) -> Table:
    noop = next(iter(samples.values()))
    rows = [(name, *_row(repeats, noop)) for name, repeats in samples.items()]
    columns = (
        "server", "calls/s", "ratio to no-op", *LATENCY_COLUMNS, "CPU µs per call", "CPU cores of clients"
    )  # fmt: skip
    title = f"one-row calls, {clients} client{'s' if clients > 1 else ''}"
    return Table(_table_name(clients), title, columns, rows)


def _row(samples: list[Sample], noop: list[Sample]) -> tuple[str, ...]:
    rates = [sample.rate for sample in samples]
    return (
        str(spread(rates)),
        str(ratio(rates, [sample.rate for sample in noop])),
        *latency_cells([sample.load.latencies for sample in samples]),
        str(spread([1e6 * sample.cpu_per_call for sample in samples])),
        str(spread([sample.load.cores for sample in samples])),
    )


def _plot(samples: dict[int, Samples]) -> Plot:
    def rate(clients: int, name: str) -> float:
        return float(np.median([sample.rate for sample in samples[clients][name]]))

    names = list(next(iter(samples.values())))
    lines = [Line(name, list(samples), [rate(clients, name) for clients in samples]) for name in names]
    return Plot("calls", "One-row calls", "clients", "calls per second", lines, is_log_y=False)


def _measure_large(bench: Bench, server: Server, models: Path) -> Table:
    """Return rows per second and latencies of larger calls."""
    sizes, counts = (LARGE_ROWS[-1:], CLIENTS[:1]) if bench.is_quick else (LARGE_ROWS, CLIENTS)
    rows = [_large_row(bench, server, models, size, clients) for size in sizes for clients in counts]
    columns = (
        "rows per call",
        "clients",
        "server, rows/s",
        "loop, rows/s",
        "server / loop",
        *LATENCY_COLUMNS,
    )
    return Table(LARGE_TABLE, "larger calls", columns, rows)


def _large_row(bench: Bench, server: Server, models: Path, size: int, clients: int) -> tuple[str, ...]:
    target = Target("", server, make_request(artifacts.DECODER, size))
    samples, loop_rates = list[Sample](), list[float]()
    for _ in range(bench.few_repeats):
        samples.append(target.measure(bench, clients, bench.scale(0.3, 0.8)))
        directory = models / artifacts.DECODER / "1"
        loop_rates.append(bench.clients.run(forward_rate, directory, size, device()))
    server_rates = [size * sample.rate for sample in samples]
    return (
        str(size),
        str(clients),
        *map(str, (spread(server_rates), spread(loop_rates), ratio(server_rates, loop_rates))),
        *latency_cells([sample.load.latencies for sample in samples]),
    )


def forward_rate(directory: Path, rows: int, device: str = "cpu", seconds: float = 0.3) -> float:
    """Return the rows per second of the decoder's graph in a loop with one thread, host to host memory."""
    _, spec = artifact.read(directory)
    graph = spec.programs["decode"].readout
    loaded = RUNTIMES["onnx"](spec.files["onnx"][graph.name], graph, Device(device))
    latents = torch.zeros(rows, INPUTS[artifacts.DECODER][1])

    def call() -> None:
        loaded([latents.to(device)])[0].cpu()

    return rows * per_second(call, seconds)
