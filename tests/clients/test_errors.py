"""Errors over a real wire: packed by google.rpc and grpc_status, read with the client's own messages."""

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
from tests.support.fake_server import Counting, bad_request, overloaded, status, unsupported


def test_an_invalid_request_carries_every_violation(client: Client, service: Counting) -> None:
    service.refusals = [bad_request(rows="expected 1 to 10, got 11", seed="expected an integer")]
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


def test_an_unsupported_operation_names_those_there_are(client: Client, service: Counting) -> None:
    service.refusals = [unsupported("sample", "score,encode")]
    with pytest.raises(UnsupportedOperation, match="no operation sample") as caught:
        client.sample("counter")
    assert caught.value.supported == ("score", "encode")


def test_an_operation_that_the_description_lacks_is_not_even_sent(client: Client, service: Counting) -> None:
    with pytest.raises(UnsupportedOperation, match="counter 2 has no operation energy") as caught:
        client.energy("counter", [1])
    assert caught.value.supported == ("sample", "score", "reconstruct", "encode", "decode", "classify")
    assert service.requests == []


def test_overload_says_when_to_come_back(client: Client, service: Counting) -> None:
    service.refusals = [overloaded()]
    with pytest.raises(Overloaded, match="1000 rows wait") as caught:
        client.sample("counter")
    assert caught.value.retry_delay == 2.5


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="there are: counter, speaker"):
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
def test_codes_become_exceptions_without_any_details(
    client: Client, service: Counting, code: grpc.StatusCode, kind: type[SamovarError]
) -> None:
    service.refusals = [status(code.value[0], "so it is")]
    with pytest.raises(kind, match="so it is") as caught:
        client.sample("counter")
    assert caught.value.details == Details()


def test_a_deadline_covers_the_whole_call(client: Client, service: Counting) -> None:
    service.holds = True
    with pytest.raises(DeadlineExceeded):
        client.sample("counter", 6, timeout=0.2)
    assert service.cancelled.wait(10)


def test_unreadable_details_do_not_hide_the_error() -> None:
    assert read_details([("grpc-status-details-bin", b"\xff\xff\xff")]) == Details()


def test_errors_survive_a_process_boundary(client: Client, service: Counting) -> None:
    service.refusals = [bad_request(rows="too many")]
    with pytest.raises(InvalidRequest) as caught:
        client.sample("counter")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.violations) == (str(caught.value), caught.value.violations)
