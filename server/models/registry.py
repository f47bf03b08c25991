"""The models that are served, as requests know them: by name and version, with programs by operation.

Plain data, which travels from the engine's process to front ends. Knows neither how a model is
loaded (repository.py) nor how its programs run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from samovar.operations import program_name
from samovar.v1 import manifest_pb2
from server.core.errors import InvalidRequest, ModelNotFound, UnsupportedOperation, Violation
from server.core.spec import ModelSpec, ProgramKey, ProgramSpec


@dataclass(frozen=True)
class LoadedProgram:
    """A program that is ready to run: how many rows share a step, and whether their bits feel it."""

    key: ProgramKey
    spec: ProgramSpec
    capacity: int
    is_bitwise: bool


@dataclass(frozen=True)
class Model:
    """An artifact whose every program is ready, in every format that is served."""

    spec: ModelSpec
    manifest: manifest_pb2.Manifest
    formats: tuple[str, ...]
    programs: Mapping[tuple[str, str], LoadedProgram]

    @property
    def name(self) -> str:
        return f"{self.spec.name}/{self.spec.version}"

    def program(self, operation: str, method: str = "", format_: str = "") -> LoadedProgram:
        """The program that a request means.

        OperationNotSupported, InvalidRequest or ModelNotFound when there is no such operation, method
        or format.
        """
        found = self.programs.get((format_ or self.formats[0], program_name(operation, method)))
        return found or self._explain(operation, method, format_)

    def _explain(self, operation: str, method: str, format_: str) -> LoadedProgram:
        """Say why there is no such program."""
        methods = self.spec.variants(operation)
        if not methods:
            supported = sorted({program.operation for program in self.spec.programs.values()})
            raise UnsupportedOperation(
                self.name, operation, supported, self.spec.unsupported_operations.get(operation, "")
            )
        if method not in methods:
            known = ", ".join(sorted(filter(None, methods))) or "none besides the usual way"
            raise InvalidRequest(
                [Violation("method", f"expected one of {operation}: {known}; got {method!r}")]
            )
        self.check_format(format_)
        raise AssertionError(f"{self.name} lacks {operation} as {format_}. This is a bug.")

    def check_format(self, format_: str) -> None:
        """ModelNotFound when the model is not served in a format that was asked for."""
        if format_ and format_ not in self.formats:
            raise ModelNotFound(f"{self.name} is served as {', '.join(self.formats)}, not as {format_!r}")


class ModelRegistry:
    """Answers which model a request means."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, Model]] = {}

    def __iter__(self) -> Iterator[Model]:
        """Models by name, newest version first."""
        for name in sorted(self._models):
            yield from self._versions(name)

    def add(self, model: Model) -> None:
        """Serve a model from now on."""
        self._models.setdefault(model.spec.name, {})[model.spec.version] = model

    def default(self, name: str) -> Model:
        """The newest version of a model that is known."""
        return self._versions(name)[0]

    def select(self, name: str, version: str = "") -> Model:
        """The model that a request means; ModelNotFound names what there is."""
        if name not in self._models:
            known = ", ".join(sorted(self._models)) or "none yet"
            raise ModelNotFound(f"there is no model {name!r}; there are: {known}")
        if version and version not in self._models[name]:
            known = ", ".join(model.spec.version for model in self._versions(name))
            raise ModelNotFound(f"{name} has no version {version!r}; it has: {known}")
        return self._models[name][version] if version else self.default(name)

    def is_known(self, name: str) -> bool:
        return name in self._models

    def _versions(self, name: str) -> list[Model]:
        return sorted(self._models[name].values(), key=lambda model: -int(model.spec.version))
