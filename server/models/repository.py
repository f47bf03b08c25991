"""The models that are served: found, doubted, proven by their golden rows, warmed.

Knows every format that a runtime exists for, and no family.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.core.errors import InvalidArtifact, RuntimeUnavailable
from server.core.spec import ModelSpec, ProgramKey
from server.engine.program_queue import RESERVED_SHARE
from server.execution.program_runner import ProgramRunner
from server.models import artifact
from server.models.batch_invariance import Probe, is_batch_invariant
from server.models.registry import LoadedProgram, Model, ModelRegistry
from server.runtime import RUNTIMES, Device, Graph, OpenGraph, device_context, set_deterministic

log = logging.getLogger(__name__)

SMALLEST_BUCKET = 4


class Repository:
    """Loads artifacts into the catalogue, and holds their programs."""

    def __init__(
        self,
        device: Device,
        formats: Sequence[str],
        max_batch_rows: int,
        runtimes: Mapping[str, OpenGraph] = RUNTIMES,
        runner: type[ProgramRunner] = ProgramRunner,
    ) -> None:
        set_deterministic()
        if device.cuda_graphs and formats[0] == "onnx":
            log.warning("--cuda-graphs has no effect on ONNX, the first of --formats; name another before it")
        self._device = device
        self._formats = tuple(formats)
        self._runtimes = runtimes
        self._runner = runner
        self._prefetch_executor = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._buckets = _buckets(max_batch_rows)
        self.registry = ModelRegistry()
        self.programs: dict[ProgramKey, ProgramRunner] = {}

    def load(self, directory: Path) -> Model:
        """Load models/<name>/<version>; ArtifactRefused when it must not be served."""
        manifest, spec = artifact.read(directory)
        formats = tuple(name for name in self._formats if name in spec.files)
        if not formats:
            raise InvalidArtifact(
                f"it comes as {', '.join(spec.files)}; this server runs {', '.join(self._formats)}"
            )
        with device_context(self._device.torch):
            programs = self._prepare_all(spec, formats)
        served = tuple(dict.fromkeys(format_ for format_, _ in programs))
        model = Model(spec, manifest, served, programs)
        self.registry.add(model)
        return model

    def reload_graphs(self) -> None:
        """Open every graph anew, after a fault that may have left the old ones unusable."""
        for model in self.registry:
            for format_ in model.formats:
                graphs = self._open(model.spec, format_)
                for name in model.spec.programs:
                    self.programs[model.programs[format_, name].key].reload(graphs)

    def _open(self, spec: ModelSpec, format_: str) -> dict[str, Graph]:
        files, open_graph = spec.files[format_], self._runtimes[format_]
        return {name: open_graph(files[name], graph, self._device) for name, graph in spec.graphs().items()}

    def _prepare_all(self, spec: ModelSpec, formats: Sequence[str]) -> dict[tuple[str, str], LoadedProgram]:
        """Every program in every format that can be run on this device; ArtifactRefused when none can."""
        programs: dict[tuple[str, str], LoadedProgram] = {}
        reasons = list[str]()
        for format_ in formats:
            try:
                loaded = self._prepare(spec, format_)
            except RuntimeUnavailable as reason:
                log.warning("%s/%s is not served as %s: %s", spec.name, spec.version, format_, reason)
                reasons.append(f"{format_}: {reason}")
            else:
                programs |= {(format_, each.key.name): each for each in loaded}
        if not programs:
            raise InvalidArtifact("; ".join(reasons))
        return programs

    def _prepare(self, spec: ModelSpec, format_: str) -> list[LoadedProgram]:
        """Every program of a model in one format, proven and warm."""
        graphs = self._open(spec, format_)
        stable = self._prove(spec, format_, graphs)
        # One set for the whole model: a readout that quantises hides what its kernels do.
        common = set(self._buckets).intersection(*filter(None, stable.values()))
        golden = {rows.program: rows for rows in spec.golden}
        loaded = []
        for name, program in spec.programs.items():
            is_stable = all(stable[graph.name] for graph in program.graphs)
            buckets = sorted(common) if is_stable else self._buckets
            key = ProgramKey(spec.name, spec.version, format_, program.operation, program.variant)
            ready = self._runner(program, graphs, buckets, self._device.torch, self._prefetch_executor)
            # On a CPU little is prepared, and one step shows as much as two.
            steps = 2 if self._device.is_cuda else 1
            is_bitwise = is_batch_invariant(ready, golden[name], steps) and is_stable
            self.programs[key] = ready
            loaded.append(LoadedProgram(key, program, ready.capacity, is_bitwise))
        return loaded

    def _prove(self, spec: ModelSpec, format_: str, graphs: Mapping[str, Graph]) -> dict[str, set[int]]:
        """Replay the golden rows; the buckets in which each graph is bitwise row-stable."""
        probe = Probe(graphs, self._buckets, self._device.torch)
        for golden in spec.golden:
            try:
                probe.prove(spec.programs[golden.program], golden)
            except InvalidArtifact as refusal:
                raise InvalidArtifact(f"{golden.program} as {format_}: {refusal}") from None
            except Exception as error:  # a graph may raise anything
                reason = " ".join(str(error).split())[:300]
                raise InvalidArtifact(f"{golden.program} as {format_} does not run: {reason}") from None
        return probe.stable_buckets()


def _buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes to try: powers of two, halfway between them, the largest, and the most for longer rows.

    On a CPU the time of a step is that of its rows, padding included. None is under SMALLEST_BUCKET but
    for the largest, and the others are multiples of it: what does not fill a SIMD packet takes scalar
    paths whose logarithms differ once in thousands of rows, too rarely for a probe to notice.
    """
    powers = [SMALLEST_BUCKET << exponent for exponent in range(largest.bit_length())]
    reserved = (largest - int(level * largest * RESERVED_SHARE) for level in (1, 2))
    sizes = {*powers, *(3 * power for power in powers), *reserved}
    is_packed = (size for size in sizes if size < largest and size % SMALLEST_BUCKET == 0)
    return tuple(sorted({*is_packed, largest}))
