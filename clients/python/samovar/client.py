"""The blocking client. Knows gRPC's channel; what it says and hears is in messages.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar, Unpack

import grpc
from numpy.typing import ArrayLike

from samovar._channel import CHANNEL_OPTIONS, DEFAULT_ADDRESS, DEFAULT_TIMEOUT, ChannelOptions, Deadline
from samovar._inputs import Inputs
from samovar._manifest import read_model
from samovar._messages import (
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
from samovar.errors import translate_rpc_errors
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


class Client:
    """A connection to a Samovar server, for use by any number of threads.

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
            grpc.secure_channel(address, credentials, options)
            if credentials
            else grpc.insecure_channel(address, options)
        )
        self._stub = InferenceStub(self._channel)
        self._timeout = timeout
        self._catalog = ModelCache()

    def models(self) -> tuple[Model, ...]:
        """All models and versions that the server holds."""
        deadline, models = Deadline(self._timeout), list[Model]()
        request = inference_pb2.ListModelsRequest()
        while True:
            page = self._unary(self._stub.ListModels, request, deadline)
            models.extend(map(read_model, page.models))
            if not page.next_page_token:
                return tuple(models)
            request = inference_pb2.ListModelsRequest(page_token=page.next_page_token)

    def model(self, name: str, version: str = "", format: str = "") -> Model:
        """One model: what it can do, with which parameters, and how good it is."""
        return self._describe(Selector(name, version, format), Deadline(self._timeout))

    def server_info(self) -> ServerInfo:
        """What serves, and within which limits."""
        return self._info(Deadline(self._timeout))

    def sample(
        self,
        model: str,
        rows: int = 1,
        *,
        inputs: Mapping[str, ArrayLike] | None = None,
        **options: Unpack[CallOptions],
    ) -> Result:
        """Draw rows. `inputs` are those that the program declares: a prompt, a mask, a class label."""
        with self.stream(model, rows, inputs=inputs, **options) as stream:
            canvas = RowCollector(rows, options.get("first_row", 0))
            for event in stream:
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
    ) -> SampleStream:
        """Draw rows and hear of each as it finishes; of unfinished ones too, each `preview_every` steps.

        With `ordered`, finished rows come by their indices: one that is done waits for those before it, and
        does not come when one of those fails.
        """
        call, deadline = settle(model, options), self._deadline(options)
        with self._catalog.trusting(call.selector):
            described = self._known(call.selector, deadline)
            operation = described.operation("sample", call.variant)
            request = sample_request(call, rows, inputs or {}, preview_every, operation)
            responses = self._stub.Sample(request, timeout=deadline.remaining())
        reader = StreamReader(InOrder(call.first_row) if ordered else None)
        return SampleStream(responses, operation, reader, self._catalog, call.selector)

    def reconstruct(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Send rows through the model and back."""
        return merge(self._parts("reconstruct", read_transform, model, inputs, options))

    def energy(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Unnormalised energies: lower means likelier, within one artifact."""
        return merge(self._parts("energy", read_transform, model, inputs, options))

    def encode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map rows to their latents or features."""
        return merge(self._parts("encode", read_transform, model, inputs, options))

    def decode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map latents to rows."""
        return merge(self._parts("decode", read_transform, model, inputs, options))

    def classify(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Class probabilities of rows."""
        return merge(self._parts("classify", read_transform, model, inputs, options))

    def score(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Scores:
        """Log-densities of rows in nats, or what the model can truthfully say of them."""
        return merge_scores(self._parts("score", read_scores, model, inputs, options))

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parts(
        self, name: str, read: Callable[[Any, Operation], R], model: str, inputs: Inputs, options: CallOptions
    ) -> list[R]:
        call, deadline = settle(model, options), self._deadline(options)
        rpc = getattr(self._stub, name.capitalize())
        with self._catalog.trusting(call.selector):
            described = self._known(call.selector, deadline)
            operation = described.operation(name, call.variant)
            requests = transform_requests(call, inputs, operation, described, self._limits(deadline))
            parts = [read(self._unary(rpc, request, deadline), operation) for request in requests]
        self._catalog.confirm(call.selector, parts[0].run)
        return parts

    def _known(self, selector: Selector, deadline: Deadline) -> Model:
        known = self._catalog.models.get(selector)
        return known or self._describe(selector, deadline)

    def _describe(self, selector: Selector, deadline: Deadline) -> Model:
        request = inference_pb2.GetModelRequest(model=selector.message())
        model = read_model(self._unary(self._stub.GetModel, request, deadline))
        self._catalog.models[selector] = model
        return model

    def _limits(self, deadline: Deadline) -> ServerInfo:
        return self._catalog.limits or self._info(deadline)

    def _info(self, deadline: Deadline) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        info = read_server_info(self._unary(self._stub.GetServerInfo, request, deadline))
        self._catalog.limits = info
        return info

    def _unary(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        future = method.future(request, timeout=deadline.remaining())
        try:
            with translate_rpc_errors():
                return future.result()
        finally:
            # Ctrl-C must reach the server too; on a finished call this does nothing.
            future.cancel()

    def _deadline(self, options: CallOptions) -> Deadline:
        return Deadline(options.get("timeout", self._timeout))


class Responses(Protocol):
    """A server stream that can be cancelled."""

    def __iter__(self) -> Iterator[inference_pb2.SampleResponse]: ...

    def cancel(self) -> object: ...


class SampleStream(Iterator[Event]):
    """Rows as they finish, and previews of those on the way. Leaving its `with` block cancels the rest."""

    def __init__(
        self,
        responses: Responses,
        operation: Operation,
        reader: StreamReader,
        catalog: ModelCache,
        selector: Selector,
    ) -> None:
        self._responses = responses
        self._operation = operation
        self._reader = reader
        self._catalog = catalog
        self._selector = selector
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
        """Stop the server's work on the rows that are not finished; safe to call from another thread."""
        self._responses.cancel()

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _read(self) -> Iterator[Event]:
        with self._catalog.trusting(self._selector), translate_rpc_errors():
            for response in self._responses:
                yield from self._reader.events(response, self._operation)
        self._catalog.confirm(self._selector, self.run)
