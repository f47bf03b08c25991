"""Every Prometheus metric, named and bucketed in one place."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from server.spec import ProgramKey

_REQUEST_SECONDS = [0.001 * 2**exponent for exponent in range(18)]
_STEP_SECONDS = [0.00005 * 2**exponent for exponent in range(17)]
_ROWS = [2**exponent for exponent in range(10)]

WASTE_REASONS = ("cancelled", "deadline", "failed")
FAULT_KINDS = ("graph", "non_finite")


class Metrics:
    """The server's metrics, and the engine's observer. Only known models become labels."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "samovar_requests",
            "Calls that ended, by canonical code.",
            ["method", "model", "code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "samovar_request_duration_seconds",
            "Time from a call's arrival to its end.",
            ["method", "model"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "samovar_queue_duration_seconds",
            "Time from admission until a request's first row entered a batch.",
            ["method", "model"],
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self.calls_in_flight = Gauge(
            "samovar_requests_in_flight", "Calls that have not ended.", registry=registry
        )
        self.rows = Counter("samovar_rows", "Rows delivered.", ["model", "operation"], registry=registry)
        self.steps = Counter(
            "samovar_steps", "Turns of a program: graph calls that advance all its rows.",
            ["model", "operation", "format"], registry=registry,
        )  # fmt: skip
        self.step_seconds = Histogram(
            "samovar_step_duration_seconds", "Time of one turn of a program.",
            ["model", "operation", "format"], buckets=_STEP_SECONDS, registry=registry,
        )  # fmt: skip
        self.step_rows = Histogram(
            "samovar_step_rows", "Rows that shared a turn.",
            ["model", "operation", "format"], buckets=_ROWS, registry=registry,
        )  # fmt: skip
        self.padding_rows = Counter(
            "samovar_padding_rows", "Rows computed only to fill a batch.",
            ["model", "operation", "format"], registry=registry,
        )  # fmt: skip
        self.wasted_steps = Counter(
            "samovar_wasted_steps", "Row steps taken for rows that were never delivered.",
            ["model", "operation", "reason"], registry=registry,
        )  # fmt: skip
        self.faults = Counter(
            "samovar_faults", "Graphs that raised and rows that came out non-finite.",
            ["model", "operation", "kind"], registry=registry,
        )  # fmt: skip
        self.rows_waiting = Gauge("samovar_rows_waiting", "Rows that wait for a slot.", registry=registry)
        self.rows_active = Gauge("samovar_rows_active", "Rows in a batch.", registry=registry)
        self.refused_artifacts = Gauge(
            "samovar_refused_artifacts",
            "Artifacts under the models directory that are not served.",
            registry=registry,
        )
        self.model_info = Gauge(
            "samovar_model_info", "1 for every model that is served.",
            ["model", "version", "format", "family", "sha256"], registry=registry,
        )  # fmt: skip
        self.model_load_seconds = Gauge(
            "samovar_model_load_duration_seconds", "Time that loading, proving and warming took.",
            ["model", "version"], registry=registry,
        )  # fmt: skip
        self.build = Info("samovar_build", "Versions and device.", registry=registry)

    def expect(self, program: ProgramKey) -> None:
        """Series of a program that is served start at 0, so that rates see their first event."""
        self.requests.labels(program.operation.capitalize(), program.model, "OK")
        self.rows.labels(program.model, program.operation)
        self.steps.labels(program.model, program.operation, program.format)
        for reason in WASTE_REASONS:
            self.wasted_steps.labels(program.model, program.operation, reason)
        for kind in FAULT_KINDS:
            self.faults.labels(program.model, program.operation, kind)

    def stepped(self, program: ProgramKey, rows: int, bucket: int, seconds: float) -> None:
        """One turn of a program advanced so many rows, padded to a bucket."""
        labels = program.model, program.operation, program.format
        self.steps.labels(*labels).inc()
        self.step_seconds.labels(*labels).observe(seconds)
        self.step_rows.labels(*labels).observe(rows)
        self.padding_rows.labels(*labels).inc(bucket - rows)

    def delivered(self, program: ProgramKey, rows: int) -> None:
        """So many rows of a program went out to a request."""
        self.rows.labels(program.model, program.operation).inc(rows)

    def wasted(self, program: ProgramKey, steps: int, reason: str) -> None:
        """So many steps were taken for rows that nobody will get."""
        self.wasted_steps.labels(program.model, program.operation, reason).inc(steps)

    def faulted(self, program: ProgramKey, kind: str) -> None:
        """A graph raised or a row came out non-finite."""
        self.faults.labels(program.model, program.operation, kind).inc()
