"""Registry of served models, by name and version, with their programs by operation.

Plain data, which is pickled to gRPC workers. Knows neither how a model is loaded (repository.py) nor how
its programs run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from samovar.operations import program_name
from samovar.v1 import manifest_pb2
from server.core.errors import InvalidRequest, ModelNotFound, UnsupportedOperation, Violation
from server.core.spec import ModelSpec, ProgramKey, ProgramSpec


@dataclass(frozen=True)
class LoadedProgram:
    """A program that is ready to run.

    Attributes:
        key: its identity in the engine.
        spec: its specification.
        capacity: largest number of rows that share a step.
        is_bitwise: whether its rows are batch-invariant on this device.
        default_inputs: arrays [1, *row shape] of the optional inputs, by name.
    """

    key: ProgramKey
    spec: ProgramSpec
    capacity: int
    is_bitwise: bool
    default_inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A loaded artifact; `programs` has every program by (format, program name)."""

    spec: ModelSpec
    manifest: manifest_pb2.Manifest
    formats: tuple[str, ...]
    programs: Mapping[tuple[str, str], LoadedProgram]

    @property
    def name(self) -> str:
        """<name>/<version>."""
        return f"{self.spec.name}/{self.spec.version}"

    def program(self, operation: str, variant: str = "", format_: str = "") -> LoadedProgram:
        """Return the program of an operation, in the default format if none is given.

        Raises:
            UnsupportedOperation: the model lacks the operation.
            InvalidRequest: the operation has no such variant.
            ModelNotFound: the model is not served in this format.
        """
        program = self.programs.get((format_ or self.formats[0], program_name(operation, variant)))
        if program is None:
            raise self._lookup_error(operation, variant, format_)
        return program

    def check_format(self, format_: str) -> None:
        """Raise ModelNotFound if a format is given in which the model is not served."""
        if format_ and format_ not in self.formats:
            raise self._unknown_format(format_)

    def _lookup_error(self, operation: str, variant: str, format_: str) -> Exception:
        variants = self.spec.variants(operation)
        if not variants:
            supported = sorted({program.operation for program in self.spec.programs.values()})
            reason = self.spec.unsupported_operations.get(operation, "")
            return UnsupportedOperation(self.name, operation, supported, reason)
        if variant not in variants:
            known = ", ".join(sorted(filter(None, variants))) or "none"
            expected = f"unknown variant {variant!r} of {operation}; expected one of: {known}"
            return InvalidRequest([Violation("variant", expected)])
        return self._unknown_format(format_)

    def _unknown_format(self, format_: str) -> ModelNotFound:
        return ModelNotFound(
            f"{self.name} is not served as {format_!r}; expected one of: {', '.join(self.formats)}"
        )


class ModelRegistry:
    """Served models by name and version."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Model]] = {}

    def __iter__(self) -> Iterator[Model]:
        """Yield models by name, the newest version first."""
        for name in sorted(self._models):
            yield from self._versions(name)

    def add(self, model: Model) -> None:
        self._models.setdefault(model.spec.name, {})[model.spec.version] = model

    def default(self, name: str) -> Model:
        """Return the newest version of a model."""
        return self._versions(name)[0]

    def select(self, name: str, version: str = "") -> Model:
        """Return a model, the newest version if none is given.

        Raises:
            ModelNotFound: the model or version is not served; lists those that are.
        """
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none"
            raise ModelNotFound(f"unknown model {name!r}; expected one of: {known}")
        if version and version not in self._models[name]:
            known = ", ".join(model.spec.version for model in self._versions(name))
            raise ModelNotFound(f"unknown version {version!r} of {name}; expected one of: {known}")
        return self._models[name][version] if version else self.default(name)

    def is_known(self, name: str) -> bool:
        return name in self._models

    def _versions(self, name: str) -> list[Model]:
        return sorted(self._models[name].values(), key=lambda model: -int(model.spec.version))
