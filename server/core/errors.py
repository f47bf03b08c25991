"""Everything that can be refused or go wrong, as exceptions, which may travel between processes.

Knows no status codes.

SamovarError
├── RequestError                 the caller can do something about it
│   ├── InvalidRequest           every violation, with what was expected and what was given
│   ├── ModelNotFound            no such model, version or format is served
│   ├── OperationNotSupported    the model lacks the operation; names the ones it has
│   ├── Overloaded               too many rows wait; says when to come back
│   └── DeadlineExceeded         the caller's deadline passed before the rows were done
├── ServerError                  the caller can do nothing about it
│   ├── ModelFailed              a graph raised, or rows came out non-finite
│   └── ServerUnavailable        starting or stopping: another replica may answer
└── ArtifactRefused              an artifact that must not be served, and why
    └── RuntimeMissing           a format that cannot be run on this device, whatever the artifact
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# How an exception is made again in another process; by itself it would be from its message alone.
Reduced = tuple[type, tuple[Any, ...]]


class SamovarError(Exception):
    """The root."""


class RequestError(SamovarError):
    """The caller can do something about it."""


class ServerError(SamovarError):
    """The caller can do nothing about it."""


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request: where, and what was expected and given."""

    field: str
    description: str


class InvalidRequest(RequestError):
    """The request cannot be understood; `violations` lists everything that is wrong."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        listed = "; ".join(f"{violation.field}: {violation.description}" for violation in self.violations)
        super().__init__(f"invalid request: {listed}")

    def __reduce__(self) -> Reduced:
        return type(self), (self.violations,)


class ModelNotFound(RequestError):
    """No such model, version or format is served; the message names those that are."""


class UnsupportedOperation(RequestError):
    """The model has no program for the operation; `supported` names those it has, `reason` says why."""

    def __init__(self, model: str, operation: str, supported: Sequence[str], reason: str = "") -> None:
        self.model, self.operation, self.supported, self.reason = model, operation, tuple(supported), reason
        because = f": {reason}" if reason else ""
        super().__init__(
            f"{model} has no operation {operation!r}{because}; it has {', '.join(self.supported)}"
        )

    def __reduce__(self) -> Reduced:
        return type(self), (self.model, self.operation, self.supported, self.reason)


class Overloaded(RequestError):
    """Too many rows wait already; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_delay = retry_after
        super().__init__(message)

    def __reduce__(self) -> Reduced:
        return type(self), (str(self), self.retry_delay)


class DeadlineExceeded(RequestError):
    """The deadline passed; whatever was unfinished has been dropped."""


class ModelFailed(ServerError):
    """The model's graphs raised, or rows came out non-finite; the message names those."""


class Unavailable(ServerError):
    """The server is starting or stopping."""


class InvalidArtifact(SamovarError):
    """An artifact that must not be served; the message is one line that says why."""


class RuntimeUnavailable(InvalidArtifact):
    """A format's runtime cannot run on this device; another format may."""
