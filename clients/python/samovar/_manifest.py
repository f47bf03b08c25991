"""Decoding of model descriptions from manifest messages."""

from datetime import UTC

import numpy as np

from samovar.model import (
    DataKind,
    DataSpec,
    Input,
    Model,
    Operation,
    Parameter,
    ParameterType,
    Provenance,
    Quality,
    Scalar,
    ScoreKind,
    ScoreMeaning,
    Steps,
    TensorSpec,
)
from samovar.operations import program_name
from samovar.tensors import DTYPES
from samovar.v1 import inference_pb2, manifest_pb2


def read_model(message: inference_pb2.Model) -> Model:
    """Decode a model; kinds and types that this client does not know become unspecified."""
    manifest = message.manifest
    return Model(
        name=manifest.name,
        version=manifest.version,
        is_default=message.is_default,
        family=manifest.family,
        description=manifest.description,
        formats=tuple(message.formats),
        artifact_sha256=message.artifact_sha256,
        data_spec=_data_spec(manifest.data_spec),
        operations={operation.name: operation for operation in map(_operation, manifest.programs)},
        quality=tuple(map(_quality, manifest.quality)),
        provenance=_provenance(manifest.provenance),
        unsupported_operations=dict(manifest.unsupported_operations),
    )


def read_score_meaning(score: manifest_pb2.Score) -> ScoreMeaning:
    """Decode the meaning of a score; an unknown kind becomes unspecified."""
    return ScoreMeaning(
        _SCORE_KINDS.get(score.kind, ScoreKind.UNSPECIFIED), score.dimensions, score.coordinate_space
    )


_SCORE_KINDS = {
    manifest_pb2.Score.KIND_EXACT: ScoreKind.EXACT,
    manifest_pb2.Score.KIND_LOWER_BOUND: ScoreKind.LOWER_BOUND,
    manifest_pb2.Score.KIND_ESTIMATE: ScoreKind.ESTIMATE,
    manifest_pb2.Score.KIND_UNNORMALIZED: ScoreKind.UNNORMALIZED,
}
_DATA_KINDS = {
    manifest_pb2.DataSpec.KIND_IMAGE: DataKind.IMAGE,
    manifest_pb2.DataSpec.KIND_VECTOR: DataKind.VECTOR,
    manifest_pb2.DataSpec.KIND_TOKENS: DataKind.TOKENS,
}
_PARAMETER_TYPES = {
    manifest_pb2.Parameter.TYPE_FLOAT: ParameterType.FLOAT,
    manifest_pb2.Parameter.TYPE_INTEGER: ParameterType.INTEGER,
    manifest_pb2.Parameter.TYPE_BOOLEAN: ParameterType.BOOLEAN,
    manifest_pb2.Parameter.TYPE_CHOICE: ParameterType.CHOICE,
}
_UNKNOWN_DTYPE = np.dtype("V")


def _tensor_spec(spec: manifest_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(
        name=spec.name,
        dtype=DTYPES.get(spec.dtype, _UNKNOWN_DTYPE),
        shape=tuple(spec.shape),
        minimum=spec.minimum if spec.HasField("minimum") else None,
        maximum=spec.maximum if spec.HasField("maximum") else None,
        doc=spec.doc,
    )


def _data_spec(data_spec: manifest_pb2.DataSpec) -> DataSpec:
    return DataSpec(
        kind=_DATA_KINDS.get(data_spec.kind, DataKind.UNSPECIFIED),
        tensor=_tensor_spec(data_spec.tensor),
        num_levels=data_spec.num_levels,
        vocabulary=tuple(data_spec.vocabulary),
        class_labels=tuple(data_spec.class_labels),
    )


def _operation(program: manifest_pb2.Program) -> Operation:
    return Operation(
        name=program_name(program.operation, program.variant),
        doc=program.doc,
        parameters=tuple(map(_parameter, program.parameters)),
        inputs=tuple(map(_input, program.inputs)),
        outputs=tuple(map(_tensor_spec, program.outputs)),
        steps=_steps(program.steps),
        previewable=program.previewable,
        score=read_score_meaning(program.score) if program.HasField("score") else None,
    )


def _input(entry: manifest_pb2.Input) -> Input:
    return Input(_tensor_spec(entry.tensor), entry.optional, entry.default_value)


def _parameter(parameter: manifest_pb2.Parameter) -> Parameter:
    return Parameter(
        name=parameter.name,
        type=_PARAMETER_TYPES.get(parameter.type, ParameterType.UNSPECIFIED),
        default=_default(parameter),
        minimum=parameter.minimum,
        maximum=parameter.maximum,
        choices=tuple(parameter.choices),
        doc=parameter.doc,
    )


def _default(parameter: manifest_pb2.Parameter) -> Scalar:
    match parameter.type:
        case manifest_pb2.Parameter.TYPE_INTEGER:
            return int(parameter.default_value)
        case manifest_pb2.Parameter.TYPE_BOOLEAN:
            return bool(parameter.default_value)
        case manifest_pb2.Parameter.TYPE_CHOICE:
            return parameter.choices[int(parameter.default_value)]
        case _:
            return parameter.default_value


def _steps(steps: manifest_pb2.Steps) -> Steps:
    return Steps(steps.fixed, steps.parameter, max(1, steps.units_per_step), bool(steps.done_flag))


def _quality(metric: manifest_pb2.Quality) -> Quality:
    return Quality(
        name=metric.name,
        value=metric.value,
        unit=metric.unit,
        standard_error=metric.standard_error if metric.HasField("standard_error") else None,
        doc=metric.doc,
        reference_value=metric.reference_value if metric.HasField("reference_value") else None,
    )


def _provenance(provenance: manifest_pb2.Provenance) -> Provenance:
    return Provenance(
        created=provenance.created.ToDatetime(UTC),
        dataset=provenance.dataset,
        dataset_sha256=provenance.dataset_sha256,
        seed=provenance.seed,
        training_seconds=provenance.training_seconds,
        device=provenance.device,
        library_versions=dict(provenance.library_versions),
        settings=dict(provenance.settings),
    )
