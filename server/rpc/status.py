"""The one table from errors to gRPC's codes, and the details that go with each (AIP-193).

Knows the headers that carry them, and how little fits.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

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
UNEXPECTED = "the server met an error that it did not expect"

# gRPC carries errors in headers, of which 8 KiB are safe: the message percent-encoded, and once more within
# the details, which are a third longer there than they are. All texts together share MAX_DETAILS.
MAX_DETAILS = 4800
MAX_MESSAGE = 1000
MAX_TEXT = 200
MAX_VIOLATIONS = 12

CODES: dict[type[SamovarError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ModelNotFound: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    UnsupportedOperation: (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_SUPPORTED"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ModelFailed: (grpc.StatusCode.INTERNAL, "MODEL_FAILED"),
    Unavailable: (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE"),
}


def status_of(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The canonical code of an error, and the google.rpc.Status that goes with it.

    An error that no one foresaw is INTERNAL and says nothing of its inside.
    """
    code, reason = CODES.get(type(error), (grpc.StatusCode.INTERNAL, "UNEXPECTED"))  # type: ignore[arg-type]
    room = _DetailBudget()
    message = room.cut(str(error), MAX_MESSAGE) if isinstance(error, SamovarError) else UNEXPECTED
    details = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=_facts(error, room)),
        *_details(error, room),
    ]
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return code, status


class _DetailBudget:
    """What is left for the texts of one error."""

    def __init__(self) -> None:
        self._left = MAX_DETAILS

    @property
    def is_short(self) -> bool:
        """Whether another violation might not fit."""
        return self._left < 2 * MAX_TEXT

    def cut(self, text: str, length: int) -> str:
        """As much of a text as may be that long, and as there is room for."""
        fitting = _cut(text, min(length, self._left))
        self._left -= sum(map(_encoded_size, fitting))
        return fitting


def _facts(error: Exception, room: _DetailBudget) -> dict[str, str]:
    if isinstance(error, UnsupportedOperation):
        facts = {"model": error.model, "operation": error.operation, "supported": ",".join(error.supported)}
        facts |= {"why": error.reason} if error.reason else {}
        return {name: room.cut(fact, MAX_MESSAGE) for name, fact in facts.items()}
    return {}


def _details(error: Exception, room: _DetailBudget) -> Iterator[Message]:
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(field_violations=_field_violations(error.violations, room))
    if isinstance(error, UnsupportedOperation):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type="OPERATION",
            subject=room.cut(error.model, MAX_TEXT),
            description=room.cut(str(error), MAX_MESSAGE),
        )
        yield error_details_pb2.PreconditionFailure(violations=[violation])
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_delay * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _field_violations(
    violations: Sequence[Violation], room: _DetailBudget
) -> Iterator[error_details_pb2.BadRequest.FieldViolation]:
    for number, violation in enumerate(violations):
        if number == MAX_VIOLATIONS or room.is_short:
            more = f"and {len(violations) - number} more"
            yield error_details_pb2.BadRequest.FieldViolation(field="*", description=more)
            return
        yield error_details_pb2.BadRequest.FieldViolation(
            field=room.cut(violation.field, MAX_TEXT), description=room.cut(violation.description, MAX_TEXT)
        )


def _cut(text: str, length: int) -> str:
    """As much of a text as is that many bytes when percent-encoded."""
    # No character is less than a byte: what lies beyond need not be looked at.
    sizes = list(accumulate(map(_encoded_size, text[: length + 1])))
    if not sizes or sizes[-1] <= length:
        return text
    kept = bisect_right(sizes, length - _encoded_size(_MORE))
    return text[:kept] + _MORE if length >= _encoded_size(_MORE) else ""


def _encoded_size(character: str) -> int:
    """Bytes of a character as gRPC writes it into a header: %XX for each byte that is not plain."""
    is_plain = " " <= character <= "~" and character != "%"
    return 1 if is_plain else 3 * len(character.encode())


_MORE = "…"
