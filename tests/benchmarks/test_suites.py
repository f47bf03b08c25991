"""Benchmarks: statistics, the page, and a small run of each benchmark."""

import csv
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import artifacts, load, report, servers
from benchmarks.load import Clients, ClosedLoop, OpenLoopRequest
from benchmarks.servers import noop_server
from benchmarks.statistics import Spread, format_number, latency_cells, percentile, ratio, spread
from benchmarks.suites import (
    NAMES,
    Bench,
    calls,
    determinism,
    efficiency,
    scale,
    scheduling,
    select,
    short_among_long,
)
from benchmarks.suites import load as load_suite
from samovar.v1 import inference_pb2 as pb
from tests.support.live_server import RunningServer, serving


@pytest.fixture(scope="module")
def clients() -> Iterator[Clients]:
    with load.start_clients() as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Server of the smallest model."""
    models = artifacts.make_copies(1, tmp_path_factory.mktemp("models"))
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def bench(models: Path, clients: Clients, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Quick runs with the untrained artifacts of the test suite; servers load one of their formats."""
    directory = tmp_path_factory.mktemp("bench")
    for formats in (directory / "tiny-onnx", directory / "tiny-torchscript"):
        formats.mkdir()
        for model in models.iterdir():
            (formats / model.name).symlink_to(model)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAMOVAR_FORMATS", "onnx")
        yield Bench(directory, clients, is_quick=True, preset="tiny")


def test_spread_is_median_with_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert str(spread([3.0, 1.0, 2.0])) == "2.00 (1.00–3.00)"
    assert str(spread([2.0])) == "2.00"
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_ratio_divides_adjacent_measurements() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_format_number_keeps_three_digits() -> None:
    assert [format_number(value) for value in (12345.6, 12.34, 1.234, 0.01234, np.nan)] == [
        "12,346",
        "12.3",
        "1.23",
        "0.0123",
        "–",
    ]
    assert np.isnan(percentile(np.array([]), 50))
    assert latency_cells([np.array([0.001, 0.003])]) == ["2.00", "2.90", "2.98"]


def test_poisson_gaps_are_exponential() -> None:
    times = np.diff(load.poisson(50.0, 20_000, np.random.default_rng(0)))
    assert times.min() > 0
    # The standard deviation of exponential gaps equals their mean, here 1/50.
    assert times.mean() == pytest.approx(1 / 50, rel=0.03)
    assert times.std() == pytest.approx(1 / 50, rel=0.03)


