"""The models that are served: found, doubted, proven by their golden rows, warmed.

Knows every format that a runtime exists for, and no family.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server import artifact
from server.catalogue import Catalogue, LoadedProgram, Model
from server.errors import ArtifactRefused
from server.lane import RESERVED_SHARE
from server.probe import Probe
from server.program import Program
from server.runtime import RUNTIMES, Device, Graph
from server.spec import ModelSpec, ProgramKey

SMALLEST_BUCKET = 4


class Repository:
    """Loads artifacts into the catalogue, and holds their programs."""

    def __init__(self, device: Device, formats: Sequence[str], max_batch_rows: int) -> None:
        self._device = device
        self._formats = tuple(formats)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._buckets = _buckets(max_batch_rows)
        self.catalogue = Catalogue()
        self.programs: dict[ProgramKey, Program] = {}

    def load(self, directory: Path) -> Model:
        """Load models/<name>/<version>; ArtifactRefused when it must not be served."""
        manifest, spec = artifact.read(directory)
        formats = tuple(name for name in self._formats if name in spec.files)
        if not formats:
            raise ArtifactRefused(
                f"it comes as {', '.join(spec.files)}; this server runs {', '.join(self._formats)}"
            )
        programs = {}
        for format_ in formats:
            for loaded in self._prepare(spec, format_):
                programs[format_, loaded.key.name] = loaded
        model = Model(spec, manifest, formats, programs)
        self.catalogue.add(model)
        return model

    def renew(self) -> None:
        """Open every graph anew, after a fault that may have left the old ones unusable."""
        for model in self.catalogue:
            for format_ in model.formats:
                graphs = self._open(model.spec, format_)
                for name in model.spec.programs:
                    self.programs[model.programs[format_, name].key].reopen(graphs)

    def _open(self, spec: ModelSpec, format_: str) -> dict[str, Graph]:
        files = spec.files[format_]
        return {
            name: RUNTIMES[format_](files[name], graph, self._device) for name, graph in spec.graphs().items()
        }

    def _prepare(self, spec: ModelSpec, format_: str) -> list[LoadedProgram]:
        """Every program of a model in one format, proven and warm."""
        graphs = self._open(spec, format_)
        stable = self._prove(spec, format_, graphs)
        # One set for the whole model: a readout that quantises hides what its kernels do.
        common = set(self._buckets).intersection(*filter(None, stable.values()))
        loaded = []
        for program in spec.programs.values():
            is_bitwise = all(stable[graph.name] for graph in program.graphs)
            buckets = sorted(common) if is_bitwise else self._buckets
            key = ProgramKey(spec.name, spec.version, format_, program.operation, program.method)
            ready = Program(program, graphs, buckets, self._device.torch, self._ahead)
            self.programs[key] = ready
            loaded.append(LoadedProgram(key, program, ready.capacity, is_bitwise))
        return loaded

    def _prove(self, spec: ModelSpec, format_: str, graphs: Mapping[str, Graph]) -> dict[str, set[int]]:
        """Replay the golden rows; the buckets in which each graph is bitwise row-stable."""
        probe = Probe(graphs, self._buckets, self._device.torch)
        for golden in spec.golden:
            try:
                probe.prove(spec.programs[golden.program], golden)
            except ArtifactRefused as refusal:
                raise ArtifactRefused(f"{golden.program} as {format_}: {refusal}") from None
            except Exception as error:  # a graph may raise anything
                reason = " ".join(str(error).split())[:300]
                raise ArtifactRefused(f"{golden.program} as {format_} does not run: {reason}") from None
        return probe.stable_buckets()


def _buckets(largest: int) -> tuple[int, ...]:
    """Batch sizes to try: powers of two, halfway between them, the largest, and the most for batch requests.

    On a CPU the time of a step is that of its rows, padding included. None is under SMALLEST_BUCKET but
    for the largest, and the others are multiples of it: what does not fill a SIMD packet takes scalar
    paths whose logarithms differ once in thousands of rows, too rarely for a probe to notice.
    """
    powers = [SMALLEST_BUCKET << exponent for exponent in range(largest.bit_length())]
    sizes = {*powers, *(3 * power for power in powers), largest - largest // RESERVED_SHARE}
    is_packed = (size for size in sizes if size < largest and size % SMALLEST_BUCKET == 0)
    return tuple(sorted({*is_packed, largest}))
