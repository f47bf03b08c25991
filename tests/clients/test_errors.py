"""Tests of errors over the wire, packed by grpc_status."""

import pickle

import grpc
import pytest

from samovar import (
    Cancelled,
    Client,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    SamovarError,
    ServerError,
    UnsupportedOperation,
    Violation,
)
from samovar.errors import Details, read_details
from tests.support.fake_server import FakeService, bad_request, overloaded, status, unsupported


def test_invalid_request_carries_every_violation(client: Client, service: FakeService) -> None:
    service.errors = [bad_request(rows="expected 1 to 10, got 11", seed="expected an integer")]
    with pytest.raises(InvalidRequest) as caught:
        client.sample("counter", 11)
    assert caught.value.violations == (
        Violation("rows", "expected 1 to 10, got 11"),
        Violation("seed", "expected an integer"),
    )
    assert caught.value.reason == "INVALID_REQUEST"
    assert str(caught.value).splitlines() == [
        "invalid request",
        "  rows: expected 1 to 10, got 11",
        "  seed: expected an integer",
    ]


def test_unsupported_operation_lists_supported_ones(client: Client, service: FakeService) -> None:
    service.errors = [unsupported("sample", "score,encode")]
    with pytest.raises(UnsupportedOperation, match="unsupported operation sample") as caught:
        client.sample("counter")
    assert caught.value.supported == ("score", "encode")


def test_operation_missing_from_description_is_not_sent(client: Client, service: FakeService) -> None:
    with pytest.raises(
        UnsupportedOperation, match="counter/2 does not support 'energy'; it supports sample"
    ) as caught:
        client.energy("counter", [1])
    assert caught.value.supported == ("sample", "score", "reconstruct", "encode", "decode", "classify")
    assert service.requests == []


def test_overloaded_has_retry_delay(client: Client, service: FakeService) -> None:
    service.errors = [overloaded()]
    with pytest.raises(Overloaded, match="1000 rows are queued") as caught:
        client.sample("counter")
    assert caught.value.retry_delay == 2.5


def test_unknown_model_raises_model_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="expected one of: counter, speaker"):
        client.sample("count")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.OUT_OF_RANGE, InvalidRequest),
        (grpc.StatusCode.CANCELLED, Cancelled),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, ServerError),
    ],
)
def test_status_code_without_details_becomes_exception(
    client: Client, service: FakeService, code: grpc.StatusCode, kind: type[SamovarError]
) -> None:
    service.errors = [status(code.value[0], "the message")]
    with pytest.raises(kind, match="the message") as caught:
        client.sample("counter")
    assert caught.value.details == Details()


def test_timeout_covers_whole_call(client: Client, service: FakeService) -> None:
    service.blocks = True
    with pytest.raises(DeadlineExceeded):
        client.sample("counter", 6, timeout=0.2)
    assert service.cancelled.wait(500)


def test_undecodable_details_are_ignored() -> None:
    assert read_details([("grpc-status-details-bin", b"\xff\xff\xff")]) == Details()


def test_error_is_equal_after_pickling(client: Client, service: FakeService) -> None:
    service.errors = [bad_request(rows="too many")]
    with pytest.raises(InvalidRequest) as caught:
        client.sample("counter")
    restored = pickle.loads(pickle.dumps(caught.value))
    assert (str(restored), restored.violations) == (str(caught.value), caught.value.violations)
