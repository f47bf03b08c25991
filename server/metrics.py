"""Prometheus metrics of the server, except those of steps (step_metrics.py)."""

from collections.abc import Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from server.core.spec import ProgramKey
from server.step_metrics import StepMetricsCollector

# Upper bounds of buckets in seconds: 1 ms to 131 s.
_REQUEST_SECONDS = [0.001 * 2**exponent for exponent in range(18)]
_CALL = ("method", "model")
_OPERATION = ("model", "operation")

DISCARD_REASONS = ("cancelled", "deadline", "failed")
ERROR_KINDS = ("graph", "non_finite", "out_of_memory")


class Metrics:
    """Metrics of one server, and the observer of its engine, calls and workers.

    The label `method` is the name of an RPC. The label `model` is the name of a served model or empty, so
    that requests cannot create series. Observer callbacks may be invoked on any thread.

    Args:
        registry: the registry that exposes the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._add_calls()
        self._add_engine()
        self._add_models()
        self.build = Info(
            "samovar_build", "Versions of the server and its libraries, and the device.", registry=registry
        )

    def _add_calls(self) -> None:
        self.requests = self._counter(
            "requests", "Calls that ended, by status code.", "method", "model", "code"
        )
        self.request_seconds = self._histogram(
            "request_duration_seconds",
            "Seconds from the arrival of a call to its end.",
            _REQUEST_SECONDS,
            *_CALL,
        )
        self.queue_seconds = self._histogram(
            "queue_duration_seconds",
            "Seconds from the admission of a request until its first row enters a batch.",
            _REQUEST_SECONDS,
            *_CALL,
        )
        self.calls_in_flight = self._gauge("requests_in_flight", "Calls that have not ended.")
        self.rows = self._counter("rows", "Rows delivered.", *_OPERATION)

    def _add_engine(self) -> None:
        self.steps = StepMetricsCollector()
        self.registry.register(self.steps)
        self.discarded_steps = self._counter(
            "discarded_row_steps",
            "Steps of rows that were never delivered, by reason.",
            *_OPERATION,
            "reason",
        )
        self.errors = self._counter(
            "execution_errors",
            "Errors by kind: graph calls that raised, non-finite rows, steps that ran out of memory.",
            *_OPERATION,
            "kind",
        )
        self.engine_restarts = self._counter(
            "engine_restarts", "Restarts of the device thread after a crash."
        )
        self.grpc_worker_restarts = self._counter(
            "grpc_worker_restarts", "Restarts of gRPC workers that exited unexpectedly."
        )
        self.queued_rows = self._gauge("queued_rows", "Rows that wait for a slot.")
        self.running_rows = self._gauge("running_rows", "Rows in slots.")

    def _add_models(self) -> None:
        self.artifacts_rejected = self._gauge(
            "artifacts_rejected", "Artifacts in the models directory that are invalid and not served."
        )
        self.model_info = self._gauge(
            "model_info",
            "1 for each served model, version and format.",
            "model",
            "version",
            "format",
            "family",
            "sha256",
        )
        self.model_load_seconds = self._gauge(
            "model_load_duration_seconds", "Seconds to load, verify and warm up a model.", "model", "version"
        )

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"samovar_{name}", doc, labels, registry=self.registry)

    def _gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"samovar_{name}", doc, labels, registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"samovar_{name}", doc, labels, buckets=buckets, registry=self.registry)

    def expect(self, program: ProgramKey) -> None:
        """Create the series of a program with the value 0, so that rates include the first event."""
        self.requests.labels(program.operation.capitalize(), program.model, "OK")
        self.rows.labels(program.model, program.name)
        self.steps.expect(program)
        for reason in DISCARD_REASONS:
            self.discarded_steps.labels(program.model, program.name, reason)
        for kind in ERROR_KINDS:
            self.errors.labels(program.model, program.name, kind)

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """Count a step of `rows` rows, padded to `bucket` rows, that took `seconds`."""
        self.steps.on_step(program, rows, bucket, seconds)

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None:
        """Count `rows` finished rows that were delivered."""
        self._delivery_series(program).inc(rows)

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None:
        """Record that a request waited `seconds` until its first row entered a batch."""
        self._queue_series(program).observe(seconds)

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None:
        """Count `steps` row-steps of rows that are never delivered; `reason` is one of DISCARD_REASONS."""
        self.discarded_steps.labels(program.model, program.name, reason).inc(steps)

    def on_error(self, program: ProgramKey, kind: str) -> None:
        """Count an error of one of ERROR_KINDS: one graph call, row or step."""
        self.errors.labels(program.model, program.name, kind).inc()

    def on_restart(self) -> None:
        """Count a restart of the device thread."""
        self.engine_restarts.inc()

    def on_call_start(self) -> None:
        """Count a call as in flight."""
        self.calls_in_flight.inc()

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """Count the end of a call.

        Args:
            method: name of the RPC.
            model: name of the model if it is served, or "".
            code: name of the status code.
            seconds: time since the call arrived.
        """
        self.calls_in_flight.dec()
        requests, request_seconds = self._call_series(method, model, code)
        requests.inc()
        request_seconds.observe(seconds)

    def on_worker_lost(self, calls: int) -> None:
        """Subtract `calls` calls in flight at a worker that exited; their status codes are unknown."""
        self.calls_in_flight.dec(calls)

    def on_worker_restart(self) -> None:
        """Count a restart of a worker that exited unexpectedly."""
        self.grpc_worker_restarts.inc()

    # Looking up a series by its labels is slow compared with its update. There is one instance in a process.
    @cache  # noqa: B019
    def _delivery_series(self, program: ProgramKey) -> Counter:
        return self.rows.labels(program.model, program.name)

    @cache  # noqa: B019
    def _queue_series(self, program: ProgramKey) -> Histogram:
        return self.queue_seconds.labels(program.operation.capitalize(), program.model)

    @cache  # noqa: B019
    def _call_series(self, method: str, model: str, code: str) -> tuple[Counter, Histogram]:
        return self.requests.labels(method, model, code), self.request_seconds.labels(method, model)
