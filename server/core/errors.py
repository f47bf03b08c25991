"""Errors of the server, as exceptions that can be pickled between processes.

rpc/status.py maps them to status codes.

SamovarError
├── RequestError                 the caller can act on it
│   ├── InvalidRequest           every violation, with what was expected and given
│   ├── ModelNotFound            the model, version or format is not served
│   ├── UnsupportedOperation     the model lacks the operation; lists the supported ones
│   ├── Overloaded               a limit on queued rows or buffered bytes is reached; says when to retry
│   └── DeadlineExceeded         the deadline passed, or cannot be met
├── ServerError                  the caller cannot act on it
│   ├── ModelFailed              a graph raised, or rows are non-finite
│   └── Unavailable              the server is starting or stopping; another replica may answer
└── InvalidArtifact              an artifact that must not be served
    └── RuntimeUnavailable       a format that this device cannot run
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Constructor and arguments: exceptions with several arguments need it to be unpickled.
Reduced = tuple[type, tuple[Any, ...]]


class SamovarError(Exception):
    """Base class of all errors."""


class RequestError(SamovarError):
    """An error that the caller can act on."""


class ServerError(SamovarError):
    """An error that the caller cannot act on."""


@dataclass(frozen=True)
class Violation:
    """A field of a request that is invalid, with what was expected and given."""

    field: str
    description: str


class InvalidRequest(RequestError):
    """An invalid request; `violations` lists every violation."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        listed = "; ".join(f"{violation.field}: {violation.description}" for violation in self.violations)
        super().__init__(f"invalid request: {listed}")

    def __reduce__(self) -> Reduced:
        return type(self), (self.violations,)


class ModelNotFound(RequestError):
    """A model, version or format that is not served; the message lists those that are."""


class UnsupportedOperation(RequestError):
    """An operation that the model lacks; `supported` lists those it has, `reason` explains the lack."""

    def __init__(self, model: str, operation: str, supported: Sequence[str], reason: str = "") -> None:
        self.model, self.operation, self.supported, self.reason = model, operation, tuple(supported), reason
        because = f": {reason}" if reason else ""
        super().__init__(
            f"{model} does not support {operation!r}{because}; it supports {', '.join(self.supported)}"
        )

    def __reduce__(self) -> Reduced:
        return type(self), (self.model, self.operation, self.supported, self.reason)


class Overloaded(RequestError):
    """A limit of the server is reached; retry after `retry_delay` seconds."""

    def __init__(self, message: str, retry_delay: float) -> None:
        self.retry_delay = retry_delay
        super().__init__(message)

    def __reduce__(self) -> Reduced:
        return type(self), (str(self), self.retry_delay)


class DeadlineExceeded(RequestError):
    """The deadline passed or cannot be met; unfinished rows are dropped."""


class ModelFailed(ServerError):
    """A graph raised, or rows are non-finite; the message names the rows."""


class Unavailable(ServerError):
    """The server is starting or stopping."""


class InvalidArtifact(SamovarError):
    """An artifact that must not be served; the message gives the reason in one line."""


class RuntimeUnavailable(InvalidArtifact):
    """A format whose runtime is not available on this device; another format may be."""
