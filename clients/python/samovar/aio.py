"""The same client over asyncio. Knows gRPC's channel; what it says and hears is in messages.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, Self, TypeVar, Unpack

import grpc
import grpc.aio
from numpy.typing import ArrayLike

from samovar._channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, DEFAULT_TIMEOUT, ChannelOptions, Deadline
from samovar._inputs import Inputs
from samovar._manifest import read_model
from samovar._messages import (
    Call,
    CallOptions,
    Selector,
    StreamReader,
    read_scores,
    read_server_info,
    read_transform,
    sample_request,
    settle,
    transform_requests,
)
from samovar._model_cache import ModelCache
from samovar.errors import Cancelled, translate_rpc_errors
from samovar.model import Model, Operation
from samovar.result import (
    Event,
    InOrder,
    R,
    Result,
    RowCollector,
    RunInfo,
    Scores,
    ServerInfo,
    Timings,
    merge,
    merge_scores,
)
from samovar.v1 import inference_pb2
from samovar.v1.inference_pb2_grpc import InferenceStub

Request = TypeVar("Request")
Response = TypeVar("Response")


class AsyncClient:
    """A connection to a Samovar server, for use by any number of tasks of one event loop.

    address: "host:port", or any name that gRPC resolves; its addresses take turns.
    timeout: seconds for a whole call, unless the call says otherwise; None for no limit.
    credentials: from grpc.ssl_channel_credentials; without them the connection is plain.
    options: further gRPC channel options.

    Calls raise what samovar.errors draws. What fails to reach a server is retried.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        credentials: grpc.ChannelCredentials | None = None,
        options: ChannelOptions = (),
    ) -> None:
        options = (*CHANNEL_OPTIONS, *options)
        self._channel = (
            grpc.aio.secure_channel(address, credentials, options)
            if credentials
            else grpc.aio.insecure_channel(address, options)
        )
        self._stub = InferenceStub(self._channel)
        self._timeout = timeout
        self._catalog = ModelCache()

    async def models(self) -> tuple[Model, ...]:
        """All models and versions that the server holds."""
        deadline, models = Deadline(self._timeout), list[Model]()
        request = inference_pb2.ListModelsRequest()
        while True:
            page = await self._unary(self._stub.ListModels, request, deadline)
            models.extend(map(read_model, page.models))
            if not page.next_page_token:
                return tuple(models)
            request = inference_pb2.ListModelsRequest(page_token=page.next_page_token)

    async def model(self, name: str, version: str = "", format: str = "") -> Model:
        """One model: what it can do, with which parameters, and how good it is."""
        return await self._describe(Selector(name, version, format), Deadline(self._timeout))

    async def server_info(self) -> ServerInfo:
        """What serves, and within which limits."""
        return await self._info(Deadline(self._timeout))

    async def sample(
        self,
        model: str,
        rows: int = 1,
        *,
        inputs: Mapping[str, ArrayLike] | None = None,
        **options: Unpack[CallOptions],
    ) -> Result:
        """Draw rows. `inputs` are those that the program declares: a prompt, a mask, a class label."""
        async with self.stream(model, rows, inputs=inputs, **options) as stream:
            canvas = RowCollector(rows, options.get("first_row", 0))
            async for event in stream:
                canvas.place(event)
            return Result(canvas.complete(), stream.run, stream.timings)

    def stream(
        self,
        model: str,
        rows: int = 1,
        *,
        inputs: Mapping[str, ArrayLike] | None = None,
        preview_every: int = 0,
        ordered: bool = False,
        **options: Unpack[CallOptions],
    ) -> AsyncSampleStream:
        """Draw rows and hear of each as it finishes; of unfinished ones too, each `preview_every` steps.

        With `ordered`, finished rows come by their indices: one that is done waits for those before it, and
        does not come when one of those fails.
        """
        call, deadline = settle(model, options), self._deadline(options)
        request = partial(sample_request, call, rows, inputs or {}, preview_every)
        begin = partial(self._begin, request, call, deadline)
        reader = StreamReader(InOrder(call.first_row) if ordered else None)
        return AsyncSampleStream(begin, reader, self._catalog, call.selector)

    async def reconstruct(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Send rows through the model and back."""
        return merge(await self._parts("reconstruct", read_transform, model, inputs, options))

    async def energy(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Unnormalised energies: lower means likelier, within one artifact."""
        return merge(await self._parts("energy", read_transform, model, inputs, options))

    async def encode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map rows to their latents or features."""
        return merge(await self._parts("encode", read_transform, model, inputs, options))

    async def decode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map latents to rows."""
        return merge(await self._parts("decode", read_transform, model, inputs, options))

    async def classify(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Class probabilities of rows."""
        return merge(await self._parts("classify", read_transform, model, inputs, options))

    async def score(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Scores:
        """Log-densities of rows in nats, or what the model can truthfully say of them."""
        return merge_scores(await self._parts("score", read_scores, model, inputs, options))

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _parts(
        self, name: str, read: Callable[[Any, Operation], R], model: str, inputs: Inputs, options: CallOptions
    ) -> list[R]:
        call, deadline = settle(model, options), self._deadline(options)
        rpc = getattr(self._stub, name.capitalize())
        with self._catalog.trusting(call.selector):
            described = await self._known(call.selector, deadline)
            operation = described.operation(name, call.variant)
            requests = transform_requests(call, inputs, operation, described, await self._limits(deadline))
            parts = [read(await self._unary(rpc, request, deadline), operation) for request in requests]
        self._catalog.confirm(call.selector, parts[0].run)
        return parts

    async def _begin(
        self,
        request: Callable[[Operation], inference_pb2.SampleRequest],
        call: Call,
        deadline: Deadline,
    ) -> tuple[Responses, Operation]:
        operation = (await self._known(call.selector, deadline)).operation("sample", call.variant)
        responses = self._stub.Sample(request(operation), timeout=deadline.remaining())
        return responses, operation

    async def _known(self, selector: Selector, deadline: Deadline) -> Model:
        known = self._catalog.models.get(selector)
        return known or await self._describe(selector, deadline)

    async def _describe(self, selector: Selector, deadline: Deadline) -> Model:
        request = inference_pb2.GetModelRequest(model=selector.message())
        model = read_model(await self._unary(self._stub.GetModel, request, deadline))
        self._catalog.models[selector] = model
        return model

    async def _limits(self, deadline: Deadline) -> ServerInfo:
        return self._catalog.limits or await self._info(deadline)

    async def _info(self, deadline: Deadline) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        info = read_server_info(await self._unary(self._stub.GetServerInfo, request, deadline))
        self._catalog.limits = info
        return info

    async def _unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Response],
        request: Request,
        deadline: Deadline,
    ) -> Response:
        with translate_rpc_errors():
            return await method(request, timeout=deadline.remaining())

    def _deadline(self, options: CallOptions) -> Deadline:
        return Deadline(options.get("timeout", self._timeout))


class Responses(Protocol):
    """A server stream that can be cancelled."""

    def __aiter__(self) -> AsyncIterator[inference_pb2.SampleResponse]: ...

    def cancel(self) -> object: ...


class AsyncSampleStream(AsyncIterator[Event]):
    """Rows as they finish, and previews of those on the way.

    The call begins with the first event that is asked for. Leaving the stream's
    `async with` block cancels the rest.
    """

    def __init__(
        self,
        begin: Callable[[], Awaitable[tuple[Responses, Operation]]],
        reader: StreamReader,
        catalog: ModelCache,
        selector: Selector,
    ) -> None:
        self._begin = begin
        self._catalog = catalog
        self._selector = selector
        self._responses: Responses | None = None
        self._reader = reader
        self._cancelled = False
        self._events = self._read()

    @property
    def run(self) -> RunInfo:
        """What answers; known from the first event on."""
        return self._reader.run

    @property
    def timings(self) -> Timings:
        """Where the time went; known after the last event."""
        return self._reader.timings

    def cancel(self) -> None:
        """Stop the server's work on the rows that are not finished."""
        self._cancelled = True
        if self._responses:
            self._responses.cancel()

    async def __anext__(self) -> Event:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cancel()

    async def _read(self) -> AsyncIterator[Event]:
        with self._catalog.trusting(self._selector), translate_rpc_errors(), self._own_cancellation():
            self._responses, operation = await self._begin()
            if self._cancelled:
                self._responses.cancel()
            async for response in self._responses:
                for event in self._reader.events(response, operation):
                    yield event
        self._catalog.confirm(self._selector, self.run)

    @contextmanager
    def _own_cancellation(self) -> Iterator[None]:
        """gRPC raises CancelledError for a cancelled call, as asyncio does for a cancelled task."""
        try:
            yield
        except asyncio.CancelledError:
            if not self._cancelled:
                raise
            raise Cancelled("the stream was cancelled") from None
