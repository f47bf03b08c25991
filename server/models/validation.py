"""Everything that can be wrong with a manifest, as phrases for a person.

Compares a manifest with itself, with the contract and with the directory that it
lies in. Knows nothing of what graphs contain.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from samovar import tensors
from samovar.operations import OPERATIONS
from samovar.v1 import manifest_pb2
from server.core.spec import ProgramSpec, TensorSpec
from server.models import manifest as messages

FORMAT_VERSION = 2

MAX_NUMBER = 2.0**53
MAX_STEPS = 2**31

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,126}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def problems(manifest: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    if manifest.format_version != FORMAT_VERSION:
        yield f"format_version is {manifest.format_version}, this server reads {FORMAT_VERSION}"
        return
    found = [*_identity_problems(manifest, directory), *_value_problems(manifest.data_spec)]
    found += _graph_problems(manifest.graphs, directory)
    yield from found
    if not found:
        yield from _program_problems(manifest)


def _identity_problems(manifest: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    if not _NAME.fullmatch(manifest.name) or manifest.name != directory.parent.name:
        yield f"name is {manifest.name!r}, the directory is {directory.parent.name!r}"
    if not _VERSION.fullmatch(manifest.version) or manifest.version != directory.name:
        yield f"version is {manifest.version!r}, the directory is {directory.name!r}"
    if not manifest.family:
        yield "family is missing"
    if not manifest.HasField("provenance"):
        yield "provenance is missing"


def _value_problems(value: manifest_pb2.DataSpec) -> Iterator[str]:
    if not value.kind:
        yield "value.kind is missing"
    yield from (f"value: {problem}" for problem in _tensor_problems(value.tensor))
    if value.num_levels < 0:
        yield f"value.num_levels is {value.num_levels}"
    if value.kind == manifest_pb2.DataSpec.KIND_TOKENS and not value.vocabulary:
        yield "value.vocabulary is missing"


def _tensor_problems(tensor: manifest_pb2.TensorSpec) -> Iterator[str]:
    if not _IDENTIFIER.fullmatch(tensor.name):
        yield f"{tensor.name!r} is not a name of lower-case letters, digits and underscores"
    if tensor.dtype not in tensors.DTYPES:
        yield f"{tensor.name} has no element type"
    if any(extent < 1 for extent in tensor.shape):
        yield f"{tensor.name} has the shape {list(tensor.shape)}"
    bounds = [getattr(tensor, bound) for bound in ("minimum", "maximum") if tensor.HasField(bound)]
    if any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
        yield f"{tensor.name} has the bounds {bounds}"


def _graph_problems(graphs: Sequence[manifest_pb2.Graph], directory: Path) -> Iterator[str]:
    yield from _duplicates("graph", (graph.name for graph in graphs))
    formats = {frozenset(file.format for file in graph.files) for graph in graphs}
    if len(formats) > 1:
        yield "its graphs do not all come in the same formats"
    if formats == {frozenset()}:
        yield "its graphs have no files"
    for graph in graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            yield from (f"graph {graph.name}: {problem}" for problem in _tensor_problems(tensor))
        yield from _duplicates(f"graph {graph.name}: input", (tensor.name for tensor in graph.inputs))
        yield from _duplicates(f"graph {graph.name}: output", (tensor.name for tensor in graph.outputs))
        yield from _duplicates(f"graph {graph.name}: format", (file.format for file in graph.files))
        for file in graph.files:
            yield from _file_problems(file, directory)


def _file_problems(file: manifest_pb2.GraphFile, directory: Path) -> Iterator[str]:
    if not _FILE_NAME.fullmatch(file.path):
        yield f"{file.path!r} is not a plain file name"
        return
    path = directory / file.path
    if path.is_symlink() or not path.is_file():
        yield f"{file.path} is missing"


def _program_problems(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not manifest.programs:
        yield "it has no programs"
    yield from _duplicates("program", map(messages.name_of, manifest.programs))
    graphs = {graph.name: graph for graph in manifest.graphs}
    used = {name for program in manifest.programs for name in (program.init, program.step, program.readout)}
    yield from (f"graph {name} is used by no program" for name in sorted(set(graphs) - used))
    for program in manifest.programs:
        # In this order, and stopping at the first that finds something: each trusts the ones before.
        for check in _PROGRAM_CHECKS:
            found = list(check(program, graphs))
            yield from (f"program {messages.name_of(program)}: {problem}" for problem in found)
            if found:
                return
    yield from _method_problems(manifest)
    yield from _golden_problems(manifest)


def _method_problems(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    usual = {program.operation for program in manifest.programs if not program.variant}
    for program in manifest.programs:
        if program.operation not in usual:
            yield f"program {messages.name_of(program)} is a method of an operation without a usual way"
    for operation in manifest.unsupported_operations:
        if operation not in OPERATIONS or operation in usual:
            yield f"refusals: {operation!r} is no operation that it lacks"


def _call_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    if program.operation not in OPERATIONS:
        yield f"there is no such operation; there are {', '.join(OPERATIONS)}"
    if program.variant and not _IDENTIFIER.fullmatch(program.variant):
        yield f"{program.variant!r} is not a method of lower-case letters, digits and underscores"
    if not program.readout:
        yield "readout is missing"
    for role in ("init", "step", "readout"):
        name = getattr(program, role)
        if name and name not in graphs:
            yield f"{role} is {name!r}, which is no graph"


def _table_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    declared = [*program.state, *program.outputs, *(item.tensor for item in program.inputs)]
    for message in (*declared, *(item.tensor for item in program.noise)):
        yield from _tensor_problems(message)
    spec = messages.program_spec(program, graphs)
    names = [tensor.name for tensor in (*spec.state, *(item.tensor for item in spec.inputs))]
    names += [item.tensor.name for item in spec.noise] + [parameter.name for parameter in spec.parameters]
    yield from _duplicates("the name", (*names, "step_index", "num_steps"))
    bound = spec.tensors()
    for graph in spec.graphs:
        for tensor in graph.inputs:
            source = bound.get(tensor.name)
            if source is None or str(source) != str(tensor):
                yield f"input {tensor.name} {tensor} of graph {graph.name} is bound to {source or 'nothing'}"
    for advancing in (spec.init, spec.step):
        if advancing and not _same_tensors(advancing.outputs, spec.state):
            yield f"graph {advancing.name} does not return the state"
    if not _same_tensors([messages.tensor_spec(tensor) for tensor in program.outputs], spec.readout.outputs):
        yield f"graph {program.readout} does not return the outputs"


def _same_tensors(left: Sequence[TensorSpec], right: Sequence[TensorSpec]) -> bool:
    return [(tensor.name, str(tensor)) for tensor in left] == [(tensor.name, str(tensor)) for tensor in right]


def _parameter_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    for parameter in program.parameters:
        kind = messages.PARAMETER_KINDS.get(parameter.type)
        if not _IDENTIFIER.fullmatch(parameter.name) or kind is None:
            yield f"parameter {parameter.name!r} has no name or no type"
        if not -MAX_NUMBER <= parameter.minimum <= parameter.maximum <= MAX_NUMBER:
            yield f"parameter {parameter.name} has no bounds of at most 2^53"
        if not parameter.minimum <= parameter.default_value <= parameter.maximum:
            yield (
                f"parameter {parameter.name} defaults to {parameter.default_value:g}, outside of "
                f"{parameter.minimum:g}..{parameter.maximum:g}"
            )
        if kind == "choice" and (
            len(parameter.choices) < 1 or parameter.maximum != len(parameter.choices) - 1
        ):
            choices = len(parameter.choices)
            yield f"parameter {parameter.name} has {choices} choices for 0..{parameter.maximum:g}"
        if kind != "choice" and parameter.choices:
            yield f"parameter {parameter.name} is no choice but has choices"


def _noise_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    readers = [
        tensor.name
        for role in (program.init, program.step, program.readout)
        if role
        for tensor in graphs[role].inputs
    ]
    for item in program.noise:
        # init and the first step would draw the same numbers.
        if readers.count(item.tensor.name) != 1:
            yield f"noise {item.tensor.name} is read by {readers.count(item.tensor.name)} graphs, not by one"
    yield from _duplicates("noise stream", (str(item.stream) for item in program.noise))
    for item in program.noise:
        if not item.distribution:
            yield f"noise {item.tensor.name} has no distribution"
        if item.tensor.dtype != manifest_pb2.DATA_TYPE_FLOAT32 or item.stream < 0:
            yield f"noise {item.tensor.name} is not float32 on a stream of at least 0"


def _step_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    steps = program.steps
    counting = {p.name: p for p in program.parameters if p.type == manifest_pb2.Parameter.TYPE_INTEGER}
    if not program.step:
        if steps.WhichOneof("count") or steps.done_flag or steps.units_per_step:
            yield "it counts steps but has no step graph"
        return
    if steps.WhichOneof("count") == "parameter":
        counted = counting.get(steps.parameter)
        if counted is None or not 1 <= counted.minimum <= counted.maximum < MAX_STEPS:
            yield f"steps come from {steps.parameter!r}, which is no integer parameter of 1 to 2^31"
    elif steps.fixed < 1:
        yield f"it has a step graph but {steps.fixed} steps"
    if steps.units_per_step < 0:
        yield f"steps.units_per_step is {steps.units_per_step}"
    scalars = {tensor.name for tensor in program.state if str(messages.tensor_spec(tensor)) == "bool[]"}
    if steps.done_flag and steps.done_flag not in scalars:
        yield f"steps.done is {steps.done_flag!r}, which is no boolean scalar of the state"


def _score_problems(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    if not program.HasField("score"):
        if program.operation == "score":
            yield "score is missing: nobody could know what the number means"
        return
    score = program.score
    if not score.kind or not score.coordinate_space or score.dimensions < 1:
        yield "score must state its kind, space and dimensions"
    scalars = {
        tensor.name
        for tensor in program.outputs
        if str(messages.tensor_spec(tensor)) in ("float32[]", "float64[]")
    }
    for role in ("nats_output", "standard_error_output"):
        name = getattr(score, role)
        if (name or role == "nats_output") and name not in scalars:
            yield f"score.{role} is {name!r}, which is no floating-point scalar of the outputs"
    counts = {t.name for t in program.outputs if str(messages.tensor_spec(t)) in ("int32[]", "int64[]")}
    if score.row_dimensions_output and score.row_dimensions_output not in counts:
        yield f"score.row_dimensions_output is {score.row_dimensions_output!r}, which is no integer scalar of the outputs"
    if score.draws_parameter and score.draws_parameter not in {
        parameter.name for parameter in program.parameters
    }:
        yield f"score.draws_parameter is {score.draws_parameter!r}, which is no parameter"


_PROGRAM_CHECKS = (
    _call_problems,
    _table_problems,
    _parameter_problems,
    _noise_problems,
    _step_problems,
    _score_problems,
)


def _golden_problems(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    graphs = {graph.name: graph for graph in manifest.graphs}
    programs = {messages.name_of(each): messages.program_spec(each, graphs) for each in manifest.programs}
    proven = set(map(messages.name_of, manifest.golden_rows))
    yield from (f"program {name} has no golden rows" for name in sorted(set(programs) - proven))
    for golden in manifest.golden_rows:
        name = messages.name_of(golden)
        if name not in programs:
            yield f"golden rows of {name}: there is no such program"
            continue
        found = _golden_row_problems(golden, programs[name])
        yield from (f"golden rows of {name}: {problem}" for problem in found)


def _golden_row_problems(golden: manifest_pb2.GoldenRows, program: ProgramSpec) -> Iterator[str]:
    if golden.rows < 1 or golden.first_row + golden.rows > 2**32:
        yield f"{golden.rows} rows from {golden.first_row}"
    bounds = {parameter.name: parameter for parameter in program.parameters}
    for name, value in golden.parameters.items():
        if name not in bounds or not bounds[name].minimum <= value <= bounds[name].maximum:
            yield f"parameter {name} = {value:g} is unknown or out of bounds"
    yield from _golden_table_problems(golden, program)


def _golden_table_problems(golden: manifest_pb2.GoldenRows, program: ProgramSpec) -> Iterator[str]:
    inputs = {item.tensor.name: item.tensor for item in program.inputs}
    required = {item.tensor.name for item in program.inputs if not item.optional}
    if not required <= set(golden.inputs) <= set(inputs):
        yield f"inputs are {sorted(golden.inputs)}, expected {sorted(inputs)}"
        return
    outputs = {tensor.name: tensor for tensor in program.outputs}
    if set(golden.outputs) != set(outputs) or set(golden.tolerance) != set(outputs):
        yield f"outputs are {sorted(golden.outputs)}, expected {sorted(outputs)}, each with a tolerance"
        return
    if any(not 0 <= tolerance < math.inf for tolerance in golden.tolerance.values()):
        yield "tolerances must be finite and at least 0"
    for given, expected in ((golden.inputs, inputs), (golden.outputs, outputs)):
        for name, tensor in given.items():
            yield from _golden_tensor_problems(tensor, expected[name], golden.rows)


def _golden_tensor_problems(
    golden: manifest_pb2.GoldenTensor, tensor: TensorSpec, rows: int
) -> Iterator[str]:
    try:
        array = messages.golden_array(golden)
    except tensors.MalformedTensor as error:
        yield f"{tensor.name}: {error}"
        return
    if array.dtype != np.dtype(tensor.dtype) or array.shape != (rows, *tensor.shape):
        yield f"{tensor.name} is {array.dtype}{list(array.shape)}, expected {rows} rows of {tensor}"


def _duplicates(what: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            yield f"{what} {name!r} is empty or not unique"
        seen.add(name)
