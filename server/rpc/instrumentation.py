"""What surrounds every call: metrics, logging, the limit on calls, and an answer to each error."""

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

# A call takes milliseconds at the least; one that found no room need not wait longer to look again.
RETRY_SECONDS = 0.1


class CallObserver(Protocol):
    """Callbacks for calls, invoked on the event loop."""

    def on_call_start(self) -> None:
        """A call arrived."""

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """A call of RPC `method` ended with a status code; `model` is a served one, or empty."""


@dataclass(frozen=True)
class UndecodableRequest:
    """What stands for a request whose bytes are not the message that the method takes."""

    reason: str


def _readable(deserialize: Callable[[bytes], Message]) -> Callable[[bytes], Message | UndecodableRequest]:
    """Inside gRPC a failure to read would be UNKNOWN and uncounted; so it is carried to the call."""

    def read(data: bytes) -> Message | UndecodableRequest:
        try:
            return deserialize(data)
        except DecodeError as error:
            return UndecodableRequest(str(error))

    return read


def _read(request: Message | UndecodableRequest) -> Message:
    if isinstance(request, UndecodableRequest):
        raise InvalidRequest([Violation("request", f"expected the method's message: {request.reason}")])
    return request


class InstrumentedHandler(grpc.GenericRpcHandler):
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
        async def observed(request: Message | UndecodableRequest, context: Context) -> Message:
            with _CallRecord(self, method, request, context) as call:
                try:
                    response: Message = await behaviour(self._admitted(request), context)
                except Exception as error:
                    await _abort(error, context, call)
                return response

        return observed

    def _streaming(self, behaviour: Any, method: str) -> Any:
        async def observed(request: Message | UndecodableRequest, context: Context) -> AsyncIterator[Message]:
            with _CallRecord(self, method, request, context) as call:
                try:
                    async with aclosing(behaviour(self._admitted(request), context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(error, context, call)

        return observed

    def began(self) -> None:
        """A call has come in."""
        self._num_calls += 1
        self._observer.on_call_start()

    def ended(self, call: "_CallRecord", seconds: float) -> None:
        """A call has ended, after so long."""
        self._num_calls -= 1
        model = call.model if self._is_known_model(call.model) else ""
        self._observer.on_call_end(call.method, model, call.code.name, seconds)
        log.debug("%s %s %s %.1f ms", call.method, model, call.code.name, 1000 * seconds)

    def _admitted(self, request: Message | UndecodableRequest) -> Message:
        """The message of a call that there is room for."""
        if self._num_calls > self._max_calls:
            reason = f"{self._max_calls} calls are in flight, which is the limit"
            raise Overloaded(f"{reason}; try again in {RETRY_SECONDS:g} s", RETRY_SECONDS)
        return _read(request)


class _CallRecord:
    """A call from its arrival to its end, as a context manager; OK until something else is known.

    A class, because a generator would cost every call three microseconds more.
    """

    def __init__(
        self,
        methods: InstrumentedHandler,
        method: str,
        request: Message | UndecodableRequest,
        context: Context,
    ) -> None:
        self.method = method
        self.model: str = getattr(getattr(request, "model", None), "name", "")
        self.code = grpc.StatusCode.OK
        self._methods, self._context = methods, context
        self._start = time.monotonic()

    def __enter__(self) -> "_CallRecord":
        self._methods.began()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and issubclass(kind, asyncio.CancelledError | GeneratorExit):
            remaining = self._context.time_remaining()
            # The deadline's own cancellation may arrive a moment before the clock agrees.
            is_late = remaining is not None and remaining < 0.1
            self.code = grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED
        self._methods.ended(self, time.monotonic() - self._start)


async def _abort(error: Exception, context: Context, call: _CallRecord) -> NoReturn:
    call.code, status = status_of(error)
    if not isinstance(error, SamovarError):
        log.error("%s met an error that it did not expect", call.method, exc_info=error)
    await context.abort(call.code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))
