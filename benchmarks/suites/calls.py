"""One-shot calls over gRPC: what the engine costs beside a server that does nothing.

The same bytes go to several servers in turn: Samovar with a VAE's decoder and with an MLP of two
floats, by itself and behind front ends, and a bare grpc.aio server that answers 4 KiB. Larger calls
are held against the raw batched forward.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import artifacts
from benchmarks.load import CALLERS_A_CHANNEL, Closed, Observed
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.servers import Server, bare_server, device, samovar_server
from benchmarks.statistics import LATENCIES, latencies, ratio, spread
from benchmarks.suites.base import Bench, per_second
from samovar.tensors import pack
from samovar.v1 import inference_pb2 as pb
from server.models import artifact
from server.runtime import RUNTIMES, Device

METHOD = "/samovar.v1.Inference/Decode"
CALLERS = (1, 8, 32, 128)
ROWS = (16, 256)
FRONT_ENDS = (1, 2)
REPLY_BYTES = 4096
INPUTS = {artifacts.DECODER: ("latent", 32), artifacts.TINY: ("point", 2)}

TEXT = f"""\
One row a call: the same request bytes go in turns to Samovar and to a bare `grpc.aio` server (plain
asyncio) that answers 4 KiB without reading. *n front ends* is a server with `--grpc-workers n`, processes that
speak gRPC on one port and feed one engine. Every {CALLERS_A_CHANNEL} callers have a connection of their own.
Callers send bytes and do not parse answers; `callers' cores` is the CPU that they took, and while that is
below 1 they are not what limits the rate. CPU/call is that of all the server's processes. The targets: 0.75
of the bare server's calls/s for the decoder at 32 and 128 callers, 0.8 for the MLP, p50 of 1.3 ms alone."""


@dataclass(frozen=True)
class Side:
    """A server, the request that it gets, and what is measured there again and again."""

    name: str
    server: Server
    request: bytes

    def measure(self, bench: Bench, callers: int, seconds: float) -> "Sample":
        before, start = self.server.cpu_seconds, time.perf_counter()
        load = Closed(self.server.address, METHOD, self.request, callers, seconds)
        observed = bench.callers.closed(load)
        cores = (self.server.cpu_seconds - before) / (time.perf_counter() - start)
        return Sample(observed, cores)


@dataclass(frozen=True)
class Sample:
    """One closed loop: what callers saw, and how many cores the server took."""

    observed: Observed
    cores: float

    @property
    def rate(self) -> float:
        return self.observed.rate

    @property
    def cpu_per_call(self) -> float:
        return self.cores / self.rate


def run(bench: Bench) -> Section:
    """Measure one-row calls by the number of callers, then larger calls."""
    models = bench.models(*INPUTS)
    numbers = CALLERS[::2] if bench.is_quick else CALLERS
    with _sides(bench, models) as sides:
        samples = {count: _in_turns(bench, sides, count) for count in numbers}
        large = _large(bench, sides[1].server, models)
    tables = (*(_table(count, samples[count]) for count in numbers), large)
    return Section("One-shot calls", TEXT, tables, (_plot(samples),))


@contextmanager
def _sides(bench: Bench, models: Path) -> Iterator[list[Side]]:
    """The bare server first, then each model served plainly and behind front ends."""
    with ExitStack() as stack:
        bare = stack.enter_context(bare_server(REPLY_BYTES))
        servers = {"": stack.enter_context(samovar_server(models))}
        for number in () if bench.is_quick else FRONT_ENDS:
            name = f", {number} front end{'s' if number > 1 else ''}"
            servers[name] = stack.enter_context(samovar_server(models, "--grpc-workers", str(number)))
        served = [
            Side(f"{model}{name}", server, request(model, 1))
            for model in INPUTS
            for name, server in servers.items()
        ]
        yield [Side("bare grpc.aio", bare, request(artifacts.DECODER, 1)), *served]


def request(model: str, rows: int, name_served: str = "") -> bytes:
    """A Decode request of random rows, as bytes; the model may be served under another name."""
    name, width = INPUTS[model]
    array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    selector = pb.ModelSelector(name=name_served or model)
    return pb.TransformRequest(model=selector, inputs={name: pack(array)}, seed=7).SerializeToString()


def _in_turns(bench: Bench, sides: list[Side], callers: int) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    for _ in range(bench.repeats):
        for side in sides:
            samples[side.name].append(side.measure(bench, callers, bench.either(0.3, 0.8)))
    return samples


def _table(callers: int, samples: dict[str, list[Sample]]) -> Table:
    bare = next(iter(samples.values()))
    rows = [(name, *_row(each, bare)) for name, each in samples.items()]
    columns = ("server", "calls/s", "over bare", *LATENCIES, "µs CPU/call", "callers' cores")
    return Table(columns, rows, f"{callers} caller{'s' if callers > 1 else ''}, one row a call")


def _row(samples: list[Sample], bare: list[Sample]) -> tuple[str, ...]:
    rates = [sample.rate for sample in samples]
    return (
        str(spread(rates)),
        str(ratio(rates, [sample.rate for sample in bare])),
        *latencies([sample.observed.latencies for sample in samples]),
        str(spread([1e6 * sample.cpu_per_call for sample in samples])),
        str(spread([sample.observed.cores for sample in samples])),
    )


def _plot(samples: dict[int, dict[str, list[Sample]]]) -> Plot:
    def rate(count: int, name: str) -> float:
        return float(np.median([sample.rate for sample in samples[count][name]]))

    names = list(next(iter(samples.values())))
    lines = [Line(name, list(samples), [rate(count, name) for count in samples]) for name in names]
    return Plot("calls", "One row a call", "callers", "calls per second", lines, is_log_y=False)


def _large(bench: Bench, server: Server, models: Path) -> Table:
    """Rows per second and latencies of larger calls, held against the raw forward."""
    sizes, numbers = (ROWS[-1:], CALLERS[:1]) if bench.is_quick else (ROWS, CALLERS)
    rows = [_large_row(bench, server, models, size, callers) for size in sizes for callers in numbers]
    columns = ("rows a call", "callers", "rows/s served", "rows/s raw forward", "ratio (target 0.9 at 256)")
    return Table((*columns, *LATENCIES), rows, "Larger calls")


def _large_row(bench: Bench, server: Server, models: Path, size: int, callers: int) -> tuple[str, ...]:
    side = Side("", server, request(artifacts.DECODER, size))
    samples, raw = list[Sample](), list[float]()
    for _ in range(bench.few_repeats):
        samples.append(side.measure(bench, callers, bench.either(0.3, 0.8)))
        raw.append(bench.callers.run(raw_rate, models / artifacts.DECODER / "1", size, device()))
    served = [size * sample.rate for sample in samples]
    figures = (spread(served), spread(raw), ratio(served, raw))
    return (
        str(size),
        str(callers),
        *map(str, figures),
        *latencies([sample.observed.latencies for sample in samples]),
    )


def raw_rate(directory: Path, rows: int, name: str = "cpu", seconds: float = 0.3) -> float:
    """Rows per second of the decoder's graph called in a loop with one thread, from host memory and back."""
    _, spec = artifact.read(directory)
    graph = spec.programs["decode"].readout
    opened = RUNTIMES["onnx"](spec.files["onnx"][graph.name], graph, Device(name))
    latents = torch.zeros(rows, INPUTS[artifacts.DECODER][1])

    def call() -> None:
        opened([latents.to(name)])[0].cpu()

    return rows * per_second(call, seconds)
