"""Conversion of data specs, graphs and programs to the protobuf messages of the manifest."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from export.graphs.graph import Graph
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from samovar.tensors import data_type, pack
from samovar.v1 import manifest_pb2

FORMAT_VERSION = 2

_KINDS = {
    "image": manifest_pb2.DataSpec.KIND_IMAGE,
    "vector": manifest_pb2.DataSpec.KIND_VECTOR,
    "tokens": manifest_pb2.DataSpec.KIND_TOKENS,
}
_PARAMETER_TYPES = {
    "float": manifest_pb2.Parameter.TYPE_FLOAT,
    "integer": manifest_pb2.Parameter.TYPE_INTEGER,
    "boolean": manifest_pb2.Parameter.TYPE_BOOLEAN,
    "choice": manifest_pb2.Parameter.TYPE_CHOICE,
}
_DISTRIBUTIONS = {
    "normal": manifest_pb2.Noise.DISTRIBUTION_NORMAL,
    "uniform": manifest_pb2.Noise.DISTRIBUTION_UNIFORM,
}
_SCORE_KINDS = {
    "exact": manifest_pb2.Score.KIND_EXACT,
    "lower_bound": manifest_pb2.Score.KIND_LOWER_BOUND,
    "estimate": manifest_pb2.Score.KIND_ESTIMATE,
    "unnormalized": manifest_pb2.Score.KIND_UNNORMALIZED,
}


def data_spec_to_proto(data_spec: DataSpec) -> manifest_pb2.DataSpec:
    """Convert the type of a data row."""
    return manifest_pb2.DataSpec(
        kind=_KINDS[data_spec.kind],
        tensor=tensor_to_proto(data_spec.tensor),
        num_levels=data_spec.num_levels,
        vocabulary=data_spec.vocabulary,
        class_labels=data_spec.class_labels,
    )


def tensor_to_proto(spec: TensorSpec) -> manifest_pb2.TensorSpec:
    """Convert one tensor of a row."""
    return manifest_pb2.TensorSpec(
        name=spec.name,
        dtype=data_type(np.dtype(spec.dtype)),
        shape=spec.shape,
        minimum=spec.minimum,
        maximum=spec.maximum,
        doc=spec.doc,
    )


def graph_to_proto(graph: Graph) -> manifest_pb2.Graph:
    """Convert a graph; its list of files is left empty."""
    return manifest_pb2.Graph(
        name=graph.name,
        inputs=map(tensor_to_proto, graph.inputs),
        outputs=map(tensor_to_proto, graph.outputs),
    )


def program_to_proto(program: Program, graphs: Sequence[Graph]) -> manifest_pb2.Program:
    """Convert a program; `graphs` must contain the graph of each of its modules."""
    names = {id(graph.module): graph.name for graph in graphs}
    roles = {role: names[id(module)] for role, module, _ in program.modules}
    return manifest_pb2.Program(
        operation=program.operation,
        variant=program.variant,
        doc=program.doc,
        init=roles.get("init", ""),
        step=roles.get("step", ""),
        readout=roles["readout"],
        state=map(tensor_to_proto, program.state),
        steps=_steps_to_proto(program.steps) if program.steps else None,
        parameters=map(_parameter_to_proto, program.parameters),
        inputs=map(_input_to_proto, program.inputs),
        noise=map(_noise_to_proto, program.noise),
        outputs=map(tensor_to_proto, program.outputs),
        score=_score_to_proto(program.score) if program.score else None,
        previewable=program.previewable,
    )


def golden_tensor_to_proto(array: NDArray[np.generic]) -> manifest_pb2.GoldenTensor:
    """Convert an array of golden rows."""
    packed = pack(array)
    return manifest_pb2.GoldenTensor(dtype=packed.dtype, shape=array.shape, data=packed.data)


def _steps_to_proto(steps: Steps) -> manifest_pb2.Steps:
    units = steps.units_per_step if steps.units_per_step > 1 else 0
    return manifest_pb2.Steps(
        units_per_step=units,
        done_flag=steps.done_flag or "",
        **({"parameter": steps.parameter} if steps.fixed is None else {"fixed": steps.fixed}),
    )


def _parameter_to_proto(parameter: Parameter) -> manifest_pb2.Parameter:
    return manifest_pb2.Parameter(
        name=parameter.name,
        type=_PARAMETER_TYPES[parameter.type],
        default_value=parameter.default,
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=parameter.choices,
        doc=parameter.doc,
    )


def _input_to_proto(entry: Input) -> manifest_pb2.Input:
    return manifest_pb2.Input(
        tensor=tensor_to_proto(entry.tensor), optional=entry.optional, default_value=entry.default
    )


def _noise_to_proto(noise: Noise) -> manifest_pb2.Noise:
    return manifest_pb2.Noise(
        tensor=tensor_to_proto(noise.spec),
        distribution=_DISTRIBUTIONS[noise.distribution],
        stream=noise.stream,
    )


def _score_to_proto(score: Score) -> manifest_pb2.Score:
    return manifest_pb2.Score(
        kind=_SCORE_KINDS[score.kind],
        dimensions=score.dimensions,
        coordinate_space=score.coordinate_space,
        nats_output=score.nats_output,
        standard_error_output=score.standard_error_output or "",
        draws_parameter=score.draws_parameter or "",
        row_dimensions_output=score.row_dimensions_output or "",
    )
