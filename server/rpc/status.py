"""Status codes and details of errors (google.rpc.Status, https://google.aip.dev/193)."""

from collections.abc import Iterator, Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from server.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    Overloaded,
    SamovarError,
    Unavailable,
    UnsupportedOperation,
    Violation,
)

DOMAIN = "samovar"
UNEXPECTED = "internal server error"

# Errors are sent in headers, which must not exceed 8 KiB. The message is sent twice: percent-encoded
# (up to 3 bytes for each byte), and within the details, which base64 makes a third longer. With these limits,
# in bytes of UTF-8, the largest error needs less than 8 KiB.
MAX_MESSAGE_BYTES = 700
MAX_TEXT_BYTES = 240
MAX_FIELD_BYTES = 80
MAX_VIOLATIONS = 10
ELLIPSIS = "…"

CODES: dict[type[SamovarError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ModelNotFound: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    UnsupportedOperation: (grpc.StatusCode.FAILED_PRECONDITION, "UNSUPPORTED_OPERATION"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ModelFailed: (grpc.StatusCode.INTERNAL, "MODEL_FAILED"),
    Unavailable: (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
}


def status_of(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """Convert an error to a status.

    Args:
        error: any exception; one that is no SamovarError becomes INTERNAL, and its text is withheld.

    Returns:
        The status code, and the status with details that fit into headers; longer texts are truncated.
    """
    code, reason = CODES.get(type(error), (grpc.StatusCode.INTERNAL, "UNEXPECTED"))  # type: ignore[arg-type]
    message = _truncate(str(error), MAX_MESSAGE_BYTES) if isinstance(error, SamovarError) else UNEXPECTED
    status = status_pb2.Status(code=code.value[0], message=message)
    info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=_metadata(error))
    for detail in (info, *_details(error)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return code, status


def _metadata(error: Exception) -> dict[str, str]:
    """Return the values of an error that clients may read."""
    if not isinstance(error, UnsupportedOperation):
        return {}
    metadata = {
        "model": _truncate(error.model, MAX_TEXT_BYTES),
        "operation": _truncate(error.operation, MAX_TEXT_BYTES),
        "supported": _truncate(",".join(error.supported), MAX_MESSAGE_BYTES),
    }
    if error.reason:
        metadata["why"] = _truncate(error.reason, MAX_MESSAGE_BYTES)
    return metadata


def _details(error: Exception) -> Iterator[Message]:
    """Yield the standard details for a type of error, besides ErrorInfo."""
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(field_violations=_field_violations(error.violations))
    if isinstance(error, UnsupportedOperation):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type="OPERATION",
            subject=_truncate(error.model, MAX_TEXT_BYTES),
            description=_truncate(str(error), MAX_MESSAGE_BYTES),
        )
        yield error_details_pb2.PreconditionFailure(violations=[violation])
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _field_violations(
    violations: Sequence[Violation],
) -> Iterator[error_details_pb2.BadRequest.FieldViolation]:
    """Yield the first violations, and the number of those left out with the field "*"."""
    for violation in violations[:MAX_VIOLATIONS]:
        yield error_details_pb2.BadRequest.FieldViolation(
            field=_truncate(violation.field, MAX_FIELD_BYTES),
            description=_truncate(violation.description, MAX_TEXT_BYTES),
        )
    if (num_omitted := len(violations) - MAX_VIOLATIONS) > 0:
        yield error_details_pb2.BadRequest.FieldViolation(field="*", description=f"and {num_omitted} more")


def _truncate(text: str, max_bytes: int) -> str:
    """Return the start of a text that fits into `max_bytes` of UTF-8, with an ellipsis if it is cut."""
    encoded = text[: max_bytes + 1].encode()
    if len(encoded) <= max_bytes:
        return text
    return encoded[: max_bytes - len(ELLIPSIS.encode())].decode(errors="ignore") + ELLIPSIS
