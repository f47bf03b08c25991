"""Step metrics: the same series as Prometheus's own metric classes produce."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.core.spec import ProgramKey
from server.metrics import Metrics
from server.step_metrics import Distribution


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 100.0])))
def test_distribution_matches_prometheus_histogram(values: list[float]) -> None:
    bounds = (1.0, 2.0, 4.0)
    registry = CollectorRegistry()
    histogram = Histogram("h", "h", buckets=bounds, registry=registry)
    distribution = Distribution(bounds)
    for value in values:
        histogram.observe(value)
        distribution.observe(value)
    expected = {
        bound: registry.get_sample_value("h_bucket", {"le": bound}) for bound, _ in distribution.buckets
    }
    assert dict(distribution.buckets) == expected
    assert np.isclose(distribution.total, registry.get_sample_value("h_sum") or 0.0)


def test_step_metrics_of_model_versions_share_series_that_start_at_zero() -> None:
    metrics = Metrics(CollectorRegistry())
    old, new = (ProgramKey("model", version, "onnx", "sample", "") for version in "12")
    metrics.expect(old)
    metrics.expect(new)
    labels = {"model": "model", "operation": "sample", "format": "onnx"}
    assert metrics.registry.get_sample_value("samovar_steps_total", labels) == 0
    metrics.on_step(old, 3, 4, 0.001)
    metrics.on_step(new, 8, 8, 0.002)
    page = generate_latest(metrics.registry).decode()
    assert page.count("samovar_steps_total{") == 1
    for name, value in (("steps_total", 2), ("padding_rows_total", 1), ("step_rows_sum", 11)):
        assert metrics.registry.get_sample_value(f"samovar_{name}", labels) == value
    assert metrics.registry.get_sample_value("samovar_step_duration_seconds_count", labels) == 2
