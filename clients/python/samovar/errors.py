"""Exceptions of the client, read from gRPC status codes and their details.

SamovarError
├── InvalidRequest          the request is wrong; `violations` lists every violation
├── UnsupportedOperation    the model lacks the operation; `supported` lists those it has
├── ModelNotFound           the model, version or format is not served
├── Overloaded              a limit of the server is reached; retry after `retry_delay` seconds
├── DeadlineExceeded        the timeout passed; allow more time, or request fewer rows or steps
├── Cancelled               the call was cancelled
├── Unavailable             no server answers: it is down, starting, stopping or at another address
└── ServerError             the server failed; the request is not the cause

The server's exceptions have the same names.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"

Metadata = Iterable[tuple[str, str | bytes]]
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request.

    Attributes:
        field: Path of the field, such as "parameters[steps]".
        description: What was expected and what was given.
    """

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


@dataclass(frozen=True)
class Details:
    """Details of an error, from the messages of google.rpc.

    Attributes:
        violations: Every violation of an invalid request.
        reason: The server's constant for the cause, in UPPER_SNAKE_CASE; "" if there is none.
        metadata: Facts by name, such as the operations that a model supports.
        retry_delay: Seconds to wait before a retry; None if the server gives none.
    """

    violations: tuple[Violation, ...] = ()
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_delay: float | None = None


_NO_DETAILS = Details()


class SamovarError(Exception):
    """Base class of all errors of a call.

    Attributes:
        message: One sentence for a developer.
        details: Everything else that is known about the error.
    """

    def __init__(self, message: str, details: Details = _NO_DETAILS) -> None:
        super().__init__(message, details)
        self.message = message
        self.details = details

    @property
    def reason(self) -> str:
        """The server's constant for the cause; "" if there is none."""
        return self.details.reason

    def __str__(self) -> str:
        return self.message


class InvalidRequest(SamovarError, ValueError):
    """An invalid request; the client raises it too, before it sends anything."""

    @property
    def violations(self) -> tuple[Violation, ...]:
        """Every violation, not only the first."""
        return self.details.violations

    def __str__(self) -> str:
        lines = [_headline(self.message, self.violations), *(f"  {entry}" for entry in self.violations)]
        return "\n".join(lines)


class UnsupportedOperation(SamovarError):
    """An operation that the model lacks."""

    @property
    def supported(self) -> tuple[str, ...]:
        """The operations that the model supports."""
        return tuple(filter(None, self.details.metadata.get("supported", "").split(",")))


class ModelNotFound(SamovarError):
    """A model, version or format that is not served."""


class Overloaded(SamovarError):
    """A limit of the server is reached: queued rows, buffered bytes or concurrent calls."""

    @property
    def retry_delay(self) -> float | None:
        """Seconds to wait before a retry; None if the server gives none."""
        return self.details.retry_delay


class DeadlineExceeded(SamovarError):
    """The timeout passed before the response was complete."""


class Cancelled(SamovarError):
    """The call was cancelled, by the client or on the way."""


class Unavailable(SamovarError):
    """No server answers at the address, even after the retries."""


class ServerError(SamovarError):
    """The server failed, or its response breaks the contract."""


def invalid_request(field: str, description: str) -> InvalidRequest:
    """Return the error for a request that the client itself rejects.

    Args:
        field: Path of the field.
        description: What was expected and what was given.
    """
    return InvalidRequest("the request cannot be sent", Details((Violation(field, description),)))


_ERROR_TYPES: dict[grpc.StatusCode, type[SamovarError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: UnsupportedOperation,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


@contextmanager
def translate_rpc_errors() -> Iterator[None]:
    """Raise the errors of gRPC as SamovarError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def from_rpc(error: grpc.RpcError) -> SamovarError:
    """Return the exception for a failed call, with the details in its trailing metadata."""
    code, text = error.code(), error.details() or ""
    details = read_details(cast(Metadata, error.trailing_metadata() or ()))
    if code in _ERROR_TYPES:
        return _ERROR_TYPES[code](text or code.name, details)
    return ServerError(f"{code.name}: {text}", details)


def read_details(metadata: Metadata) -> Details:
    """Return the details in a call's trailing metadata; empty ones if they cannot be decoded."""
    raw = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    try:
        return _parse_details(status_pb2.Status.FromString(raw if isinstance(raw, bytes) else b"").details)
    except DecodeError:
        return _NO_DETAILS


def _parse_details(packed: Sequence[AnyMessage]) -> Details:
    bad_request = _unpack(packed, error_details_pb2.BadRequest())
    info = _unpack(packed, error_details_pb2.ErrorInfo())
    retry = _unpack(packed, error_details_pb2.RetryInfo())
    return Details(
        violations=tuple(Violation(entry.field, entry.description) for entry in bad_request.field_violations)
        if bad_request
        else (),
        reason=info.reason if info else "",
        metadata=dict(info.metadata) if info else {},
        retry_delay=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def _unpack(packed: Sequence[AnyMessage], message: MessageT) -> MessageT | None:
    """Return the first packed message of this type; None if there is none."""
    return message if any(entry.Unpack(message) for entry in packed) else None


def _headline(message: str, violations: tuple[Violation, ...]) -> str:
    """Return the message up to the violations, which a server repeats for clients that ignore details."""
    starts = [message.find(str(violation)) for violation in violations]
    first = min((start for start in starts if start > 0), default=len(message))
    return message[:first].rstrip(" :;\n") if first < len(message) else message
