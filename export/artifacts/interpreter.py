"""Interpreter of manifest programs: init -> step x n -> readout over rows.

It implements the contract a second time, independently of the server and as simply as possible, so that the
two can be compared. Graphs are functions of arrays; families and file formats do not matter here.

Each graph call of a row draws every noise tensor that the graph takes, from (seed, row index, step, stream).
The step is 0 in init, `step_index` in step, and the number of completed steps in readout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.artifacts import manifest
from export.graphs import graph
from export.graphs.graph import Graph, GraphFunction
from export.graphs.program import DataSpec, Program, ProgramError
from samovar import noise
from samovar.operations import parse_program_name, program_name
from samovar.tensors import DTYPES
from samovar.v1 import manifest_pb2

Array = NDArray[Any]
Tensors = dict[str, Array]

_NOISE_FUNCTIONS = {
    manifest_pb2.Noise.DISTRIBUTION_NORMAL: noise.normal,
    manifest_pb2.Noise.DISTRIBUTION_UNIFORM: noise.uniform,
}
_PARAMETER_DTYPES = {
    manifest_pb2.Parameter.TYPE_FLOAT: np.float32,
    manifest_pb2.Parameter.TYPE_INTEGER: np.int64,
    manifest_pb2.Parameter.TYPE_BOOLEAN: np.bool_,
    manifest_pb2.Parameter.TYPE_CHOICE: np.int64,
}


@dataclass(frozen=True)
class Rows:
    """A batch of B rows.

    Attributes:
        seeds: uint64 [B].
        indices: Row indices, int64 [B].
        parameters: Values by name, [B].
        inputs: Tensors by name, [B, *shape].
    """

    seeds: NDArray[np.uint64]
    indices: NDArray[np.int64]
    parameters: Tensors
    inputs: Tensors

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> "Rows":
        return Rows(
            self.seeds[rows], self.indices[rows], _select(self.parameters, rows), _select(self.inputs, rows)
        )


@dataclass(frozen=True)
class Interpreter:
    """The programs of a manifest, and the functions that run its graphs, by graph name."""

    manifest: manifest_pb2.Manifest
    graphs: Mapping[str, GraphFunction]

    def program(self, name: str) -> manifest_pb2.Program:
        """Return a program by name, for example `sample` or `sample:inpaint`.

        Raises:
            KeyError: If the model does not have this program.
        """
        programs = {program_name(entry.operation, entry.variant): entry for entry in self.manifest.programs}
        return programs[name]

    def run(self, name: str, rows: Rows, title: str = "") -> Tensors:
        """Run all steps of a program for each row.

        Args:
            name: Program name, for example `sample`.
            rows: A batch of B rows.
            title: Title of a progress bar over steps; no bar is shown if it is empty.

        Returns:
            The outputs by name, [B, *shape].
        """
        program = self.program(name)
        total, done = num_steps(program, rows), np.zeros(len(rows), np.int64)
        state = self._initial_state(program, rows, total)
        active = np.flatnonzero(done < total)
        max_steps = int(total.max(initial=0))
        with tqdm(desc=title, total=max_steps, unit="step", dynamic_ncols=True, disable=not title) as bar:
            while active.size:
                context = _Context(program, rows[active], _select(state, active), done[active], total[active])
                for tensor, array in self._call(program.step, context).items():
                    state[tensor][active] = array
                done[active] += 1
                ended = (
                    state[program.steps.done_flag] if program.steps.done_flag else np.zeros(len(rows), bool)
                )
                active = np.flatnonzero((done < total) & ~ended)
                bar.update()
        return self._call(program.readout, _Context(program, rows, state, done, total))

    def _initial_state(self, program: manifest_pb2.Program, rows: Rows, total: NDArray[np.int64]) -> Tensors:
        if not program.init:
            return {
                spec.name: np.zeros((len(rows), *spec.shape), DTYPES[spec.dtype]) for spec in program.state
            }
        context = _Context(program, rows, {}, np.zeros_like(total), total)
        return {name: np.array(array) for name, array in self._call(program.init, context).items()}

    def _call(self, name: str, context: "_Context") -> Tensors:
        graph = next(graph for graph in self.manifest.graphs if graph.name == name)
        results = self.graphs[name]([context.tensor(spec.name) for spec in graph.inputs])
        return dict(zip((spec.name for spec in graph.outputs), results, strict=True))


@dataclass(frozen=True)
class _Context:
    """The tensors to which the arguments of one graph call can be bound."""

    program: manifest_pb2.Program
    rows: Rows
    state: Tensors
    steps_done: NDArray[np.int64]
    num_steps: NDArray[np.int64]

    def tensor(self, name: str) -> Array:
        tensors = {
            "step_index": self.steps_done,
            "num_steps": self.num_steps,
            **self.state,
            **self.rows.parameters,
            **self.rows.inputs,
        }
        return tensors[name] if name in tensors else self._draw_noise(name)

    def _draw_noise(self, name: str) -> Array:
        spec = next(spec for spec in self.program.noise if spec.tensor.name == name)
        draw = _NOISE_FUNCTIONS[spec.distribution]
        return draw(self.rows.seeds, self.rows.indices, self.steps_done, spec.stream, spec.tensor.shape)


def eager_interpreter(
    data_spec: DataSpec, programs: Sequence[Program], graphs: Sequence[Graph] | None = None
) -> Interpreter:
    """Return an interpreter that runs programs by their own modules, without files.

    Args:
        data_spec: The type of the model's data rows.
        programs: The model's programs.
        graphs: The graphs of `programs` if they are already collected.

    Raises:
        ProgramError: If the programs or their graphs do not match each other.
    """
    _check_program_names([program.name for program in programs])
    graphs = graph.collect(programs) if graphs is None else graphs
    description = manifest_pb2.Manifest(
        data_spec=manifest.data_spec_to_proto(data_spec),
        graphs=map(manifest.graph_to_proto, graphs),
        programs=(manifest.program_to_proto(program, graphs) for program in programs),
    )
    return Interpreter(description, {entry.name: graph.eager_function(entry.module) for entry in graphs})


def _check_program_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ProgramError(f"two programs are named {name!r}; give one of them a variant")
        operation, _ = parse_program_name(name)
        if operation not in names:
            raise ProgramError(
                f"program {name!r} is a variant, but there is no default program {operation!r}; "
                "remove its variant or add the default program"
            )


def num_steps(program: manifest_pb2.Program, rows: Rows) -> NDArray[np.int64]:
    """Return the number of steps of each row, int64 [B]."""
    steps = program.steps
    if not program.step:
        return np.zeros(len(rows), np.int64)
    if not steps.parameter:
        return np.full(len(rows), steps.fixed, np.int64)
    return -(-rows.parameters[steps.parameter] // max(steps.units_per_step, 1))


def make_rows(
    program: manifest_pb2.Program,
    seed: int,
    indices: Sequence[int],
    parameters: Mapping[str, float] | None = None,
    inputs: Mapping[str, Array] | None = None,
) -> Rows:
    """Return the rows of one request, with defaults for omitted parameters and optional inputs.

    Args:
        program: The program that the request is for.
        seed: The seed of all rows.
        indices: The row indices.
        parameters: Parameter values by name; a choice is given by index.
        inputs: Input tensors by name, [B, *shape].
    """
    parameters, inputs, count = parameters or {}, inputs or {}, len(indices)
    return Rows(
        seeds=np.full(count, seed, np.uint64),
        indices=np.asarray(indices, np.int64),
        parameters={
            spec.name: np.full(
                count, parameters.get(spec.name, spec.default_value), _PARAMETER_DTYPES[spec.type]
            )
            for spec in program.parameters
        },
        inputs={
            entry.tensor.name: inputs[entry.tensor.name]
            if entry.tensor.name in inputs
            else np.full((count, *entry.tensor.shape), entry.default_value, DTYPES[entry.tensor.dtype])
            for entry in program.inputs
        },
    )


def concatenate_rows(batches: Sequence[Rows]) -> Rows:
    """Return several batches of one program as one batch."""
    return Rows(
        np.concatenate([batch.seeds for batch in batches]),
        np.concatenate([batch.indices for batch in batches]),
        _concatenate([batch.parameters for batch in batches]),
        _concatenate([batch.inputs for batch in batches]),
    )


def _concatenate(batches: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _select(tensors: Mapping[str, Array], rows: slice | NDArray[np.intp]) -> Tensors:
    return {name: array[rows] for name, array in tensors.items()}
