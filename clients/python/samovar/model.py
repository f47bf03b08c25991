"""What a server says of a model that it holds, as frozen data. Knows no calls."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np

from samovar.errors import Details, UnsupportedOperation, invalid_request

Scalar = bool | int | float | str


class ScoreKind(StrEnum):
    """How a score relates to the log-density of the model."""

    UNSPECIFIED = "unspecified"
    EXACT = "exact"
    LOWER_BOUND = "lower bound"
    ESTIMATE = "estimate"
    UNNORMALIZED = "unnormalized"


class ValueKind(StrEnum):
    """What one row of a model's data is."""

    UNSPECIFIED = "unspecified"
    IMAGE = "image"
    VECTOR = "vector"
    TOKENS = "tokens"


class ParameterType(StrEnum):
    """The Python type that a parameter takes: float, int, bool, or one of its choices as text."""

    UNSPECIFIED = "unspecified"
    FLOAT = "float"
    INTEGER = "integer"
    BOOLEAN = "boolean"
    CHOICE = "choice"


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor of a row, without the batch axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    minimum: float | None = None
    maximum: float | None = None
    doc: str = ""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class DataSpec:
    """What one row of data is; `levels` is 0 unless its elements are discrete."""

    kind: ValueKind
    tensor: TensorSpec
    num_levels: int = 0
    vocabulary: tuple[str, ...] = ()
    class_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parameter:
    """One setting of a request; numbers lie between `minimum` and `maximum`, both included."""

    name: str
    type: ParameterType
    default: Scalar
    minimum: float
    maximum: float
    choices: tuple[str, ...] = ()
    doc: str = ""


@dataclass(frozen=True)
class Input:
    """One tensor of a request; an optional one that is left out is `default` everywhere."""

    tensor: TensorSpec
    optional: bool = False
    default: float = 0.0


@dataclass(frozen=True)
class Steps:
    """How many steps a row takes: `fixed`, or as many as cover the value of `parameter`."""

    fixed: int = 0
    parameter: str = ""
    units_per_step: int = 1
    may_end_early: bool = False

    def of(self, parameters: Mapping[str, Scalar]) -> int:
        """Steps of a row with these parameters, unless it ends early."""
        if not self.parameter:
            return self.fixed
        return math.ceil(float(parameters[self.parameter]) / self.units_per_step)

    def __str__(self) -> str:
        per = f" / {self.units_per_step}" if self.units_per_step > 1 else ""
        count = f"{self.parameter}{per}" if self.parameter else str(self.fixed or "none")
        return f"{count}, fewer when a row ends early" if self.may_end_early else count


@dataclass(frozen=True)
class ScoreMeaning:
    """What the number of a score is; `space` names the coordinates in which the density is meant."""

    kind: ScoreKind
    dimensions: int
    space: str


@dataclass(frozen=True)
class Operation:
    """One thing that a model can do, in its usual way or by a method: `sample`, `sample:inpaint`."""

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
        """What to ask for as `method`; empty for the usual way."""
        return self.name.partition(":")[2]


@dataclass(frozen=True)
class Quality:
    """One figure measured at export on held-out data; `floor` is the same between two real samples."""

    name: str
    value: float
    unit: str
    standard_error: float | None = None
    doc: str = ""
    reference_value: float | None = None


@dataclass(frozen=True)
class Provenance:
    """How the model was made."""

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
    """One version of a model; `formats` begins with the server's first choice."""

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

    def operation(self, name: str, method: str = "") -> Operation:
        """The operation of that name, in its usual way or by a method.

        UnsupportedOperation, with the reason where there is one, when the model lacks the operation;
        InvalidRequest when it lacks the method.
        """
        if name not in self.operations:
            raise self._unsupported(name)
        methods = {
            each.variant: each for each in self.operations.values() if each.name.partition(":")[0] == name
        }
        if method not in methods:
            known = ", ".join(filter(None, methods)) or "none besides the usual way"
            raise invalid_request("method", f"expected one of {name}: {known}; got {method!r}")
        return methods[method]

    def _unsupported(self, name: str) -> UnsupportedOperation:
        supported = tuple(name for name in self.operations if ":" not in name)
        because = f": {self.unsupported_operations[name]}" if name in self.unsupported_operations else ""
        return UnsupportedOperation(
            f"{self.name} {self.version} has no operation {name}{because}; it has {', '.join(supported)}",
            Details(facts={"supported": ",".join(supported)}),
        )
