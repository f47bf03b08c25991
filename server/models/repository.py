"""Repository of models: artifacts validated, replayed, warmed up and registered.

Knows every format that has a runtime, and no family.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server.core.errors import InvalidArtifact, RuntimeUnavailable
from server.core.spec import GoldenRows, ModelSpec, ProgramKey
from server.execution.program_runner import ProgramRunner
from server.models import artifact
from server.models.batch_invariance import BatchInvarianceCheck, is_batch_invariant
from server.models.buckets import candidate_buckets
from server.models.default_inputs import default_inputs
from server.models.golden_replay import GoldenReplay
from server.models.registry import LoadedProgram, Model, ModelRegistry
from server.runtime import (
    RUNTIMES,
    Device,
    Graph,
    OpenGraph,
    device_context,
    limit_memory,
    set_deterministic,
    summarize_error,
)

log = logging.getLogger(__name__)


class Repository:
    """Loads artifacts into a registry, and holds their program runners.

    Args:
        device: runs the graphs.
        formats: formats to load, the preferred one first.
        max_batch_rows: largest number of rows of a program that share a step.
        runtimes: opens a graph file, by format.
        runner: class of the program runners.
    """

    def __init__(
        self,
        device: Device,
        formats: Sequence[str],
        max_batch_rows: int,
        runtimes: Mapping[str, OpenGraph] = RUNTIMES,
        runner: type[ProgramRunner] = ProgramRunner,
    ) -> None:
        set_deterministic(device)
        limit_memory(device)
        self._device = device
        self._formats = tuple(formats)
        self._runtimes = runtimes
        self._runner = runner
        self._prefetch_executor = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self._buckets = candidate_buckets(max_batch_rows)
        self.registry = ModelRegistry()
        self.runners: dict[ProgramKey, ProgramRunner] = {}

    def load(self, directory: Path) -> Model:
        """Load and register the artifact models/<name>/<version>.

        Raises:
            InvalidArtifact: the artifact must not be served, or not on this device.
        """
        manifest, spec = artifact.read(directory)
        formats = tuple(name for name in self._formats if name in spec.files)
        if not formats:
            raise InvalidArtifact(
                f"no served format: the artifact has {', '.join(spec.files)}, the server loads "
                f"{', '.join(self._formats)}"
            )
        with device_context(self._device.torch):
            programs = self._load_formats(spec, formats)
        served = tuple(dict.fromkeys(format_ for format_, _ in programs))
        model = Model(spec, manifest, served, programs)
        self.registry.add(model)
        return model

    def reload_graphs(self) -> None:
        """Open every graph again, after a failure that may have made the open ones unusable."""
        for model in self.registry:
            for format_ in model.formats:
                graphs = self._open(model.spec, format_)
                for name in model.spec.programs:
                    self.runners[model.programs[format_, name].key].reload(graphs)

    def _open(self, spec: ModelSpec, format_: str) -> dict[str, Graph]:
        files, open_graph = spec.files[format_], self._runtimes[format_]
        return {name: open_graph(files[name], graph, self._device) for name, graph in spec.graphs().items()}

    def _load_formats(self, spec: ModelSpec, formats: Sequence[str]) -> dict[tuple[str, str], LoadedProgram]:
        """Load every program in every format that this device can run; InvalidArtifact if it can run none."""
        programs: dict[tuple[str, str], LoadedProgram] = {}
        reasons = list[str]()
        for format_ in formats:
            try:
                loaded = self._load_format(spec, format_)
            except RuntimeUnavailable as error:
                log.warning("%s/%s is not served as %s: %s", spec.name, spec.version, format_, error)
                reasons.append(f"{format_}: {error}")
            else:
                programs |= {(format_, program.key.name): program for program in loaded}
        if not programs:
            raise InvalidArtifact("; ".join(reasons))
        return programs

    def _load_format(self, spec: ModelSpec, format_: str) -> list[LoadedProgram]:
        """Open, replay and warm up every program in one format."""
        graphs = self._open(spec, format_)
        invariant = self._replay(spec, format_, graphs)
        # One set for the whole model: a quantized readout hides what the kernels do.
        common = set(self._buckets).intersection(*filter(None, invariant.values()))
        golden = {rows.program: rows for rows in spec.golden}
        loaded = []
        for name, program in spec.programs.items():
            are_graphs_invariant = all(invariant[graph.name] for graph in program.graphs)
            buckets = sorted(common) if are_graphs_invariant else self._buckets
            key = ProgramKey(spec.name, spec.version, format_, program.operation, program.variant)
            runner = self._runner(program, graphs, buckets, self._device, self._prefetch_executor)
            is_bitwise = self._warm_up(runner, golden[name], key) and are_graphs_invariant
            self.runners[key] = runner
            loaded.append(LoadedProgram(key, program, runner.capacity, is_bitwise, default_inputs(program)))
        return loaded

    def _warm_up(self, runner: ProgramRunner, golden: GoldenRows, key: ProgramKey) -> bool:
        """Call a program at every batch size; return whether rows have the same bits in all."""
        if not self._device.is_cuda:  # a CPU runtime prepares nothing for a step, so that one step is enough
            return is_batch_invariant(runner, golden, steps=1)
        if not runner.uses_cuda_graphs:
            return is_batch_invariant(runner, golden)
        if is_batch_invariant(runner, golden, passes=2):
            return True
        runner.use_cuda_graphs(False)
        if is_batch_invariant(runner, golden):
            log.warning("%s does not use CUDA graphs: its rows have other bits with them", key)
            return True
        runner.use_cuda_graphs(True)
        return is_batch_invariant(runner, golden)

    def _replay(self, spec: ModelSpec, format_: str, graphs: Mapping[str, Graph]) -> dict[str, set[int]]:
        """Replay the golden rows; return the batch sizes at which each graph is batch-invariant."""
        invariance = BatchInvarianceCheck(graphs, self._buckets)
        replay = GoldenReplay(invariance.recorded, self._buckets, self._device)
        for golden in spec.golden:
            try:
                replay.check(spec.programs[golden.program], golden)
            except InvalidArtifact as error:
                raise InvalidArtifact(f"program {golden.program} as {format_}: {error}") from error
            except Exception as error:  # a graph may raise anything
                raise InvalidArtifact(
                    f"program {golden.program} as {format_} does not run: {summarize_error(error)}"
                ) from error
        return invariance.invariant_buckets()
