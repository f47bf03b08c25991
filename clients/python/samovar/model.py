"""Descriptions of served models as frozen data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np

from samovar.errors import Details, UnsupportedOperation, invalid_request
from samovar.operations import parse_program_name

Scalar = bool | int | float | str


class ScoreKind(StrEnum):
    """Relation of a score to the log-density of the model."""

    UNSPECIFIED = "unspecified"
    EXACT = "exact"
    LOWER_BOUND = "lower bound"
    ESTIMATE = "estimate"
    UNNORMALIZED = "unnormalized"


class DataKind(StrEnum):
    """Kind of a model's data."""

    UNSPECIFIED = "unspecified"
    IMAGE = "image"
    VECTOR = "vector"
    TOKENS = "tokens"


class ParameterType(StrEnum):
    """Python type of a parameter: float, int, bool, or str for one of its choices."""

    UNSPECIFIED = "unspecified"
    FLOAT = "float"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    CHOICE = "choice"


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a row, without the batch axis.

    Attributes:
        name: The name, unique within an operation.
        dtype: The element type; void for a type that this client does not know.
        shape: The row's shape; empty for a scalar.
        minimum: Smallest allowed element; None without a bound.
        maximum: Largest allowed element; None without a bound.
        doc: Meaning and unit.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    minimum: float | None = None
    maximum: float | None = None
    doc: str = ""

    @property
    def row_bytes(self) -> int:
        """Size of one row in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DataSpec:
    """One row of a model's data.

    Attributes:
        kind: Image, vector or tokens.
        tensor: Element type, shape and range of one row.
        num_levels: Number of distinct levels of an element; 0 if it is continuous.
        vocabulary: Token texts by index, for token sequences.
        class_labels: Class names by index, if the data has classes.
    """

    kind: DataKind
    tensor: TensorSpec
    num_levels: int = 0
    vocabulary: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One scalar setting of a request.

    Attributes:
        name: The name.
        type: The Python type of the value.
        default: Value when a request omits the parameter.
        minimum: Smallest allowed number, inclusive.
        maximum: Largest allowed number, inclusive.
        choices: The allowed texts of a choice.
        doc: Meaning and unit.
    """

    name: str
    type: ParameterType
    default: Scalar
    minimum: float
    maximum: float
    choices: tuple[str, ...] = ()
    doc: str = ""


@dataclass(frozen=True)
class Input:
    """One input tensor of a request.

    Attributes:
        tensor: Name, type, shape and range of one row.
        optional: True if a request may omit the input.
        default: Value of every element when it is omitted.
    """

    tensor: TensorSpec
    optional: bool = False
    default: float = 0.0


@dataclass(frozen=True)
class Steps:
    """Number of steps of a row.

    Attributes:
        fixed: The number, if it is the same for every row.
        parameter: Name of the integer parameter that determines the number; "" if it is fixed.
        units_per_step: Units of the parameter that one step covers.
        has_early_exit: True if a row may finish before its last step.
    """

    fixed: int = 0
    parameter: str = ""
    units_per_step: int = 1
    has_early_exit: bool = False

    def num_steps(self, parameters: Mapping[str, Scalar]) -> int:
        """Return the number of steps of a row with these parameters if it does not exit early."""
        if not self.parameter:
            return self.fixed
        return math.ceil(float(parameters[self.parameter]) / self.units_per_step)

    def __str__(self) -> str:
        divisor = f" / {self.units_per_step}" if self.units_per_step > 1 else ""
        count = f"{self.parameter}{divisor}" if self.parameter else str(self.fixed or "none")
        return f"{count}, fewer if a row exits early" if self.has_early_exit else count


@dataclass(frozen=True)
class ScoreMeaning:
    """Meaning of a score.

    Attributes:
        kind: Relation to the log-density.
        dimensions: Number of dimensions, for bits per dimension.
        coordinate_space: Coordinates of the density, such as "integers 0..16".
    """

    kind: ScoreKind
    dimensions: int
    coordinate_space: str


