"""What can go wrong with a call, for the person who meets it. Knows status codes and their details.

SamovarError
├── InvalidRequest          change the request: `violations` lists everything that is wrong
├── UnsupportedOperation    the model has no such operation: `supported` lists those it has
├── ModelNotFound           no such model, version or format is served
├── Overloaded              the server is full: come back after `retry_delay` seconds
├── DeadlineExceeded        the timeout passed: give more time, or ask for fewer rows or steps
├── Cancelled               somebody cancelled the call
├── Unavailable             no server answers: it is down, starting, stopping, or elsewhere
└── ServerError             the server failed; the request is not to blame
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message

from samovar.v1 import errors_pb2

_DETAILS_KEY = "grpc-status-details-bin"

Metadata = Iterable[tuple[str, str | bytes]]
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request: where, what was expected and what was given."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}"


@dataclass(frozen=True)
class Details:
    """What an error says besides its message; `facts` are the metadata of its ErrorInfo."""

    violations: tuple[Violation, ...] = ()
    reason: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    retry_delay: float | None = None


_NO_DETAILS = Details()


class SamovarError(Exception):
    """The root. `reason` is the server's constant for the cause, "" when it gave none."""

    def __init__(self, message: str, details: Details = _NO_DETAILS) -> None:
        super().__init__(message, details)
        self.message = message
        self.details = details

    @property
    def reason(self) -> str:
        return self.details.reason

    def __str__(self) -> str:
        return self.message


class InvalidRequest(SamovarError, ValueError):
    """The request cannot be answered as it is; raised by the client too, before anything is sent."""

    @property
    def violations(self) -> tuple[Violation, ...]:
        return self.details.violations

    def __str__(self) -> str:
        return "\n".join(
            [_headline(self.message, self.violations), *(f"  {each}" for each in self.violations)]
        )


class UnsupportedOperation(SamovarError):
    """The model has no program for the operation."""

    @property
    def supported(self) -> tuple[str, ...]:
        return tuple(filter(None, self.details.facts.get("supported", "").split(",")))


class ModelNotFound(SamovarError):
    """No such model, version or format is served."""


class Overloaded(SamovarError):
    """Too many rows wait at the server, or the request is larger than it accepts."""

    @property
    def retry_delay(self) -> float | None:
        """Seconds after which to try again, when the server names them."""
        return self.details.retry_delay


class DeadlineExceeded(SamovarError):
    """The timeout passed before the answer was complete."""


class Cancelled(SamovarError):
    """The call was cancelled, here or on the way."""


class Unavailable(SamovarError):
    """No server answers at the address, also after the retries."""


class ServerError(SamovarError):
    """The server failed, or answered what its contract does not allow."""


def invalid_request(field: str, description: str) -> InvalidRequest:
    """The error for a request that the client can tell to be wrong."""
    return InvalidRequest("the request cannot be sent", Details((Violation(field, description),)))


_BY_CODE: dict[grpc.StatusCode, type[SamovarError]] = {
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
    """Raise a failed call as a SamovarError."""
    try:
        yield
    except grpc.RpcError as error:
        raise from_rpc(error) from error


def from_rpc(error: grpc.RpcError) -> SamovarError:
    """The exception for a failed call, with all that its trailing metadata says."""
    code, text = error.code(), error.details() or ""
    details = read_details(cast(Metadata, error.trailing_metadata() or ()))
    if code in _BY_CODE:
        return _BY_CODE[code](text or code.name, details)
    return ServerError(f"{code.name}: {text}", details)


def read_details(metadata: Metadata) -> Details:
    """The details that a status carries; unreadable ones count as none."""
    raw = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    try:
        details = errors_pb2.Status.FromString(raw if isinstance(raw, bytes) else b"").details
        return _details(details)
    except DecodeError:
        return _NO_DETAILS


def _details(packed: Iterable[AnyMessage]) -> Details:
    packed = list(packed)
    bad_request = _find(packed, errors_pb2.BadRequest)
    info = _find(packed, errors_pb2.ErrorInfo) or errors_pb2.ErrorInfo()
    retry = _find(packed, errors_pb2.RetryInfo)
    violations = bad_request.field_violations if bad_request else ()
    return Details(
        violations=tuple(Violation(each.field, each.description) for each in violations),
        reason=info.reason,
        facts=dict(info.metadata),
        retry_delay=retry.retry_delay.ToTimedelta().total_seconds() if retry else None,
    )


def _find(packed: list[AnyMessage], kind: type[M]) -> M | None:
    # By name, not by Any.Is: the server packs google.rpc's messages, ours mirror them.
    name = f"google.rpc.{kind.DESCRIPTOR.name}"
    return next((kind.FromString(each.value) for each in packed if each.TypeName() == name), None)


def _headline(message: str, violations: tuple[Violation, ...]) -> str:
    """The message up to the violations: a server may repeat them for clients that read no details."""
    starts = [message.find(str(each)) for each in violations]
    first = min((start for start in starts if start > 0), default=len(message))
    return message[:first].rstrip(" :;\n") if first < len(message) else message
