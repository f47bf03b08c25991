"""The benchmarks compute: their arithmetic and pages, and a miniature of each kind of load."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import artifacts, load, report, servers
from benchmarks.load import Arrival, Callers, Closed
from benchmarks.servers import bare_server
from benchmarks.statistics import Spread, latencies, percentile, ratio, short, spread
from benchmarks.suites import (
    NAMES,
    Bench,
    calls,
    chosen,
    determinism,
    efficiency,
    scale,
    scheduling,
    short_among_long,
)
from benchmarks.suites import device as on_device
from benchmarks.suites import load as load_suite
from samovar.v1 import inference_pb2 as pb
from server.runtime import Device
from tests.support.live_server import RunningServer, serving


@pytest.fixture(scope="module")
def callers() -> Iterator[Callers]:
    with load.callers() as running:
        yield running


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server over the smallest model of the benchmarks."""
    models = artifacts.copies(1, tmp_path_factory.mktemp("models"))
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def bench(models: Path, callers: Callers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Quick runs with the tiny artifacts of all tests; a server loads one of their formats."""
    directory = tmp_path_factory.mktemp("bench")
    for kept in (directory / "tiny-onnx", directory / "tiny-torchscript"):
        kept.mkdir()
        for model in models.iterdir():
            (kept / model.name).symlink_to(model)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SAMOVAR_FORMATS", "onnx")
        yield Bench(directory, callers, is_quick=True, preset="tiny")


def test_a_spread_is_the_median_with_its_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert str(spread([3.0, 1.0, 2.0])) == "2.00 (1.00–3.00)"
    assert str(spread([2.0])) == "2.00"
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_a_ratio_is_of_neighbours_not_of_medians() -> None:
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_numbers_are_printed_with_three_digits() -> None:
    assert [short(value) for value in (12345.6, 12.34, 1.234, 0.01234, np.nan)] == [
        "12,346",
        "12.3",
        "1.23",
        "0.0123",
        "–",
    ]
    assert np.isnan(percentile(np.array([]), 50))
    assert latencies([np.array([0.001, 0.003])]) == ["2.00", "2.90", "2.98"]


def test_arrivals_are_a_poisson_process() -> None:
    times = np.diff(load.poisson(50.0, 20_000, np.random.default_rng(0)))
    assert times.min() > 0
    # Exponential gaps: mean 1/50, and a standard deviation that equals it.
    assert times.mean() == pytest.approx(1 / 50, rel=0.03)
    assert times.std() == pytest.approx(1 / 50, rel=0.03)


def test_tables_and_pages() -> None:
    table = report.Table(("name", "calls/s"), (("bare", "1"), ("a|b", "200")), "Calls")
    assert report.plain(table) == "Calls\nname  calls/s\n----  -------\nbare  1\na|b   200"
    assert "| a/b | 200 |" in report.markdown(table)
    plot = report.Plot("file", "A plot", "x", "y", (report.Line("line", (1, 2), (3, 4)),))
    page = report.page([report.Section("First", "Why.", (table,), (plot,))], report.machine())
    assert "## First\n\nWhy.\n\n**Calls**" in page
    assert "![A plot](benchmarks/file.svg)" in page
    assert "torch" in page


def test_a_plot_is_a_file(tmp_path: Path) -> None:
    plot = report.Plot("file", "A plot", "x", "y", (report.Line("line", (1, 2), (3, 4)),))
    assert report.draw(plot, tmp_path / "plots").read_text().startswith("<?xml")


def test_benchmarks_are_chosen_by_name() -> None:
    assert chosen([], NAMES) == list(NAMES)
    assert chosen(["calls"], NAMES) == ["calls"]
    with pytest.raises(ValueError, match="no benchmark speed; there are: scheduling"):
        chosen(["speed"], NAMES)
    assert all(callable(load_suite(name)) for name in NAMES)


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    shown = capsys.readouterr().out
    assert [name for name in NAMES if f"  {name} " not in shown] == []


def test_a_closed_loop_counts_the_answers_of_a_bare_server(callers: Callers) -> None:
    with bare_server(100) as bare:
        seen = callers.closed(Closed(bare.address, "/any/Method", b"x", callers=9, seconds=0.5))
        assert bare.cpu_seconds >= 0
        assert bare.resident_bytes > 1 << 20
    assert len(seen.latencies) > 9
    assert (seen.latencies > 0).all()
    assert seen.rate == pytest.approx(len(seen.latencies) / seen.seconds)


def test_the_request_of_a_closed_loop_is_one_that_the_server_answers(
    callers: Callers, tiny: RunningServer
) -> None:
    request = calls.request(artifacts.TINY, 5, f"{artifacts.TINY}-0")
    assert pb.TransformRequest.FromString(request).inputs["point"].shape == [5, 2]
    assert len(callers.closed(Closed(tiny.address, calls.METHOD, request, 1, 0.05)).latencies)


def test_an_open_loop_keeps_answers_and_errors(callers: Callers, server: RunningServer) -> None:
    due = [Arrival(0.0, "walk", "digits-diffusion", 2, seed, {"steps": 2}) for seed in (1, 1, 2)]
    seen = callers.open(server.address, due, keep=True)
    assert not seen.errors
    assert seen.outputs[0] == seen.outputs[1] != seen.outputs[2]
    assert len(seen.of("walk")) == 3
    assert len(seen.of("other")) == 0
    wrong = Arrival(0.0, "wrong", "digits-diffusion", 1, 1, {"steps": -1})
    failed = callers.open(server.address, [*due, wrong])
    assert "steps" in failed.errors[0]
    assert len(failed.of("wrong")) == 0
    assert failed.rate == pytest.approx(3 / failed.seconds)


def test_impatient_calls_are_cancelled(callers: Callers, server: RunningServer) -> None:
    long = Arrival(0.0, "long", "digits-ebm", 1, 1, {"steps": 10_000}, patience=0.05)
    seen = callers.open(server.address, [long, replace(long, parameters={"steps": 1}, patience=None)], True)
    assert seen.errors == [load.CANCELLED]
    assert len(seen.of("long")) == 1


def test_a_server_is_charged_for_its_children(callers: Callers) -> None:
    alone = servers.Server("", callers.run(os.getpid))
    both = servers.Server("", os.getpid())
    assert 0 < alone.cpu_seconds < both.cpu_seconds


def test_split_traffic_is_compared_row_by_row(callers: Callers, server: RunningServer) -> None:
    traffic = [Arrival(0.0, "a", "digits-diffusion", 3, seed, {"steps": 2}, 5) for seed in (1, 2)]
    traffic.insert(1, replace(traffic[0], parameters={"steps": 1000}, patience=0.001))
    parts = determinism.split(determinism.staying(traffic))
    assert [part.rows + other.rows for part, other in zip(parts[::2], parts[1::2], strict=True)] == [3, 3]
    together = callers.open(server.address, traffic, keep=True)
    alone = callers.one_by_one(server.address, parts)
    assert determinism.same(traffic, together, alone) == {0: 3, 2: 3}
    spoilt = replace(together, outputs=[bytes(len(output)) for output in together.outputs])
    assert determinism.same(traffic, spoilt, alone)[0] < 3


def test_drawn_traffic_has_the_rows_that_were_asked_for() -> None:
    traffic = determinism.draw(300)
    staying = determinism.staying(traffic)
    assert 300 <= sum(arrival.rows for arrival in staying) < 300 + determinism.MOST_ROWS
    assert 0 < len(staying) < len(traffic)
    assert {arrival.model for arrival in traffic} == {kind.model for kind in determinism.KINDS}
    assert traffic == determinism.draw(300)


def test_single_steps_come_due_while_chains_are_under_way() -> None:
    due = short_among_long.among(short_among_long.NEIGHBOURS[1], length=1.0, number=40)
    single = [arrival.at for arrival in due if arrival.kind == short_among_long.SINGLE]
    begun = [arrival.at for arrival in due if arrival.kind != short_among_long.SINGLE]
    assert len(single) >= 40
    assert all(any(0 < at - start < 1.0 for start in begun) for at in single)


def test_quick_schedulings_are_compared(bench: Bench) -> None:
    section = scheduling.run(bench)
    bursts, poisson = section.tables
    assert [row[0] for row in bursts.rows] == ["step", "request"]
    assert [row[:2] for row in poisson.rows] == [("60 %", "step"), ("60 %", "request")]
    assert not any(cell == "–" for table in section.tables for row in table.rows for cell in row)


def test_single_steps_are_measured_alone_and_among_chains(bench: Bench, server: RunningServer) -> None:
    process = servers.Server(server.address, os.getpid(), server.app.metrics_port)
    among = short_among_long.table(bench, process, short_among_long.NEIGHBOURS[1:2], number=10)
    assert [row[0] for row in among.rows] == ["alone", "among an interactive request of 64 chains"]
    assert not any(cell == "–" for row in among.rows for cell in row)


def test_quick_efficiency_is_of_steps_and_of_one_shot(bench: Bench) -> None:
    steps, one_shot = efficiency.run(bench).tables
    assert [row[:2] for row in (*steps.rows, *one_shot.rows)] == [
        (artifacts.LSTM, "64"),
        (artifacts.GAN, "64"),
    ]


@pytest.mark.parametrize("case", [*efficiency.STEPPING, *efficiency.ONE_SHOT], ids=lambda case: case.model)
def test_bare_loops_run_every_family(bench: Bench, case: efficiency.Case) -> None:
    directory = bench.models(case.model) / case.model / "1"
    assert efficiency.Loop(directory, case, 2).rate(0.0) > 0
    assert on_device.call_seconds(directory, case, 2, Device()) > 0


@pytest.mark.parametrize(
    "case", [efficiency.STEPPING[0], efficiency.ONE_SHOT[3]], ids=lambda case: case.model
)
def test_served_rates_are_of_any_operation(
    bench: Bench, server: RunningServer, case: efficiency.Case
) -> None:
    program = efficiency.Loop(bench.models(case.model) / case.model / "1", case, 2).program
    process = servers.Server(server.address, os.getpid(), server.app.metrics_port)
    assert efficiency.served_rate(process, case, program, 3) > 0


def test_the_device_says_where_there_is_none(bench: Bench) -> None:
    section = on_device.run(bench)
    assert section.tables or "no GPU" in section.text


def test_the_bytes_of_torchscript_are_compared(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMOVAR_FORMATS", "torchscript")
    _, everything = determinism.compare(bench, determinism.KINDS[1:2], "torchscript", 30)
    assert everything[:2] == ("torchscript", "all")
    assert everything[2] == everything[3]


def test_a_raw_forward_has_a_rate(bench: Bench) -> None:
    models = bench.models(artifacts.DECODER)
    assert calls.raw_rate(models / artifacts.DECODER / "1", 2, seconds=0.0) > 0


def test_a_server_is_measured_while_rows_wait(bench: Bench) -> None:
    (row,) = scale.waiting(bench, (10,)).rows
    assert int(row[0]) >= 10
    assert "–" not in row[2:]


def test_servers_are_measured_by_how_many_models_they_load(bench: Bench) -> None:
    assert [row[0] for row in scale.loaded(bench, (1,)).rows] == ["1"]


def test_the_scheduler_holds_a_waiting_row_in_a_kilobyte() -> None:
    assert 0 < scale.row_bytes(1000) <= 1024
    assert scale.turn_seconds(100, turns=10) > 0
