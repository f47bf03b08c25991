"""Reads what a server says of its models. Knows the manifest's messages, and no calls."""

from datetime import UTC

import numpy as np

from samovar.model import (
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
    ValueKind,
)
from samovar.operations import program_name
from samovar.tensors import DTYPES
from samovar.v1 import inference_pb2, manifest_pb2


def read_model(message: inference_pb2.Model) -> Model:
    """A model from its message."""
    manifest = message.manifest
    return Model(
        name=manifest.name,
        version=manifest.version,
        is_default=message.is_default,
        family=manifest.family,
        description=manifest.description,
        formats=tuple(message.formats),
        artifact_sha256=message.artifact_sha256,
        data_spec=_value(manifest.data_spec),
        operations={each.name: each for each in map(_operation, manifest.programs)},
        quality=tuple(_quality(figure) for figure in manifest.quality),
        provenance=_provenance(manifest.provenance),
        unsupported_operations=dict(manifest.unsupported_operations),
    )


def score_meaning(score: manifest_pb2.Score) -> ScoreMeaning:
    """What a score is; a kind that this client does not know counts as unspecified."""
    return ScoreMeaning(
        _SCORE_KINDS.get(score.kind, ScoreKind.UNSPECIFIED), score.dimensions, score.coordinate_space
    )


_SCORE_KINDS = {
    manifest_pb2.Score.KIND_EXACT: ScoreKind.EXACT,
    manifest_pb2.Score.KIND_LOWER_BOUND: ScoreKind.LOWER_BOUND,
    manifest_pb2.Score.KIND_ESTIMATE: ScoreKind.ESTIMATE,
    manifest_pb2.Score.KIND_UNNORMALIZED: ScoreKind.UNNORMALIZED,
}
_VALUE_KINDS = {
    manifest_pb2.DataSpec.KIND_IMAGE: ValueKind.IMAGE,
    manifest_pb2.DataSpec.KIND_VECTOR: ValueKind.VECTOR,
    manifest_pb2.DataSpec.KIND_TOKENS: ValueKind.TOKENS,
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


def _value(value: manifest_pb2.DataSpec) -> DataSpec:
    return DataSpec(
        kind=_VALUE_KINDS.get(value.kind, ValueKind.UNSPECIFIED),
        tensor=_tensor_spec(value.tensor),
        num_levels=value.num_levels,
        vocabulary=tuple(value.vocabulary),
        class_labels=tuple(value.class_labels),
    )


def _operation(program: manifest_pb2.Program) -> Operation:
    return Operation(
        name=program_name(program.operation, program.variant),
        doc=program.doc,
        parameters=tuple(_parameter(parameter) for parameter in program.parameters),
        inputs=tuple(
            Input(_tensor_spec(each.tensor), each.optional, each.default_value) for each in program.inputs
        ),
        outputs=tuple(_tensor_spec(output) for output in program.outputs),
        steps=_steps(program.steps),
        previewable=program.previewable,
        score=score_meaning(program.score) if program.HasField("score") else None,
    )


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


def _quality(figure: manifest_pb2.Quality) -> Quality:
    return Quality(
        name=figure.name,
        value=figure.value,
        unit=figure.unit,
        standard_error=figure.standard_error if figure.HasField("standard_error") else None,
        doc=figure.doc,
        reference_value=figure.reference_value if figure.HasField("reference_value") else None,
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
