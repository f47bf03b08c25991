"""Every Prometheus metric, named and bucketed here or, where it is of turns, in tally.py."""

from collections.abc import Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from server.core.spec import ProgramKey
from server.step_metrics import StepMetricsCollector

_REQUEST_SECONDS = [0.001 * 2**exponent for exponent in range(18)]
_CALL = ("method", "model")
_OPERATION = ("model", "operation")

WASTE_REASONS = ("cancelled", "deadline", "failed")
FAULT_KINDS = ("graph", "non_finite", "out_of_memory")


class Metrics:
    """The server's metrics, and the engine's observer. Only known models become labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._add_calls()
        self._add_engine()
        self._add_models()
        self.build = Info("samovar_build", "Versions and device.", registry=registry)

    def _add_calls(self) -> None:
        self.requests = self._counter(
            "requests", "Calls that ended, by canonical code.", "method", "model", "code"
        )
        self.request_seconds = self._histogram(
            "request_duration_seconds", "Time from a call's arrival to its end.", _REQUEST_SECONDS, *_CALL
        )
        self.queue_seconds = self._histogram(
            "queue_duration_seconds",
            "Time from admission until a request's first row entered a batch.",
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
            "Row steps taken for rows that were never delivered.",
            *_OPERATION,
            "reason",
        )
        self.errors = self._counter(
            "execution_errors",
            "Graphs that raised, rows that came out non-finite, batches that did not fit into memory.",
            *_OPERATION,
            "kind",
        )
        self.engine_restarts = self._counter(
            "engine_restarts", "Times that the device thread was struck down."
        )
        self.grpc_worker_restarts = self._counter(
            "grpc_worker_restarts", "Front ends that ended by themselves and were started again."
        )
        self.queued_rows = self._gauge("queued_rows", "Rows that wait for a slot.")
        self.running_rows = self._gauge("running_rows", "Rows in a batch.")

    def _add_models(self) -> None:
        self.artifacts_rejected = self._gauge(
            "artifacts_rejected", "Artifacts under the models directory that are not served."
        )
        self.model_info = self._gauge(
            "model_info",
            "1 for every model that is served.",
            "model",
            "version",
            "format",
            "family",
            "sha256",
        )
        self.model_load_seconds = self._gauge(
            "model_load_duration_seconds", "Time that loading, proving and warming took.", "model", "version"
        )

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"samovar_{name}", doc, labels, registry=self.registry)

    def _gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(f"samovar_{name}", doc, labels, registry=self.registry)

    def _histogram(self, name: str, doc: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"samovar_{name}", doc, labels, buckets=buckets, registry=self.registry)

    def expect(self, program: ProgramKey) -> None:
        """Series of a program that is served start at 0, so that rates see their first event."""
        self.requests.labels(program.operation.capitalize(), program.model, "OK")
        self.rows.labels(program.model, program.name)
        self.steps.expect(program)
        for reason in WASTE_REASONS:
            self.discarded_steps.labels(program.model, program.name, reason)
        for kind in FAULT_KINDS:
            self.errors.labels(program.model, program.name, kind)

    def on_step(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """One turn of a program advanced so many rows, padded to a bucket."""
        self.steps.on_step(program, rows, bucket, seconds)

    def on_rows_delivered(self, program: ProgramKey, rows: int) -> None:
        """So many rows of a program went out to a request."""
        self._delivery_series(program).inc(rows)

    def on_dequeued(self, program: ProgramKey, seconds: float) -> None:
        """A request that has ended had waited so long for its first step."""
        self._queue_series(program).observe(seconds)

    def on_call_start(self) -> None:
        """A call has come in."""
        self.calls_in_flight.inc()

    def on_call_end(self, method: str, model: str, code: str, seconds: float) -> None:
        """A call has ended; `model` is one that is known, or empty."""
        self.calls_in_flight.dec()
        requests, request_seconds = self._call_series(method, model, code)
        requests.inc()
        request_seconds.observe(seconds)

    def on_worker_lost(self, calls: int) -> None:
        """So many calls ended with their front end, who knows how."""
        self.calls_in_flight.dec(calls)

    def on_worker_restart(self) -> None:
        """A front end ended by itself, and another was started."""
        self.grpc_worker_restarts.inc()

    @cache  # noqa: B019 (there is one of these in a process, and every turn asks)
    def _delivery_series(self, program: ProgramKey) -> Counter:
        return self.rows.labels(program.model, program.name)

    @cache  # noqa: B019
    def _queue_series(self, program: ProgramKey) -> Histogram:
        return self.queue_seconds.labels(program.operation.capitalize(), program.model)

    @cache  # noqa: B019
    def _call_series(self, method: str, model: str, code: str) -> tuple[Counter, Histogram]:
        return self.requests.labels(method, model, code), self.request_seconds.labels(method, model)

    def on_steps_discarded(self, program: ProgramKey, steps: int, reason: str) -> None:
        """So many steps were taken for rows that nobody will get."""
        self.discarded_steps.labels(program.model, program.name, reason).inc(steps)

    def on_restart(self) -> None:
        """The device thread was struck down and starts again."""
        self.engine_restarts.inc()

    def on_error(self, program: ProgramKey, kind: str) -> None:
        """A graph raised or a row came out non-finite."""
        self.errors.labels(program.model, program.name, kind).inc()
