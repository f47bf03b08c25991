"""Statuses of errors: codes, and texts that fit into headers."""

import base64

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server.core.errors import (
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    Overloaded,
    UnsupportedOperation,
    Violation,
)
from server.rpc.status import status_of

MAX_METADATA_BYTES = 8192
# Headers besides the two below, each with the 32 bytes that HTTP/2 adds.
OTHER_HEADER_BYTES = 300
CHARACTERS = ["x", "%", "é", "\N{HOT BEVERAGE}", "\N{GRINNING FACE}"]


def header_bytes(status: status_pb2.Status) -> int:
    """Return the size of a status in headers: percent-encoded message and base64-encoded details."""
    message = sum(
        1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        for character in status.message
    )
    return message + len(base64.b64encode(status.SerializeToString())) + OTHER_HEADER_BYTES


@pytest.mark.parametrize("character", CHARACTERS)
def test_largest_errors_fit_into_headers(character: str) -> None:
    text = character * 10_000
    errors = [
        InvalidRequest([Violation(text, text)] * 1000),
        UnsupportedOperation(text, text, [text] * 3, text),
        ModelNotFound(text),
        Overloaded(text, 0.1),
        ModelFailed(text),
    ]
    for error in errors:
        _, status = status_of(error)
        assert header_bytes(status) <= MAX_METADATA_BYTES
        assert status.message.endswith("…")


def test_omitted_violations_are_counted() -> None:
    _, status = status_of(InvalidRequest([Violation(f"field{index}", "wrong") for index in range(25)]))
    bad_request = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad_request)
    *listed, last = bad_request.field_violations
    assert [violation.field for violation in listed] == [f"field{index}" for index in range(len(listed))]
    assert (last.field, last.description) == ("*", f"and {25 - len(listed)} more")


def test_short_texts_are_not_truncated() -> None:
    _, status = status_of(InvalidRequest([Violation("rows", "é" * 120)]))
    bad_request = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad_request)
    assert [violation.description for violation in bad_request.field_violations] == ["é" * 120]
    assert status.message == f"invalid request: rows: {'é' * 120}"


def test_unexpected_error_is_internal_and_hides_its_text() -> None:
    code, status = status_of(ValueError("secret"))
    assert code == grpc.StatusCode.INTERNAL
    assert status.message == "internal server error"
    assert b"secret" not in status.SerializeToString()
