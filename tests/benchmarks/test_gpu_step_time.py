"""GPU check: step times, rehearsed on the CPU with one small model."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import artifacts
from benchmarks.gpu.base import Check, Note
from benchmarks.gpu.parts import step_time
from benchmarks.gpu.timing import clocks, compiling, graphs, networks, plans, profiling
from benchmarks.gpu.timing.compiling import Compiler, Job
from benchmarks.gpu.timing.graphs import CASES
from benchmarks.gpu.timing.meter import Meter, Series
from benchmarks.models import unet
from benchmarks.report import Result, Table
from export.graphs import graph
from server.core.spec import TensorSpec
from server.runtime import Device

CPU = torch.device("cpu")
PLAN = dataclasses.replace(
    plans.REHEARSAL,
    cases=(CASES[artifacts.GAN],),
    rows=(1, 2),
    other_rows=(3,),
    unet_rows=(),
    item_seconds=0.001,
    seconds=300,
    profile_seconds=300,
    packages=(),
)


def test_part_measures_each_runtime_of_a_server(models_of: Callable[..., Path], tmp_path: Path) -> None:
    check = Check("cpu", models_of(artifacts.GAN), tmp_path, is_rehearsal=True)
    findings = list(step_time.measure(check, PLAN))
    tables = {finding.name: finding for finding in findings if isinstance(finding, Table)}
    for runtime in ("torchscript", "torch-export", "onnx-runtime", "torchscript-more"):
        (row,) = tables[f"step-time-{runtime}"].rows
        assert row[:2] == (artifacts.GAN, row[1])
        assert "\N{EN DASH}" not in row
    assert [row[:3] for row in tables["step-kernels"].rows] == [(artifacts.GAN, "kernels", "8")]
    assert sum(isinstance(finding, Result) for finding in findings) == 2
    assert not [finding for finding in findings if isinstance(finding, Note) and "Not" in finding.text]
    assert (tmp_path / "step-time.csv").read_text().count(artifacts.GAN) == 8


def test_part_goes_on_without_an_artifact(models_of: Callable[..., Path], tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, cases=(CASES[artifacts.VAE],), other_rows=(), profile_seconds=0)
    check = Check("cpu", tmp_path, tmp_path, is_rehearsal=True)
    notes = [finding.text for finding in step_time.measure(check, plan) if isinstance(finding, Note)]
    assert any(artifacts.VAE in text for text in notes)


def test_meter_keeps_errors_and_what_it_skips(models_of: Callable[..., Path]) -> None:
    step_graph = graphs.read(models_of(artifacts.GAN), CASES[artifacts.GAN])
    meter = Meter(Device(), seconds=0.001, end=math.inf)

    def fail(inputs: object) -> list[torch.Tensor]:
        raise ValueError("no result")

    meter.measure(Series("first", "any"), step_graph, fail, 1)
    meter.end = 0.0
    meter.measure(Series("second", "any"), step_graph, fail, 1)
    failed, skipped = (note.text for note in meter.notes())
    assert "first, any, float32, 1 rows: no result" in failed
    assert "second" in skipped
    assert not list(meter.notes())
    assert math.isnan(meter.best("first", "any", 1))


def test_compiler_returns_error_of_a_job(tmp_path: Path) -> None:
    with Compiler(tmp_path / "out", "cpu", job_seconds=60, threads=1) as compiler:
        job = Job(compiling.AOT_INDUCTOR, artifacts.GAN)
        compiler.start(tmp_path, [job])
        outcome = compiler.wait(job, seconds=300)
    assert outcome is not None
    assert "InvalidArtifact" in outcome.error
    assert compiler.outcome(Job("other", "other")) == compiling.Outcome(0.0, "it was not started")


def test_time_limit_raises_timeout() -> None:
    with pytest.raises(TimeoutError, match="longer than"), compiling.time_limit(0.01):
        time.sleep(60)


def test_timing_counts_seconds_of_a_call() -> None:
    calls: list[int] = []
    assert clocks.median_seconds(lambda: calls.append(1), CPU, seconds=0.0) > 0
    assert clocks.host_seconds(lambda: calls.append(1), CPU, calls=3) > 0
    assert len(calls) > clocks.WARM_UP_CALLS
    assert clocks.peak_bytes(lambda: None, CPU) == 0


def test_profile_counts_operators_on_the_cpu() -> None:
    ones = torch.ones(3)
    activity = clocks.profile_call(lambda: ones.add_(1), CPU, calls=4)
    assert activity.kernels >= 1
    assert activity.seconds > 0


def test_precision_is_restored() -> None:
    with clocks.precision("TF32", CPU):
        assert torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    with clocks.precision("bfloat16", CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_fill_random_stays_within_bounds() -> None:
    levels = torch.zeros(1000, dtype=torch.int64)
    graphs.fill_random(levels, TensorSpec("levels", "int64", (), 2, 4))
    assert set(levels.tolist()) == {2, 3, 4}
    shares = torch.zeros(1000)
    graphs.fill_random(shares, TensorSpec("shares", "float32", (), 0.0, 1.0))
    assert 0 <= shares.min() < shares.max() <= 1


def test_profiles_are_read_from_output_that_was_cut_off() -> None:
    printed = profiling.Profile("gan", "kernels", 8, 3, kernel_seconds=0.5, step_seconds=1.0)
    output = f"a warning\n{json.dumps(dataclasses.asdict(printed))}\n"
    assert profiling.parse_output(output) == [printed]
    assert printed.busy == 0.5


def test_unet_has_35_million_parameters() -> None:
    with torch.device("meta"):
        network = networks.UNet()
    assert round(networks.count_parameters(network) / 1e6) == 35


@pytest.mark.parametrize("has_eta", [False, True])
def test_unet_program_is_pure_and_deterministic(has_eta: bool) -> None:
    first, second = (unet.build_program(16, has_eta) for _ in range(2))
    for entry in graph.collect([first]):
        entry.module.eval()
        graph.check_module(entry)
    assert first.step is not None
    assert second.step is not None
    states = (first.step.state_dict(), second.step.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
