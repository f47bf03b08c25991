"""Synchronous client. Encoding and decoding of messages live in _messages.py."""

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
    build_call,
    read_scores,
    read_server_info,
    read_transform,
    sample_request,
    transform_requests,
)
from samovar._model_cache import ModelCache
from samovar.errors import translate_rpc_errors
from samovar.model import Model, Operation
from samovar.result import (
    Event,
    ReorderBuffer,
    Result,
    ResultT,
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
    """Client of a Samovar server. Threads may share it.

    Calls that fail to reach a server are retried, up to four times. The client chooses the seed before it
    sends a request, so that a retry returns the same bytes.

    Args:
        address: "host:port", or any name that gRPC resolves. Several addresses share the calls.
        timeout: Seconds for a whole call, unless the call sets its own; None for no limit.
        credentials: From `grpc.ssl_channel_credentials`. Default: an unencrypted connection.
        options: Further gRPC channel options.

    Raises:
        SamovarError: From every call that fails; `samovar.errors` lists the subclasses.

    Example:
        with samovar.Client("127.0.0.1:8001") as client:
            images = client.sample("digits-vae", 64, seed=7).value
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
        self._cache = ModelCache()

    def models(self) -> tuple[Model, ...]:
        """List all served models and versions, ordered by name and version.

        Returns:
            The models, with their operations, parameters and quality.

        Raises:
            SamovarError: If the call fails; `samovar.errors` lists the subclasses.

        Example:
            for model in client.models():
                print(model.name, model.version, list(model.operations))
        """
        deadline, models = Deadline(self._timeout), list[Model]()
        request = inference_pb2.ListModelsRequest()
        while True:
            page = self._call_unary(self._stub.ListModels, request, deadline)
            models.extend(map(read_model, page.models))
            if not page.next_page_token:
                return tuple(models)
            request = inference_pb2.ListModelsRequest(page_token=page.next_page_token)

    def model(self, name: str, version: str = "", format: str = "") -> Model:
        """Describe one model.

        Args:
            name: The model's name.
            version: A version. Default: the newest.
            format: A format that must be served. Default: any.

        Returns:
            The operations with their parameters, inputs and outputs, the data and the quality.

        Raises:
            ModelNotFound: If the model, version or format is not served.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            steps = client.model("digits-diffusion").operation("sample").steps
        """
        return self._fetch_model(Selector(name, version, format), Deadline(self._timeout))

    def server_info(self) -> ServerInfo:
        """Describe the server: its version, device, limits and settings.

        Returns:
            The server's description; sizes are in bytes, times in seconds.

        Raises:
            SamovarError: If the call fails; `samovar.errors` lists the subclasses.

        Example:
            limit = client.server_info().max_rows_per_request
        """
        return self._fetch_server_info(Deadline(self._timeout))

    def sample(
        self,
        model: str,
        rows: int = 1,
        *,
        inputs: Mapping[str, ArrayLike] | None = None,
        **options: Unpack[CallOptions],
    ) -> Result:
        """Draw rows and return them when all have finished.

        Args:
            model: The model's name, as `models` lists it.
            rows: Number of rows.
            inputs: Inputs that the operation declares, by name, such as a prompt, a mask or a class label:
                [rows, *shape], or [*shape] for every row. Default: none.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The rows in the order of their indices; `value` is [rows, *shape].

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            result = client.sample("digits-vae", 64, seed=7, parameters={"temperature": 0.8})
            images, seed = result.value, result.run.seed
        """
        with self.stream(model, rows, inputs=inputs, **options) as stream:
            collector = RowCollector(rows, options.get("first_row", 0))
            for event in stream:
                collector.place(event)
            return Result(collector.complete(), stream.run, stream.timings)

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
        """Draw rows and return them as they finish.

        Args:
            model: The model's name, as `models` lists it.
            rows: Number of rows.
            inputs: Inputs that the operation declares, by name, such as a prompt, a mask or a class label:
                [rows, *shape], or [*shape] for every row. Default: none.
            preview_every: Number of steps between previews of an unfinished row; 0 for no previews.
            ordered: True to receive finished rows in the order of their indices. A row then waits for the
                rows before it, and is lost if one of them fails.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            A stream of `Rows` and `Preview` events. Leaving its `with` block cancels the call.

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            with client.stream("digits-diffusion", 64, preview_every=5) as stream:
                for event in stream:
                    print(type(event).__name__, event.indices)
        """
        call, deadline = build_call(model, options), self._deadline(options)
        with self._cache.evict_on_error(call.selector):
            operation = self._cached_model(call.selector, deadline).operation("sample", call.variant)
            request = sample_request(call, rows, inputs or {}, preview_every, operation)
            responses = self._stub.Sample(request, timeout=deadline.remaining())
        reader = StreamReader(ReorderBuffer(call.first_row) if ordered else None)
        return SampleStream(responses, operation, reader, self._cache, call.selector)

    def reconstruct(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Encode rows and decode them again.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Rows of the model's data, [rows, *shape].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The reconstructed rows; `value` is [rows, *shape].

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            restored = client.reconstruct("digits-vae", images).value
        """
        return merge(self._transform("reconstruct", read_transform, model, inputs, options))

    def energy(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Compute the unnormalized energies of rows.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Rows of the model's data, [rows, *shape].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The energies; `value` is [rows]. Lower is more likely; compare them only within one artifact.

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            energies = client.energy("digits-ebm", images).value
        """
        return merge(self._transform("energy", read_transform, model, inputs, options))

    def encode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map rows to latents or features.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Rows of the model's data, [rows, *shape].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The latents or features; `value` is [rows, *latent].

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            latents = client.encode("digits-vae", images).value
        """
        return merge(self._transform("encode", read_transform, model, inputs, options))

    def decode(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Map latents to rows.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Latents, [rows, *latent].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The rows; `value` is [rows, *shape].

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            images = client.decode("digits-vae", latents).value
        """
        return merge(self._transform("decode", read_transform, model, inputs, options))

    def classify(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Result:
        """Compute the class probabilities of rows.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Rows of the model's data, [rows, *shape].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The probabilities; `value` is [rows, classes].

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            classes = client.classify("digits-classifier", images).value.argmax(axis=1)
        """
        return merge(self._transform("classify", read_transform, model, inputs, options))

    def score(self, model: str, inputs: Inputs, **options: Unpack[CallOptions]) -> Scores:
        """Compute the log-densities of rows, in nats.

        Args:
            model: The model's name, as `models` lists it.
            inputs: Rows of the model's data, [rows, *shape].
                Or arrays by name, [rows, *shape] or [*shape] for every row. Element types are converted if no
                value changes beyond rounding.
            **options: Options of the call, all optional:
                version: A version of the model. Default: the newest.
                format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
                seed: Seed of the random numbers, 0 <= seed < 2**64. Default: a new random seed, which the
                    result's `run` reports.
                first_row: Index of the first row, 0 <= first_row < 2**32. Default: 0.
                parameters: Parameters that differ from their defaults, by name.
                variant: Variant of the operation, such as "inpaint". Default: the default variant.
                priority: "interactive", or "batch" to yield to other requests. Default: by number of rows.
                timeout: Seconds for the whole call; None means no limit. Default: the client's timeout.

        Returns:
            The scores: `nats`, and `standard_error` and `bits_per_dimension` where they exist, each [rows].
            `kind` is their relation to the log-density: exact, lower bound, estimate or unnormalized.

        Raises:
            InvalidRequest: If an argument or option is invalid; `violations` lists every violation.
            UnsupportedOperation: If the model lacks the operation; `supported` lists those it has.
            SamovarError: If the call fails for another reason; `samovar.errors` lists the subclasses.

        Example:
            scores = client.score("digits-vae", images, parameters={"draws": 100})
            scores.nats.mean(), scores.kind
        """
        return merge_scores(self._transform("score", read_scores, model, inputs, options))

    def close(self) -> None:
        """Close the connection and cancel open calls."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _transform(
        self,
        name: str,
        read: Callable[[Any, Operation], ResultT],
        model: str,
        inputs: Inputs,
        options: CallOptions,
    ) -> list[ResultT]:
        """Return the results of consecutive rows; inputs above the message limit take several requests."""
        call, deadline = build_call(model, options), self._deadline(options)
        method = getattr(self._stub, name.capitalize())
        with self._cache.evict_on_error(call.selector):
            described = self._cached_model(call.selector, deadline)
            operation = described.operation(name, call.variant)
            limits = self._cached_limits(deadline)
            requests = transform_requests(call, inputs, operation, described, limits)
            parts = [read(self._call_unary(method, request, deadline), operation) for request in requests]
        self._cache.validate(call.selector, parts[0].run)
        return parts

    def _cached_model(self, selector: Selector, deadline: Deadline) -> Model:
        model = self._cache.models.get(selector)
        return model or self._fetch_model(selector, deadline)

    def _fetch_model(self, selector: Selector, deadline: Deadline) -> Model:
        request = inference_pb2.GetModelRequest(model=selector.to_proto())
        model = read_model(self._call_unary(self._stub.GetModel, request, deadline))
        self._cache.models[selector] = model
        return model

    def _cached_limits(self, deadline: Deadline) -> ServerInfo:
        return self._cache.limits or self._fetch_server_info(deadline)

    def _fetch_server_info(self, deadline: Deadline) -> ServerInfo:
        request = inference_pb2.GetServerInfoRequest()
        info = read_server_info(self._call_unary(self._stub.GetServerInfo, request, deadline))
        self._cache.limits = info
        return info

    def _call_unary(
        self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request, deadline: Deadline
    ) -> Response:
        future = method.future(request, timeout=deadline.remaining())
        try:
            with translate_rpc_errors():
                return future.result()
        finally:
            # Cancels the server's work after KeyboardInterrupt; no effect on a finished call.
            future.cancel()

    def _deadline(self, options: CallOptions) -> Deadline:
        return Deadline(options.get("timeout", self._timeout))


class Responses(Protocol):
    """Stream of responses that can be cancelled."""

    def __iter__(self) -> Iterator[inference_pb2.SampleResponse]: ...

    def cancel(self) -> object: ...


class SampleStream(Iterator[Event]):
    """Stream of finished rows, as `Rows`, and of unfinished ones, as `Preview`.

    Leaving its `with` block cancels the call.
    """

    def __init__(
        self,
        responses: Responses,
        operation: Operation,
        reader: StreamReader,
        cache: ModelCache,
        selector: Selector,
    ) -> None:
        self._responses = responses
        self._operation = operation
        self._reader = reader
        self._cache = cache
        self._selector = selector
        self._events = self._read()

    @property
    def run(self) -> RunInfo:
        """What computes the rows; raises ServerError before the first event."""
        return self._reader.run

    @property
    def timings(self) -> Timings:
        """Seconds spent in each phase; zeros before the last event."""
        return self._reader.timings

    def cancel(self) -> None:
        """Cancel the call and discard its unfinished rows. Other threads may call it."""
        self._responses.cancel()

    def __next__(self) -> Event:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def _read(self) -> Iterator[Event]:
        with self._cache.evict_on_error(self._selector), translate_rpc_errors():
            for response in self._responses:
                yield from self._reader.events(response, self._operation)
        self._cache.validate(self._selector, self.run)
