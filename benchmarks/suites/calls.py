"""One-shot calls over gRPC: what the engine costs beside a server that does nothing.

The same bytes go to three servers in turn: Samovar with a VAE's decoder, Samovar with an MLP of
two floats, and a bare grpc.aio server that answers 4 KiB. Larger calls are held against the raw
batched forward.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks import artifacts
from benchmarks.load import Closed, Observed
from benchmarks.report import Line, Plot, Section, Table
from benchmarks.servers import Server, bare_server, samovar_server
from benchmarks.spread import milliseconds, percentile, ratio, short, spread
from benchmarks.suites.base import Bench
from samovar.tensors import pack
from samovar.v1 import inference_pb2 as pb

METHOD = "/samovar.v1.Inference/Decode"
CALLERS = (1, 8, 32, 128)
ROWS = (16, 256)
REPLY_BYTES = 4096
INPUTS = {artifacts.DECODER: ("latent", 32), artifacts.TINY: ("point", 2)}

TEXT = """\
One row a call: the same request bytes go in turns to Samovar and to a bare `grpc.aio` server (plain
asyncio) that answers 4 KiB without reading. Callers send bytes and do not parse answers; `callers' cores`
is the CPU that they took, and while that is below 1 they are not what limits the rate. CPU/call is that of
the whole server process. The targets: 0.75 of the bare server's calls/s for the decoder at 32 and 128
callers, 0.8 for the MLP, p50 of 1.3 ms alone."""


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
    models = bench.models(artifacts.DECODER, artifacts.TINY)
    with bare_server(REPLY_BYTES) as bare, samovar_server(models, "--log-level", "info") as server:
        sides = [
            Side("bare grpc.aio", bare, request(artifacts.DECODER, 1)),
            Side(artifacts.DECODER, server, request(artifacts.DECODER, 1)),
            Side(artifacts.TINY, server, request(artifacts.TINY, 1)),
        ]
        seconds = bench.either(0.3, 1.2)
        numbers = CALLERS[::2] if bench.is_quick else CALLERS
        samples = {count: _in_turns(bench, sides, count, seconds) for count in numbers}
        large = _large(bench, server, models)
    tables = (*(_table(count, samples[count]) for count in numbers), large)
    return Section("One-shot calls", TEXT, tables, (_plot(samples),))


def request(model: str, rows: int, name_served: str = "") -> bytes:
    """A Decode request of random rows, as bytes; the model may be served under another name."""
    name, width = INPUTS[model]
    array = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    selector = pb.ModelSelector(name=name_served or model)
    return pb.TransformRequest(model=selector, inputs={name: pack(array)}, seed=7).SerializeToString()


def _in_turns(bench: Bench, sides: list[Side], callers: int, seconds: float) -> dict[str, list[Sample]]:
    samples: dict[str, list[Sample]] = {side.name: [] for side in sides}
    for _ in range(bench.repeats):
        for side in sides:
            samples[side.name].append(side.measure(bench, callers, seconds))
    return samples


def _table(callers: int, samples: dict[str, list[Sample]]) -> Table:
    bare = [sample.rate for sample in next(iter(samples.values()))]
    rows = []
    for name, each in samples.items():
        latencies = np.concatenate([sample.observed.latencies for sample in each])
        rows.append(
            (
                name,
                str(spread([sample.rate for sample in each])),
                str(ratio([sample.rate for sample in each], bare)),
                *(milliseconds(percentile(latencies, percent)) for percent in (50, 95, 99)),
                short(1e6 * float(np.median([sample.cpu_per_call for sample in each]))),
                short(float(np.median([sample.observed.cores for sample in each]))),
            )
        )
    columns = (
        "server",
        "calls/s",
        "over bare",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "µs CPU/call",
        "callers' cores",
    )
    return Table(columns, rows, f"{callers} caller{'s' if callers > 1 else ''}, one row a call")


def _plot(samples: dict[int, dict[str, list[Sample]]]) -> Plot:
    def rate(count: int, name: str) -> float:
        return float(np.median([sample.rate for sample in samples[count][name]]))

    names = list(next(iter(samples.values())))
    lines = [Line(name, list(samples), [rate(count, name) for count in samples]) for name in names]
    return Plot("calls", "One row a call", "callers", "calls per second", lines, is_log_y=False)


def _large(bench: Bench, server: Server, models: Path) -> Table:
    """Rows per second of larger calls over those of the raw forward, in turns."""
    rows = []
    for size in ROWS[-1:] if bench.is_quick else ROWS:
        side = Side("", server, request(artifacts.DECODER, size))
        for callers in CALLERS[:1] if bench.is_quick else CALLERS[:3]:
            served, raw = [], []
            for _ in range(bench.repeats):
                served.append(size * side.measure(bench, callers, bench.either(0.3, 0.8)).rate)
                raw.append(bench.callers.run(raw_rate, models / artifacts.DECODER / "1", size))
            rows.append(
                (str(size), str(callers), str(spread(served)), str(spread(raw)), str(ratio(served, raw)))
            )
    columns = ("rows a call", "callers", "rows/s served", "rows/s raw forward", "ratio (target 0.9 at 256)")
    return Table(columns, rows, "Larger calls")


def raw_rate(artifact: Path, rows: int, seconds: float = 0.3) -> float:
    """Rows per second of the decoder's graph called in a loop with one thread, and nothing else."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(next(artifact.glob("*.onnx"))), options)
    feed = {"latent": np.zeros((rows, 32), np.float32)}
    session.run(None, feed)
    start, calls = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        session.run(None, feed)
        calls += 1
    return rows * calls / (time.perf_counter() - start)
