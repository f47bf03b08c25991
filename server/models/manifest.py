"""Conversion of manifest messages to frozen specifications.

Messages are trusted: validation.py checks them first.
"""

from collections.abc import Mapping
from pathlib import Path

from samovar import tensors
from samovar.operations import program_name
from samovar.v1 import inference_pb2, manifest_pb2
from server.core.spec import (
    GoldenRows,
    GraphSpec,
    InputSpec,
    ModelSpec,
    NoiseSpec,
    ParameterKind,
    ParameterSpec,
    ProgramSpec,
    ScoreSpec,
    StepSchedule,
    TensorSpec,
)

Graphs = Mapping[str, manifest_pb2.Graph]

PARAMETER_KINDS: dict[int, ParameterKind] = {
    manifest_pb2.Parameter.TYPE_FLOAT: "float",
    manifest_pb2.Parameter.TYPE_INTEGER: "integer",
    manifest_pb2.Parameter.TYPE_BOOLEAN: "boolean",
    manifest_pb2.Parameter.TYPE_CHOICE: "choice",
}


def model_spec(manifest: manifest_pb2.Manifest, directory: Path, digest: str) -> ModelSpec:
    """Return the specification of a valid manifest in this directory, with this digest."""
    graphs = {graph.name: graph for graph in manifest.graphs}
    files: dict[str, dict[str, Path]] = {}
    for graph in manifest.graphs:
        for file in graph.files:
            files.setdefault(file.format, {})[graph.name] = directory / file.path
    return ModelSpec(
        name=manifest.name,
        version=manifest.version,
        digest=digest,
        programs={name_of(message): program_spec(message, graphs) for message in manifest.programs},
        files=files,
        golden=[_golden_rows(message) for message in manifest.golden_rows],
        unsupported_operations=dict(manifest.unsupported_operations),
    )


def name_of(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.variant)


def program_spec(message: manifest_pb2.Program, graphs: Graphs) -> ProgramSpec:
    return ProgramSpec(
        operation=message.operation,
        variant=message.variant,
        readout=_graph_spec(graphs[message.readout]),
        init=_graph_spec(graphs[message.init]) if message.init else None,
        step=_graph_spec(graphs[message.step]) if message.step else None,
        state=tuple(tensor_spec(tensor) for tensor in message.state),
        steps=StepSchedule(
            message.steps.fixed,
            message.steps.parameter,
            message.steps.units_per_step or 1,
            message.steps.done_flag,
        ),
        parameters=tuple(_parameter_spec(parameter) for parameter in message.parameters),
        inputs=tuple(
            InputSpec(tensor_spec(item.tensor), item.optional, item.default_value) for item in message.inputs
        ),
        noise=tuple(_noise_spec(item) for item in message.noise),
        score=_score_spec(message.score) if message.HasField("score") else None,
        previewable=message.previewable,
    )


def tensor_spec(message: manifest_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(
        name=message.name,
        dtype=tensors.DTYPES[message.dtype].name if message.dtype in tensors.DTYPES else "",
        shape=tuple(message.shape),
        minimum=message.minimum if message.HasField("minimum") else None,
        maximum=message.maximum if message.HasField("maximum") else None,
    )


def golden_array(message: manifest_pb2.GoldenTensor) -> tensors.Array:
    """Return the array; MalformedTensor if its shape and bytes do not agree."""
    return tensors.unpack(inference_pb2.Tensor(dtype=message.dtype, shape=message.shape, data=message.data))


def public(manifest: manifest_pb2.Manifest) -> manifest_pb2.Manifest:
    """Return the manifest for clients, without its golden rows."""
    copy = manifest_pb2.Manifest()
    copy.CopyFrom(manifest)
    copy.ClearField("golden_rows")
    return copy


def _graph_spec(message: manifest_pb2.Graph) -> GraphSpec:
    return GraphSpec(
        message.name, tuple(map(tensor_spec, message.inputs)), tuple(map(tensor_spec, message.outputs))
    )


def _parameter_spec(message: manifest_pb2.Parameter) -> ParameterSpec:
    return ParameterSpec(
        name=message.name,
        kind=PARAMETER_KINDS.get(message.type, "float"),
        default=message.default_value,
        minimum=message.minimum,
        maximum=message.maximum,
        choices=tuple(message.choices),
    )


def _noise_spec(message: manifest_pb2.Noise) -> NoiseSpec:
    is_normal = message.distribution == manifest_pb2.Noise.DISTRIBUTION_NORMAL
    return NoiseSpec(tensor_spec(message.tensor), "normal" if is_normal else "uniform", message.stream)


def _score_spec(message: manifest_pb2.Score) -> ScoreSpec:
    return ScoreSpec(
        dimensions=message.dimensions,
        is_normalized=message.kind != manifest_pb2.Score.KIND_UNNORMALIZED,
        nats_output=message.nats_output,
        standard_error_output=message.standard_error_output,
        draws_parameter=message.draws_parameter,
        row_dimensions_output=message.row_dimensions_output,
    )


def _golden_rows(message: manifest_pb2.GoldenRows) -> GoldenRows:
    return GoldenRows(
        program=name_of(message),
        seed=message.seed,
        first_row=message.first_row,
        rows=message.rows,
        parameters=dict(message.parameters),
        inputs={name: golden_array(tensor) for name, tensor in message.inputs.items()},
        outputs={name: golden_array(tensor) for name, tensor in message.outputs.items()},
        tolerance=dict(message.tolerance),
    )
