"""Run a program of a manifest: init -> step x n -> readout over rows.

A second reading of the contract, independent of the server's on purpose, and as
plain as can be. Knows no family and no format: graphs are functions of arrays.

Every graph call of a row draws each noise tensor that the graph takes, from
(seed, row index, step, stream). The step is 0 in init, step_index in step, and
the number of steps done in readout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.artifacts import manifest
from export.graphs import graph
from export.graphs.graph import GraphFunction
from export.graphs.program import DataSpec, Program, ProgramError, program_name
from samovar import noise
from samovar.tensors import DTYPES
from samovar.v1 import manifest_pb2

Array = NDArray[Any]
Tensors = dict[str, Array]

_DRAW = {
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
    """A batch of rows: seeds uint64 [B], row indices [B], parameters [B] and inputs [B, *shape] by name."""

    seeds: NDArray[np.uint64]
    indices: NDArray[np.int64]
    parameters: Tensors
    inputs: Tensors

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, rows: slice | NDArray[np.intp]) -> "Rows":
        return Rows(
            self.seeds[rows], self.indices[rows], _take(self.parameters, rows), _take(self.inputs, rows)
        )


@dataclass(frozen=True)
class Interpreter:
    """The programs of a manifest with the graphs to run them, by graph name."""

    manifest: manifest_pb2.Manifest
    graphs: Mapping[str, GraphFunction]

    def program(self, name: str) -> manifest_pb2.Program:
        """The program `sample` or `sample:inpaint`, say; KeyError when the model lacks it."""
        return {program_name(each.operation, each.variant): each for each in self.manifest.programs}[name]

    def run(self, name: str, rows: Rows, title: str = "") -> Tensors:
        """Run every row of a program to its end; returns the outputs by name, [B, *shape].

        With a title, under a progress bar of steps.
        """
        program = self.program(name)
        total, done = num_steps(program, rows), np.zeros(len(rows), np.int64)
        state = self._initial_state(program, rows, total)
        active = np.flatnonzero(done < total)
        longest = int(total.max(initial=0))
        with tqdm(desc=title, total=longest, unit="step", dynamic_ncols=True, disable=not title) as bar:
            while active.size:
                context = _Context(program, rows[active], _take(state, active), done[active], total[active])
                for name, array in self._call(program.step, context).items():
                    state[name][active] = array
                done[active] += 1
                ended = (
                    state[program.steps.done_flag] if program.steps.done_flag else np.zeros(len(rows), bool)
                )
                active = np.flatnonzero((done < total) & ~ended)
                bar.update()
        return self._call(program.readout, _Context(program, rows, state, done, total))

    def _initial_state(self, program: manifest_pb2.Program, rows: Rows, total: NDArray[np.int64]) -> Tensors:
        context = _Context(program, rows, {}, np.zeros_like(total), total)
        if program.init:
            return {name: np.array(array) for name, array in self._call(program.init, context).items()}
        return {spec.name: np.zeros((len(rows), *spec.shape), DTYPES[spec.dtype]) for spec in program.state}

    def _call(self, name: str, context: "_Context") -> Tensors:
        graph = next(graph for graph in self.manifest.graphs if graph.name == name)
        results = self.graphs[name]([context.tensor(spec.name) for spec in graph.inputs])
        return dict(zip((spec.name for spec in graph.outputs), results, strict=True))


@dataclass(frozen=True)
class _Context:
    """What the arguments of one graph call may be bound to."""

    program: manifest_pb2.Program
    rows: Rows
    state: Tensors
    steps_done: NDArray[np.int64]
    num_steps: NDArray[np.int64]

    def tensor(self, name: str) -> Array:
        given = {
            "step_index": self.steps_done,
            "num_steps": self.num_steps,
            **self.state,
            **self.rows.parameters,
            **self.rows.inputs,
        }
        return given[name] if name in given else self._noise(name)

    def _noise(self, name: str) -> Array:
        drawn = next(noise for noise in self.program.noise if noise.tensor.name == name)
        draw = _DRAW[drawn.distribution]
        return draw(self.rows.seeds, self.rows.indices, self.steps_done, drawn.stream, drawn.tensor.shape)


def eager_interpreter(data_spec: DataSpec, programs: Sequence[Program]) -> Interpreter:
    """Return an interpreter that runs programs by their own modules, before any file is written."""
    _reject_duplicate_programs(programs)
    graphs = graph.collect(programs)
    described = manifest_pb2.Manifest(
        data_spec=manifest.data_spec_to_proto(data_spec),
        graphs=map(manifest.graph_to_proto, graphs),
        programs=(manifest.program_to_proto(program, graphs) for program in programs),
    )
    return Interpreter(described, {entry.name: graph.eager_function(entry.module) for entry in graphs})


def _reject_duplicate_programs(programs: Sequence[Program]) -> None:
    names = [program.name for program in programs]
    for name in names:
        if names.count(name) > 1:
            raise ProgramError(f"two programs are named {name!r}; give one of them a variant")
        if name.partition(":")[0] not in names:
            raise ProgramError(
                f"{name!r} is a variant of an operation without a default program; remove its variant"
            )


def num_steps(program: manifest_pb2.Program, rows: Rows) -> NDArray[np.int64]:
    """The number of steps of each row, int64 [B]."""
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
    """Rows of one request with the defaults filled in; choices are given by index."""
    given, tensors, count = parameters or {}, inputs or {}, len(indices)
    return Rows(
        seeds=np.full(count, seed, np.uint64),
        indices=np.asarray(indices, np.int64),
        parameters={
            parameter.name: np.full(
                count, given.get(parameter.name, parameter.default_value), _PARAMETER_DTYPES[parameter.type]
            )
            for parameter in program.parameters
        },
        inputs={
            entry.tensor.name: tensors[entry.tensor.name]
            if entry.tensor.name in tensors
            else np.full((count, *entry.tensor.shape), entry.default_value, DTYPES[entry.tensor.dtype])
            for entry in program.inputs
        },
    )


def concatenate_rows(parts: Sequence[Rows]) -> Rows:
    """Several requests for one program as one batch."""
    return Rows(
        np.concatenate([part.seeds for part in parts]),
        np.concatenate([part.indices for part in parts]),
        _join([part.parameters for part in parts]),
        _join([part.inputs for part in parts]),
    )


def _join(parts: Sequence[Tensors]) -> Tensors:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _take(tensors: Mapping[str, Array], rows: slice | NDArray[np.intp]) -> Tensors:
    return {name: array[rows] for name, array in tensors.items()}
