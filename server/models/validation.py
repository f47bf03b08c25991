"""Validation of manifests: every violation, as a phrase for a person.

Compares a manifest with itself, with the contract and with its directory. Opens no graph.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from samovar import tensors
from samovar.operations import OPERATIONS
from samovar.v1 import manifest_pb2
from server.core.errors import InvalidArtifact
from server.core.spec import ProgramSpec, TensorSpec
from server.models import manifest as messages

FORMAT_VERSION = 2

MAX_NUMBER = 2.0**53
MAX_STEPS = 2**31

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?")
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,62}")
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,126}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def check_format_version(text: str) -> None:
    """Raise InvalidArtifact if a manifest has another format version, with the command that exports it again.

    Reads the text, because a message of another version may have other fields.
    """
    try:
        document = json.loads(text)
    except ValueError:
        return
    if not isinstance(document, dict):
        return
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        family = document.get("family") or "FAMILY"
        raise InvalidArtifact(
            f"format_version is {version}, expected {FORMAT_VERSION}; export the model again: python -m "
            f"export train {family}, or python -m export export FILE for a custom model"
        )


def violations(manifest: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    """Yield every violation of a manifest, whose artifact is in this directory."""
    found = [*_identity_violations(manifest, directory), *_data_spec_violations(manifest.data_spec)]
    found += _graph_violations(manifest.graphs, directory)
    yield from found
    if not found:
        yield from _all_program_violations(manifest)


def _identity_violations(manifest: manifest_pb2.Manifest, directory: Path) -> Iterator[str]:
    if not _NAME.fullmatch(manifest.name) or manifest.name != directory.parent.name:
        yield f"name is {manifest.name!r}, expected the directory's name {directory.parent.name!r}"
    if not _VERSION.fullmatch(manifest.version) or manifest.version != directory.name:
        yield f"version is {manifest.version!r}, expected the directory's name {directory.name!r}"
    if not manifest.family:
        yield "family is missing"
    if not manifest.HasField("provenance"):
        yield "provenance is missing"


def _data_spec_violations(data_spec: manifest_pb2.DataSpec) -> Iterator[str]:
    if not data_spec.kind:
        yield "data_spec.kind is missing"
    yield from (f"data_spec: {violation}" for violation in _tensor_violations(data_spec.tensor))
    if data_spec.num_levels < 0:
        yield f"data_spec.num_levels is {data_spec.num_levels}, expected at least 0"
    if data_spec.kind == manifest_pb2.DataSpec.KIND_TOKENS and not data_spec.vocabulary:
        yield "data_spec.vocabulary is missing"


def _tensor_violations(tensor: manifest_pb2.TensorSpec) -> Iterator[str]:
    if not _IDENTIFIER.fullmatch(tensor.name):
        yield f"tensor name {tensor.name!r}: expected lower-case letters, digits and underscores"
    if tensor.dtype not in tensors.DTYPES:
        yield f"tensor {tensor.name} has no dtype"
    if any(extent < 1 for extent in tensor.shape):
        yield f"tensor {tensor.name} has shape {list(tensor.shape)}, expected extents of at least 1"
    bounds = [getattr(tensor, bound) for bound in ("minimum", "maximum") if tensor.HasField(bound)]
    if any(math.isnan(bound) for bound in bounds) or bounds != sorted(bounds):
        yield f"tensor {tensor.name} has bounds {bounds}, expected minimum <= maximum"


def _graph_violations(graphs: Sequence[manifest_pb2.Graph], directory: Path) -> Iterator[str]:
    yield from _duplicates("graph", (graph.name for graph in graphs))
    formats = {frozenset(file.format for file in graph.files) for graph in graphs}
    if len(formats) > 1:
        yield "graphs have different formats, expected the same formats for all"
    if formats == {frozenset()}:
        yield "graphs have no files"
    for graph in graphs:
        for tensor in (*graph.inputs, *graph.outputs):
            yield from (f"graph {graph.name}: {violation}" for violation in _tensor_violations(tensor))
        yield from _duplicates(f"graph {graph.name}: input", (tensor.name for tensor in graph.inputs))
        yield from _duplicates(f"graph {graph.name}: output", (tensor.name for tensor in graph.outputs))
        yield from _duplicates(f"graph {graph.name}: format", (file.format for file in graph.files))
        for file in graph.files:
            yield from _file_violations(file, directory)


def _file_violations(file: manifest_pb2.GraphFile, directory: Path) -> Iterator[str]:
    if not _FILE_NAME.fullmatch(file.path):
        yield f"file name {file.path!r}: expected a plain name inside the artifact's directory"
        return
    path = directory / file.path
    if path.is_symlink() or not path.is_file():
        yield f"{file.path} is missing, or not a regular file"


def _all_program_violations(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not manifest.programs:
        yield "programs are missing"
    yield from _duplicates("program", map(messages.name_of, manifest.programs))
    graphs = {graph.name: graph for graph in manifest.graphs}
    used = {name for program in manifest.programs for name in (program.init, program.step, program.readout)}
    yield from (f"graph {name} is used by no program" for name in sorted(set(graphs) - used))
    for program in manifest.programs:
        # Each check relies on the ones before it, so that the first violations end the loop.
        for check in _PROGRAM_CHECKS:
            found = list(check(program, graphs))
            yield from (f"program {messages.name_of(program)!r}: {violation}" for violation in found)
            if found:
                return
    yield from _variant_violations(manifest)
    yield from _all_golden_violations(manifest)


def _variant_violations(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    operations = {program.operation for program in manifest.programs if not program.variant}
    for program in manifest.programs:
        if program.operation not in operations:
            yield f"program {messages.name_of(program)!r} has a variant, but its operation has no default"
    for operation in manifest.unsupported_operations:
        if operation not in OPERATIONS:
            yield f"unsupported_operations: unknown operation {operation!r}"
        elif operation in operations:
            yield f"unsupported_operations: the model supports {operation!r}"


def _reference_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    if program.operation not in OPERATIONS:
        yield f"unknown operation {program.operation!r}; expected one of: {', '.join(OPERATIONS)}"
    if program.variant and not _IDENTIFIER.fullmatch(program.variant):
        yield f"variant {program.variant!r}: expected lower-case letters, digits and underscores"
    if not program.readout:
        yield "readout is missing"
    for role in ("init", "step", "readout"):
        name = getattr(program, role)
        if name and name not in graphs:
            yield f"{role} refers to unknown graph {name!r}"


def _binding_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    declared = [*program.state, *program.outputs, *(item.tensor for item in program.inputs)]
    for message in (*declared, *(item.tensor for item in program.noise)):
        yield from _tensor_violations(message)
    spec = messages.program_spec(program, graphs)
    names = [tensor.name for tensor in (*spec.state, *(item.tensor for item in spec.inputs))]
    names += [item.tensor.name for item in spec.noise] + [parameter.name for parameter in spec.parameters]
    yield from _duplicates("name", (*names, "step_index", "num_steps"))
    sources = spec.tensors()
    for graph in spec.graphs:
        for tensor in graph.inputs:
            source = sources.get(tensor.name)
            if source is None or str(source) != str(tensor):
                yield (
                    f"graph {graph.name}: input {tensor.name} is {tensor}, expected {source or 'a source'}"
                )
    for graph_spec in (spec.init, spec.step):
        if graph_spec and not _are_same_tensors(graph_spec.outputs, spec.state):
            yield f"graph {graph_spec.name} does not return the state"
    outputs = [messages.tensor_spec(tensor) for tensor in program.outputs]
    if not _are_same_tensors(outputs, spec.readout.outputs):
        yield f"graph {program.readout} does not return the outputs"


def _are_same_tensors(left: Sequence[TensorSpec], right: Sequence[TensorSpec]) -> bool:
    return [(tensor.name, str(tensor)) for tensor in left] == [(tensor.name, str(tensor)) for tensor in right]


def _parameter_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    for parameter in program.parameters:
        name, kind = parameter.name, messages.PARAMETER_KINDS.get(parameter.type)
        if not _IDENTIFIER.fullmatch(name) or kind is None:
            yield f"parameter {name!r} has an invalid name or no type"
        if not -MAX_NUMBER <= parameter.minimum <= parameter.maximum <= MAX_NUMBER:
            yield f"parameter {name} has bounds {parameter.minimum:g}..{parameter.maximum:g}, at most 2^53"
        if not parameter.minimum <= parameter.default_value <= parameter.maximum:
            bounds = f"{parameter.minimum:g}..{parameter.maximum:g}"
            yield f"parameter {name} has default {parameter.default_value:g}, expected {bounds}"
        num_choices = len(parameter.choices)
        if kind == "choice" and (num_choices < 1 or parameter.maximum != num_choices - 1):
            yield f"parameter {name} has {num_choices} choices for 0..{parameter.maximum:g}"
        if kind != "choice" and parameter.choices:
            yield f"parameter {name} has choices, expected them for the type CHOICE only"


def _noise_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    readers = [
        tensor.name
        for role in (program.init, program.step, program.readout)
        if role
        for tensor in graphs[role].inputs
    ]
    for item in program.noise:
        # Two readers, such as init and the first step, would draw the same numbers.
        if (count := readers.count(item.tensor.name)) != 1:
            yield f"noise {item.tensor.name} is read by {count} graphs, expected one"
    yield from _duplicates("noise stream", (str(item.stream) for item in program.noise))
    for item in program.noise:
        if not item.distribution:
            yield f"noise {item.tensor.name} has no distribution"
        if item.tensor.dtype != manifest_pb2.DATA_TYPE_FLOAT32 or item.stream < 0:
            yield f"noise {item.tensor.name}: expected float32 on a stream of at least 0"


def _step_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    steps = program.steps
    integers = {p.name: p for p in program.parameters if p.type == manifest_pb2.Parameter.TYPE_INTEGER}
    if not program.step:
        if steps.WhichOneof("count") or steps.done_flag or steps.units_per_step:
            yield "steps are set, but there is no step graph"
        return
    if steps.WhichOneof("count") == "parameter":
        parameter = integers.get(steps.parameter)
        if parameter is None or not 1 <= parameter.minimum <= parameter.maximum < MAX_STEPS:
            yield f"steps.parameter is {steps.parameter!r}, expected an integer parameter within 1..2^31"
    elif steps.fixed < 1:
        yield f"steps.fixed is {steps.fixed}, expected at least 1 for a program with a step graph"
    if steps.units_per_step < 0:
        yield f"steps.units_per_step is {steps.units_per_step}, expected at least 0"
    scalars = {tensor.name for tensor in program.state if str(messages.tensor_spec(tensor)) == "bool[]"}
    if steps.done_flag and steps.done_flag not in scalars:
        yield f"steps.done_flag is {steps.done_flag!r}, expected a boolean scalar of the state"


def _score_violations(program: manifest_pb2.Program, graphs: messages.Graphs) -> Iterator[str]:
    if not program.HasField("score"):
        if program.operation == "score":
            yield "score is missing, which says what the number means"
        return
    score = program.score
    if not score.kind or not score.coordinate_space or score.dimensions < 1:
        yield "score: expected kind, coordinate_space and dimensions"
    floats = _scalars(program.outputs, "float32[]", "float64[]")
    if score.nats_output not in floats:
        yield f"score.nats_output is {score.nats_output!r}, expected a floating-point scalar of the outputs"
    if score.standard_error_output and score.standard_error_output not in floats:
        yield (
            f"score.standard_error_output is {score.standard_error_output!r}, expected a floating-point "
            "scalar of the outputs"
        )
    integers = _scalars(program.outputs, "int32[]", "int64[]")
    if score.row_dimensions_output and score.row_dimensions_output not in integers:
        yield (
            f"score.row_dimensions_output is {score.row_dimensions_output!r}, expected an integer scalar of "
            "the outputs"
        )
    parameters = {parameter.name for parameter in program.parameters}
    if score.draws_parameter and score.draws_parameter not in parameters:
        yield f"score.draws_parameter is {score.draws_parameter!r}, expected a parameter"


def _scalars(outputs: Iterable[manifest_pb2.TensorSpec], *types: str) -> set[str]:
    return {tensor.name for tensor in outputs if str(messages.tensor_spec(tensor)) in types}


_PROGRAM_CHECKS = (
    _reference_violations,
    _binding_violations,
    _parameter_violations,
    _noise_violations,
    _step_violations,
    _score_violations,
)


def _all_golden_violations(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    graphs = {graph.name: graph for graph in manifest.graphs}
    programs = {
        messages.name_of(program): messages.program_spec(program, graphs) for program in manifest.programs
    }
    covered = set(map(messages.name_of, manifest.golden_rows))
    yield from (f"program {name!r} has no golden rows" for name in sorted(set(programs) - covered))
    for golden in manifest.golden_rows:
        name = messages.name_of(golden)
        if name not in programs:
            yield f"golden rows of {name!r}: unknown program"
            continue
        found = _golden_violations(golden, programs[name])
        yield from (f"golden rows of {name!r}: {violation}" for violation in found)


def _golden_violations(golden: manifest_pb2.GoldenRows, program: ProgramSpec) -> Iterator[str]:
    if golden.rows < 1 or golden.first_row + golden.rows > 2**32:
        yield f"{golden.rows} rows from {golden.first_row}, expected at least 1 row with an index below 2^32"
    parameters = {parameter.name: parameter for parameter in program.parameters}
    for name, value in golden.parameters.items():
        if name not in parameters or not parameters[name].minimum <= value <= parameters[name].maximum:
            yield f"parameter {name} = {value:g} is unknown or out of bounds"
    yield from _golden_tensors_violations(golden, program)


def _golden_tensors_violations(golden: manifest_pb2.GoldenRows, program: ProgramSpec) -> Iterator[str]:
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
        yield "tolerances: expected finite numbers of at least 0"
    for recorded, specs in ((golden.inputs, inputs), (golden.outputs, outputs)):
        for name, tensor in recorded.items():
            yield from _golden_tensor_violations(tensor, specs[name], golden.rows)


def _golden_tensor_violations(
    golden: manifest_pb2.GoldenTensor, tensor: TensorSpec, rows: int
) -> Iterator[str]:
    try:
        array = messages.golden_array(golden)
    except tensors.MalformedTensor as error:
        yield f"{tensor.name}: {error}"
        return
    if array.dtype != np.dtype(tensor.dtype) or array.shape != (rows, *tensor.shape):
        yield f"{tensor.name} is {array.dtype}{list(array.shape)}, expected {rows} rows of {tensor}"


def _duplicates(kind: str, names: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            yield f"{kind} {name!r} is empty or not unique"
        seen.add(name)
