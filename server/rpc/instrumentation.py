"""Instrumentation of calls: metrics, logs, the limit on concurrent calls, and status codes of errors."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc
from google.protobuf.message import DecodeError, Message

from server.core.errors import InvalidRequest, Overloaded, SamovarError, Violation
from server.rpc.status import status_of

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]

# Retry delay of calls above the limit. Calls take a few milliseconds or more.
RETRY_SECONDS = 0.1
# A call that gRPC cancels with less time than this remaining has reached its deadline.
DEADLINE_TOLERANCE_SECONDS = 0.1


class CallObserver(Protocol):
    """Callbacks for calls, invoked on the event loop."""

    def on_call_start(self) -> None:
        """A call arrived."""

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """A call ended.

        Args:
            method: name of the RPC.
            model: name of the model if it is served, or "".
            code: name of the status code.
            seconds: time since the call arrived.
        """


@dataclass(frozen=True)
class UndecodableRequest:
    """Stands for a request that could not be decoded; `reason` is protobuf's error."""

    reason: str


class InstrumentedHandler(grpc.GenericRpcHandler):
    """Generic handler that wraps each method of a service once.

    The service is added to the handler, and the handler to the server. An interceptor would be called
    for each call, which costs a tenth of a small call. gRPC's own limit on concurrent calls would also
    reject health checks, and rejected calls would be missing from the metrics.

    Args:
        observer: receives the start and the end of each call.
        is_known_model: whether a name is that of a served model; only those become metric labels.
        max_calls: largest number of concurrent calls; beyond it, RESOURCE_EXHAUSTED.
    """

    def __init__(self, observer: CallObserver, is_known_model: Callable[[str], bool], max_calls: int) -> None:
        self._observer = observer
        self._is_known_model = is_known_model
        self._max_calls = max_calls
        self._num_calls = 0
        self._handlers: dict[str, Any] = {}

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Wrap the methods of a service."""
        for name, handler in handlers.items():
            self._handlers[f"/{service}/{name}"] = self._wrap(handler, name)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Ignore generic handlers: generated code registers the same methods twice."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return the handler of a method, or None if the service lacks it."""
        return self._handlers.get(handler_call_details.method)

    def start_call(self) -> None:
        """Count a call that arrived."""
        self._num_calls += 1
        self._observer.on_call_start()

    def end_call(self, call: "_CallRecord", seconds: float) -> None:
        """Record a call that ended after `seconds`."""
        self._num_calls -= 1
        model = call.model if self._is_known_model(call.model) else ""
        self._observer.on_call_end(call.method, model, call.code.name, seconds)
        log.debug("%s %s %s %.1f ms", call.method, model, call.code.name, 1000 * seconds)

    def _wrap(self, handler: Any, method: str) -> Any:
        if handler.response_streaming:
            make_handler = grpc.unary_stream_rpc_method_handler
            implementation = self._wrap_streaming(handler.unary_stream, method)
        else:
            make_handler = grpc.unary_unary_rpc_method_handler
            implementation = self._wrap_unary(handler.unary_unary, method)
        return make_handler(
            implementation,
            request_deserializer=_catch_decode_errors(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )

    def _wrap_unary(self, implementation: Any, method: str) -> Any:
        async def instrumented(request: Message | UndecodableRequest, context: Context) -> Message:
            with _CallRecord(self, method, request, context) as call:
                try:
                    response: Message = await implementation(self._check(request), context)
                except Exception as error:
                    await _abort(error, context, call)
                return response

        return instrumented

    def _wrap_streaming(self, implementation: Any, method: str) -> Any:
        async def instrumented(
            request: Message | UndecodableRequest, context: Context
        ) -> AsyncIterator[Message]:
            with _CallRecord(self, method, request, context) as call:
                try:
                    async with aclosing(implementation(self._check(request), context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(error, context, call)

        return instrumented

    def _check(self, request: Message | UndecodableRequest) -> Message:
        """Return the message of a call; raise if there are too many calls or it could not be decoded."""
        if self._num_calls > self._max_calls:
            raise Overloaded(
                f"the limit of {self._max_calls} concurrent calls is reached; retry in {RETRY_SECONDS:g} s",
                RETRY_SECONDS,
            )
        if isinstance(request, UndecodableRequest):
            raise InvalidRequest(
                [Violation("request", f"expected the message of the method, got bytes: {request.reason}")]
            )
        return request


class _CallRecord:
    """Context manager for the duration of a call; `code` is OK unless an error sets it.

    A class instead of a generator, which would cost each call 3 microseconds more.
    """

    def __init__(
        self,
        handler: InstrumentedHandler,
        method: str,
        request: Message | UndecodableRequest,
        context: Context,
    ) -> None:
        self.method = method
        self.model: str = getattr(getattr(request, "model", None), "name", "")
        self.code = grpc.StatusCode.OK
        self._handler = handler
        self._context = context
        self._start = time.monotonic()

    def __enter__(self) -> "_CallRecord":
        self._handler.start_call()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit):
            remaining = self._context.time_remaining()
            is_late = remaining is not None and remaining < DEADLINE_TOLERANCE_SECONDS
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        self._handler.end_call(self, time.monotonic() - self._start)


def _catch_decode_errors(
    deserialize: Callable[[bytes], Message],
) -> Callable[[bytes], Message | UndecodableRequest]:
    """Return a deserializer that does not raise: gRPC would report UNKNOWN, and not count the call."""

    def deserialize_or_wrap(data: bytes) -> Message | UndecodableRequest:
        try:
            return deserialize(data)
        except DecodeError as error:
            return UndecodableRequest(str(error))

    return deserialize_or_wrap


async def _abort(error: Exception, context: Context, call: _CallRecord) -> NoReturn:
    """End a call with the status of an error."""
    call.code, status = status_of(error)
    if not isinstance(error, SamovarError):
        log.error("unexpected error in %s", call.method, exc_info=error)
    await context.abort(call.code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))
