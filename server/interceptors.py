"""What surrounds every call: metrics, logging, and the one table from errors to codes."""

import asyncio
import logging
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from server.call import CallObserver
from server.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailed,
    ModelNotFound,
    OperationNotSupported,
    Overloaded,
    SamovarError,
    ServerUnavailable,
    Violation,
)

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

DOMAIN = "samovar"
UNEXPECTED = "the server met an error that it did not expect"

# gRPC carries errors in headers, of which 8 KiB are safe: the message percent-encoded, and once more within
# the details, which are a third longer there than they are. All texts together share MAX_DETAILS.
MAX_DETAILS = 4800
MAX_MESSAGE = 1000
MAX_TEXT = 200
MAX_VIOLATIONS = 12

# A call takes milliseconds at the least; one that found no room need not wait longer to look again.
RETRY_SECONDS = 0.1

CODES: dict[type[SamovarError], tuple[grpc.StatusCode, str]] = {
    InvalidRequest: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"),
    ModelNotFound: (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    OperationNotSupported: (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_SUPPORTED"),
    Overloaded: (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    ModelFailed: (grpc.StatusCode.INTERNAL, "MODEL_FAILED"),
    ServerUnavailable: (grpc.StatusCode.UNAVAILABLE, "SERVER_UNAVAILABLE"),
}


def status_of(error: Exception) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """The canonical code of an error, and the google.rpc.Status that goes with it.

    An error that no one foresaw is INTERNAL and says nothing of its inside.
    """
    code, reason = CODES.get(type(error), (grpc.StatusCode.INTERNAL, "UNEXPECTED"))  # type: ignore[arg-type]
    room = _Room()
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


class _Room:
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


def _facts(error: Exception, room: _Room) -> dict[str, str]:
    if isinstance(error, OperationNotSupported):
        facts = {"model": error.model, "operation": error.operation, "supported": ",".join(error.supported)}
        facts |= {"why": error.reason} if error.reason else {}
        return {name: room.cut(fact, MAX_MESSAGE) for name, fact in facts.items()}
    return {}


def _details(error: Exception, room: _Room) -> Iterator[Message]:
    if isinstance(error, InvalidRequest):
        yield error_details_pb2.BadRequest(field_violations=_field_violations(error.violations, room))
    if isinstance(error, OperationNotSupported):
        violation = error_details_pb2.PreconditionFailure.Violation(
            type="OPERATION",
            subject=room.cut(error.model, MAX_TEXT),
            description=room.cut(str(error), MAX_MESSAGE),
        )
        yield error_details_pb2.PreconditionFailure(violations=[violation])
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(error.retry_after * 1e9))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _field_violations(
    violations: Sequence[Violation], room: _Room
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


@dataclass
class Outcome:
    """How a call ended; OK until something else is known."""

    code: grpc.StatusCode = grpc.StatusCode.OK


@dataclass(frozen=True)
class Unreadable:
    """What stands for a request whose bytes are not the message that the method takes."""

    reason: str


def _readable(deserialize: Callable[[bytes], Message]) -> Callable[[bytes], Message | Unreadable]:
    """Inside gRPC a failure to read would be UNKNOWN and uncounted; so it is carried to the call."""

    def read(data: bytes) -> Message | Unreadable:
        try:
            return deserialize(data)
        except DecodeError as error:
            return Unreadable(str(error))

    return read


def _read(request: Message | Unreadable) -> Message:
    if isinstance(request, Unreadable):
        raise InvalidRequest([Violation("request", f"expected the method's message: {request.reason}")])
    return request


class ObservedMethods(grpc.GenericRpcHandler):
    """Counts, times, limits and logs the calls of a service, and answers their errors.

    A service is added to it as to a server, and it to the server. gRPC would ask an interceptor
    anew at each call, which costs a tenth of a small one: here every method is wrapped once. gRPC's own
    limit on calls would shut out health as well, and say nothing to metrics.
    """

    def __init__(self, observer: CallObserver, is_known_model: Callable[[str], bool], max_calls: int) -> None:
        self._observer = observer
        self._is_known_model = is_known_model
        self._max_calls = max_calls
        self._num_calls = 0
        self._handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Take the methods of a service."""
        self._handlers |= {f"/{service}/{name}": self._observing(handlers[name], name) for name in handlers}

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """The same methods, as generated code tells them again."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler of a method; None for one that is not of the service."""
        return self._handlers.get(handler_call_details.method)

    def _observing(self, handler: Any, method: str) -> Any:
        wrap, make = (
            (self._streaming, grpc.unary_stream_rpc_method_handler)
            if handler.response_streaming
            else (self._unary, grpc.unary_unary_rpc_method_handler)
        )
        behaviour = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(
            wrap(behaviour, method),
            request_deserializer=_readable(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, behaviour: Any, method: str) -> Any:
        async def call(request: Message | Unreadable, context: Context) -> Message:
            with self._observed(method, request, context) as outcome:
                try:
                    response: Message = await behaviour(self._admitted(request), context)
                except Exception as error:
                    await _abort(error, method, context, outcome)
                return response

        return call

    def _streaming(self, behaviour: Any, method: str) -> Any:
        async def call(request: Message | Unreadable, context: Context) -> AsyncIterator[Message]:
            with self._observed(method, request, context) as outcome:
                try:
                    async with aclosing(behaviour(self._admitted(request), context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(error, method, context, outcome)

        return call

    @contextmanager
    def _observed(self, method: str, request: Message | Unreadable, context: Context) -> Iterator[Outcome]:
        outcome, start = Outcome(), time.monotonic()
        model = self._model_label(request)
        self._num_calls += 1
        self._observer.began()
        try:
            yield outcome
        except (asyncio.CancelledError, GeneratorExit):
            remaining = context.time_remaining()
            # The deadline's own cancellation may arrive a moment before the clock agrees.
            is_late = remaining is not None and remaining < 0.1
            outcome.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
            raise
        finally:
            seconds = time.monotonic() - start
            self._num_calls -= 1
            self._observer.ended(method, model, outcome.code.name, seconds)
            log.debug("%s %s %s %.1f ms", method, model, outcome.code.name, 1000 * seconds)

    def _admitted(self, request: Message | Unreadable) -> Message:
        """The message of a call that there is room for."""
        if self._num_calls > self._max_calls:
            reason = f"{self._max_calls} calls are in flight, which is the limit"
            raise Overloaded(f"{reason}; try again in {RETRY_SECONDS:g} s", RETRY_SECONDS)
        return _read(request)

    def _model_label(self, request: Any) -> str:
        name: str = getattr(getattr(request, "model", None), "name", "")
        return name if self._is_known_model(name) else ""


async def _abort(error: Exception, method: str, context: Context, outcome: Outcome) -> NoReturn:
    outcome.code, status = status_of(error)
    if not isinstance(error, SamovarError):
        log.error("%s met an error that it did not expect", method, exc_info=error)
    await context.abort(
        outcome.code, status.message, (("grpc-status-details-bin", status.SerializeToString()),)
    )