def test_page_shows_results_and_links_to_csv_files(tmp_path: Path) -> None:
    rows = (("no-op", "1"), ("a|b", "1,200 (1,100–1,300)"))
    table = report.Table("calls-all", "Calls", ("name", "calls/s"), rows)
    assert report.plain_table(table).startswith("Calls\nname   calls/s\n-----  ---")
    assert (table.cell("calls/s", "no-op"), table.cell("calls/s", "other")) == ("1", "")
    plot = report.Plot("file", "A plot", "x", "y", (report.Line("line", (1, 2), (3, 4)),))
    result = report.Result("a|b: calls/s", table.cell("calls/s", "a|b"), "≥ 1000")
    section = report.Section("First", "Why.", (result,), (table,), (plot,))
    report.write([section], report.describe_machine(), tmp_path)
    page = (tmp_path / report.PAGE).read_text()
    assert "| First | a/b: calls/s | 1,200 (1,100–1,300) | ≥ 1000 |" in page
    assert "## First\n\nWhy.\n\n![A plot](benchmarks/file.svg)" in page
    assert "* [Calls](benchmarks/calls-all.csv)" in page
    assert "torch" in page
    with (tmp_path / "benchmarks" / "calls-all.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["name", "calls/s"], *map(list, rows)]
    assert (tmp_path / "benchmarks" / "file.svg").is_file()


def test_draw_writes_svg(tmp_path: Path) -> None:
    plot = report.Plot("file", "A plot", "x", "y", (report.Line("line", (1, 2), (3, 4)),))
    assert report.draw(plot, tmp_path / "plots").read_text().startswith("<?xml")


def test_select_returns_known_benchmarks() -> None:
    assert select([], NAMES) == list(NAMES)
    assert select(["calls"], NAMES) == ["calls"]
    with pytest.raises(ValueError, match="unknown benchmark speed; expected some of: scheduling"):
        select(["speed"], NAMES)
    assert all(callable(load_suite(name)) for name in NAMES)


def test_help_lists_all_benchmarks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    output = capsys.readouterr().out
    assert [name for name in NAMES if f"  {name} " not in output] == []


def test_closed_loop_counts_replies_of_noop_server(clients: Clients) -> None:
    with noop_server(100) as noop:
        result = clients.run_closed(ClosedLoop(noop.address, "/any/Method", b"x", clients=9, seconds=0.5))
        assert noop.cpu_seconds >= 0
        assert noop.resident_bytes > 1 << 20
    assert len(result.latencies) > 9
    assert (result.latencies > 0).all()
    assert result.rate == pytest.approx(len(result.latencies) / result.seconds)


def test_closed_loop_request_is_answered_by_server(clients: Clients, tiny: RunningServer) -> None:
    request = calls.make_request(artifacts.TINY, 5, f"{artifacts.TINY}-0")
    assert pb.TransformRequest.FromString(request).inputs["point"].shape == [5, 2]
    assert len(clients.run_closed(ClosedLoop(tiny.address, calls.METHOD, request, 1, 0.05)).latencies)


def test_open_loop_keeps_outputs_and_errors(clients: Clients, server: RunningServer) -> None:
    requests = [OpenLoopRequest(0.0, "walk", "digits-diffusion", 2, seed, {"steps": 2}) for seed in (1, 1, 2)]
    result = clients.run_open(server.address, requests, keep_outputs=True)
    assert not result.errors
    assert result.outputs[0] == result.outputs[1] != result.outputs[2]
    assert len(result.latencies_of("walk")) == 3
    assert len(result.latencies_of("other")) == 0
    wrong = OpenLoopRequest(0.0, "wrong", "digits-diffusion", 1, 1, {"steps": -1})
    failed = clients.run_open(server.address, [*requests, wrong])
    assert "steps" in failed.errors[0]
    assert len(failed.latencies_of("wrong")) == 0
    assert failed.rate == pytest.approx(3 / failed.seconds)


def test_open_loop_cancels_request_after_time_limit(clients: Clients, server: RunningServer) -> None:
    long = OpenLoopRequest(0.0, "long", "digits-ebm", 1, 1, {"steps": 10_000}, cancel_after=0.05)
    short = replace(long, parameters={"steps": 1}, cancel_after=None)
    result = clients.run_open(server.address, [long, short], keep_outputs=True)
    assert result.errors == [load.CANCELLED]
    assert len(result.latencies_of("long")) == 1


def test_server_cpu_seconds_include_child_processes(clients: Clients) -> None:
    alone = servers.Server("", clients.run(os.getpid))
    both = servers.Server("", os.getpid())
    assert 0 < alone.cpu_seconds < both.cpu_seconds


def test_count_equal_rows_compares_split_traffic(clients: Clients, server: RunningServer) -> None:
    traffic = [OpenLoopRequest(0.0, "a", "digits-diffusion", 3, seed, {"steps": 2}, 5) for seed in (1, 2)]
    traffic.insert(1, replace(traffic[0], parameters={"steps": 1000}, cancel_after=0.001))
    parts = determinism.split(determinism.not_cancelled(traffic))
    assert [part.rows + other.rows for part, other in zip(parts[::2], parts[1::2], strict=True)] == [3, 3]
    mixed = clients.run_open(server.address, traffic, keep_outputs=True)
    alone = clients.run_sequential(server.address, parts)
    assert determinism.count_equal_rows(traffic, mixed, alone) == {0: 3, 2: 3}
    changed = replace(mixed, outputs=[bytes(len(output)) for output in mixed.outputs])
    assert determinism.count_equal_rows(traffic, changed, alone)[0] < 3


def test_draw_traffic_has_requested_number_of_rows() -> None:
    traffic = determinism.draw_traffic(300)
    answered = determinism.not_cancelled(traffic)
    assert 300 <= sum(request.rows for request in answered) < 300 + determinism.MAX_ROWS
    assert 0 < len(answered) < len(traffic)
    assert {request.model for request in traffic} == {kind.model for kind in determinism.KINDS}
    assert traffic == determinism.draw_traffic(300)


def test_short_requests_are_due_while_long_ones_run() -> None:
    requests = short_among_long.mix(short_among_long.LONG_REQUESTS[1], duration=1.0, num_short=40)
    short = [request.at for request in requests if request.kind == short_among_long.SHORT]
    long = [request.at for request in requests if request.kind != short_among_long.SHORT]
    assert len(short) >= 40
    assert all(any(0 < at - start < 1.0 for start in long) for at in short)


def test_scheduling_compares_batching_modes(bench: Bench) -> None:
    section = scheduling.run(bench)
    bursts, poisson = section.tables
    assert [row[0] for row in bursts.rows] == ["step", "request"]
    assert [row[:2] for row in poisson.rows] == [("60 %", "step"), ("60 %", "request")]
    assert not any(cell == "–" for table in section.tables for row in table.rows for cell in row)


def test_short_among_long_measures_alone_and_next_to_long_requests(
    bench: Bench, server: RunningServer
) -> None:
    process = servers.Server(server.address, os.getpid(), server.app.metrics_port)
    table = short_among_long.measure(bench, process, short_among_long.LONG_REQUESTS[1:2], num_short=10)
    assert [row[0] for row in table.rows] == ["alone", "next to an interactive request of 64 chains"]
    assert not any(cell == "–" for row in table.rows for cell in row)
    assert len(short_among_long.results(table)) == 1


def test_efficiency_measures_programs_with_and_without_steps(bench: Bench) -> None:
    stepping, single_call = efficiency.run(bench).tables
    assert [row[:2] for row in (*stepping.rows, *single_call.rows)] == [
        (artifacts.LSTM, "64"),
        (artifacts.GAN, "64"),
    ]


@pytest.mark.parametrize("case", [*efficiency.STEPPING, *efficiency.SINGLE_CALL], ids=lambda case: case.model)
def test_loop_runs_every_family(bench: Bench, case: efficiency.Case) -> None:
    directory = bench.models(case.model) / case.model / "1"
    assert efficiency.Loop(directory, case, 2).rate(0.0) > 0


@pytest.mark.parametrize(
    "case", [efficiency.STEPPING[0], efficiency.SINGLE_CALL[3]], ids=lambda case: case.model
)
def test_server_rate_measures_any_operation(
    bench: Bench, server: RunningServer, case: efficiency.Case
) -> None:
    program = efficiency.Loop(bench.models(case.model) / case.model / "1", case, 2).program
    process = servers.Server(server.address, os.getpid(), server.app.metrics_port)
    assert efficiency.server_rate(process, case, program, 3) > 0


def test_determinism_compares_torchscript(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMOVAR_FORMATS", "torchscript")
    _, total = determinism.compare(bench, determinism.KINDS[1:2], "torchscript", 30)
    assert total[:2] == ("torchscript", "all")
    assert total[2] == total[3]


def test_forward_rate_is_positive(bench: Bench) -> None:
    models = bench.models(artifacts.DECODER)
    assert calls.forward_rate(models / artifacts.DECODER / "1", 2, seconds=0.0) > 0


def test_measure_queued_measures_server_with_queued_rows(bench: Bench) -> None:
    (row,) = scale.measure_queued(bench, (10,)).rows
    assert int(row[0]) >= 10
    assert "–" not in row[2:]


def test_measure_models_measures_loaded_models(bench: Bench) -> None:
    assert [row[0] for row in scale.measure_models(bench, (1,)).rows] == ["1"]


def test_scheduler_needs_at_most_one_kilobyte_per_queued_row() -> None:
    assert 0 < scale.row_bytes(1000) <= 1024
    assert scale.step_seconds(100, num_steps=10) > 0