@dataclass(frozen=True)
class Operation:
    """One operation of a model, or one variant of it.

    Attributes:
        name: The operation, with the variant if there is one: "sample", "sample:inpaint".
        doc: What the operation does.
        parameters: Scalar settings of a request.
        inputs: Input tensors of a request.
        outputs: Output tensors of a row, the primary one first.
        steps: Number of steps of a row.
        previewable: True if unfinished rows can be previewed.
        score: Meaning of the score; None for operations that return none.
    """

    name: str
    doc: str
    parameters: tuple[Parameter, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[TensorSpec, ...]
    steps: Steps
    previewable: bool
    score: ScoreMeaning | None = None

    @property
    def variant(self) -> str:
        """The `variant` option that selects this operation; "" for the default variant."""
        return parse_program_name(self.name)[1]


@dataclass(frozen=True)
class Quality:
    """One metric measured at export on held-out data.

    Attributes:
        name: Name of the metric.
        value: The measured value.
        unit: Its unit.
        standard_error: Its standard error, in the same unit; None if unknown.
        doc: How it was measured.
        reference_value: The same metric between two samples of real data; None if undefined.
    """

    name: str
    value: float
    unit: str
    standard_error: float | None = None
    doc: str = ""
    reference_value: float | None = None


@dataclass(frozen=True)
class Provenance:
    """Record of how a model was made.

    Attributes:
        created: When the artifact was written, in UTC.
        dataset: Name of the data set.
        dataset_sha256: SHA-256 of the training examples, as hexadecimal.
        seed: Seed of data splitting, initialization and training.
        training_seconds: Duration of training in seconds.
        device: The device that trained the model.
        library_versions: Versions of the exporter and its libraries, by name.
        settings: Settings of the training run, by name.
    """

    created: datetime
    dataset: str
    dataset_sha256: str
    seed: int
    training_seconds: float
    device: str
    library_versions: Mapping[str, str]
    settings: Mapping[str, str]


@dataclass(frozen=True)
class Model:
    """One version of a served model.

    Attributes:
        name: The model's name.
        version: The version, a positive integer as text.
        is_default: True for the version that answers when a call names none.
        family: The model family, such as "vae". Informational.
        description: One sentence of description.
        formats: The served formats; the first is the default.
        artifact_sha256: SHA-256 of the manifest file, as hexadecimal.
        data_spec: Type, shape and meaning of one row of data.
        operations: Operations and their variants, by name.
        quality: Metrics measured at export.
        provenance: Record of how the model was made.
        unsupported_operations: The reason for each operation that the model cannot support.
    """

    name: str
    version: str
    is_default: bool
    family: str
    description: str
    formats: tuple[str, ...]
    artifact_sha256: str
    data_spec: DataSpec
    operations: Mapping[str, Operation]
    quality: tuple[Quality, ...]
    provenance: Provenance
    unsupported_operations: Mapping[str, str] = field(default_factory=dict)

    def operation(self, name: str, variant: str = "") -> Operation:
        """Return an operation, in its default variant or another.

        Args:
            name: The operation, such as "sample".
            variant: The variant, such as "inpaint"; "" for the default.

        Raises:
            UnsupportedOperation: If the model lacks the operation; the message has the reason.
            InvalidRequest: If the operation lacks the variant.
        """
        if name not in self.operations:
            raise self._unsupported(name)
        variants = {
            operation.variant: operation
            for operation in self.operations.values()
            if parse_program_name(operation.name)[0] == name
        }
        if variant not in variants:
            known = ", ".join(sorted(filter(None, variants))) or "none"
            raise invalid_request(
                "variant", f"unknown variant {variant!r} of {name}; expected one of: {known}"
            )
        return variants[variant]

    def _unsupported(self, name: str) -> UnsupportedOperation:
        supported = tuple(operation.name for operation in self.operations.values() if not operation.variant)
        reason = f": {self.unsupported_operations[name]}" if name in self.unsupported_operations else ""
        message = f"{self.name}/{self.version} does not support {name!r}{reason}; it supports "
        return UnsupportedOperation(
            message + ", ".join(supported), Details(metadata={"supported": ",".join(supported)})
        )
