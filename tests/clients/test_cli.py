"""The command at the keyboard: what it prints, writes, refuses, and how it ends."""

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from samovar.cli.main import main
from samovar.cli.progress import ProgressBar
from tests.support.fake_server import Counting, Server, bad_request, images, overloaded


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def samovar(server: Server, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*words: object) -> Ended:
        try:
            code = main(["--address", server.address, *map(str, words)])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, images(0, np.arange(6)))
    return path


def cells(text: str) -> list[list[str]]:
    return [re.split(r"  +", line) for line in text.splitlines()]


def test_models_are_listed(samovar: Command) -> None:
    ended = samovar("models")
    header, newest, older, speaker = cells(ended.out)
    assert header == ["MODEL", "VERSION", "FORMATS", "FAMILY", "OPERATIONS", "SCORE", "QUALITY"]
    assert newest == [
        "counter",
        "2*",
        "onnx,torchscript",
        "arithmetic",
        "sample,score,reconstruct,encode,decode,classify",
        "lower bound",
        "bits/dim 1.25 ± 0.01",
    ]
    assert (older[1], speaker[0], ended.code) == ("1", "speaker", 0)


def test_a_model_is_described(samovar: Command) -> None:
    out = samovar("model", "counter").out
    for line in (
        "counter 2 (default): Counts.",
        "  parameter   steps=4  (integer 1..50)  counts",
        "  parameter   order=up  (choice up | down)",
        "  input       label: int64[] in 0..3, optional, 0 by default",
        "  output      image: uint8[8, 6]",
        "  score       lower bound on the log-density; integers 0..16",
        "  bits/dim 1.25 ± 0.01  on 10 rows",
    ):
        assert line in out.splitlines()


def test_the_server_states_its_limits(samovar: Command) -> None:
    assert ["", "largest message", "64 MiB"] in cells(samovar("server").out)


def test_samples_go_into_a_file_by_its_ending(samovar: Command, tmp_path: Path) -> None:
    expected = images(7, np.arange(2, 6))
    for name in ("rows.npy", "rows.npz", "rows.png"):
        path = tmp_path / name
        ended = samovar("sample", "counter", "-n", 4, "--seed", 7, "--first-row", 2, "-o", path)
        assert ended.code == 0
        assert f"4 rows in {path}; version 2 (onnx), seed 7, 4 steps, bitwise" in ended.out
    assert np.load(tmp_path / "rows.npy").tolist() == expected.tolist()
    with np.load(tmp_path / "rows.npz") as saved:
        assert list(saved) == ["image", "count"]
        assert saved["count"].tolist() == [2, 3, 4, 5]
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size == (2 * 48 + 2, 2 * 64 + 2)
        assert picture.getpixel((0, 0)) == round(9 / 16 * 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "rows.npz", "rows.png"]


def test_text_is_printed_or_written(samovar: Command, tmp_path: Path) -> None:
    assert samovar("sample", "speaker", "-n", 2).out == "abc\nbcd\n"
    samovar("sample", "speaker", "-n", 2, "-o", tmp_path / "lines.txt")
    assert (tmp_path / "lines.txt").read_text() == "abc\nbcd\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "rows.jpg"], "rows.jpg: expected a name that ends in .npy, .npz, .png, .txt"),
        (["-o", "nowhere/rows.npy"], "there is no directory nowhere"),
        (["-o", "rows.txt"], ".txt is for text, and image is uint8[8, 6]; use .npy or .npz"),
        ([], "say where the rows go: -o FILE.npy, FILE.npz, or FILE.png for images"),
        (
            ["-o", "a.npy", "--param", "step=3"],
            "has no parameter 'step'; it has: steps, scale, greedy, order",
        ),
        (["-o", "a.npy", "--param", "steps=many"], "expected a value of type integer"),
        (["-o", "a.npy", "--param", "greedy=1"], "expected a value of type boolean"),
        (["-o", "a.npy", "--param", "steps"], "expected NAME=VALUE"),
        (["-o", "a.npy", "--label", "dog"], "expected classes of counter: ant, bee, cat"),
        (["-o", "a.npy", "--input", "label=dog"], "expected numbers or FILE.npy"),
        (["-o", "a.npy", "--input", "absent.npy"], "absent.npy: No such file"),
        (["-o", "a.npy", "-n", "-1"], "expected an integer of at least 0, got -1"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(
    samovar: Command, service: Counting, words: list[str], said: str
) -> None:
    ended = samovar("sample", "counter", *words)
    assert ended.code == 2
    assert said in ended.err
    assert service.requests == []


def test_parameters_have_the_types_that_the_model_declares(
    samovar: Command, service: Counting, tmp_path: Path
) -> None:
    words = [
        word for text in ("steps=3", "scale=1", "greedy=true", "order=down") for word in ("--param", text)
    ]
    assert samovar("sample", "counter", "-o", tmp_path / "a.npy", *words).code == 0
    (request,) = service.requests
    assert {name: value.WhichOneof("value") for name, value in request.parameters.items()} == {  # type: ignore[attr-defined]
        "steps": "integer_value",
        "scale": "float_value",
        "greedy": "boolean_value",
        "order": "choice_value",
    }


@pytest.mark.parametrize("words", [["--label", "cat"], ["--label", "2"], ["--input", "label=2"]])
def test_a_class_is_named_or_numbered(samovar: Command, tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "cats.npy"
    assert samovar("sample", "counter", "-n", 3, "--seed", 0, *words, "-o", path).code == 0
    assert np.load(path)[:, 0, 0].tolist() == [2, 3, 4]


def test_previews_refresh_the_file(server: Server, tmp_path: Path) -> None:
    """The fake sends a preview, then the last rows, then waits: what is on disk by then is a preview."""
    server.service.holds = True
    path = tmp_path / "rows.npy"
    words = ["sample", "counter", "-n", "6", "--seed", "4", "--preview-every", "2", "-o", str(path)]
    with subprocess.Popen([sys.executable, "-m", "samovar", "--address", server.address, *words]) as process:
        assert server.service.reached.wait(30)
        while not path.exists():
            assert process.poll() is None
        preview = np.load(path)
        process.send_signal(signal.SIGINT)
    assert preview[:, 0, 0].tolist() == [2, 2, 3, 3, 4, 4]


def test_ctrl_c_cancels_the_call(server: Server, tmp_path: Path) -> None:
    server.service.holds = True
    words = ["sample", "counter", "-n", "6", "-o", str(tmp_path / "a.npy")]
    with subprocess.Popen(
        [sys.executable, "-m", "samovar", "--address", server.address, *words],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert server.service.reached.wait(30)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "\nsamovar: cancelled\n")
    assert server.service.cancelled.wait(10)
    assert not list(tmp_path.iterdir())


def test_scores_are_a_table_that_says_what_they_are(samovar: Command, rows: Path) -> None:
    ended = samovar("score", "counter", "--input", rows, "--param", "draws=20")
    kind, mean, blank, header, *lines = ended.out.splitlines()
    assert kind == "lower bound on the log-density in nats, 20 draws a row; 48 dimensions, integers 0..16"
    assert mean == "mean of 6 rows: -120.3125 ± 36.7561 nats, 3.6161 ± 1.1047 bits/dim"
    assert (blank, header.split()) == ("", ["row", "nats", "bits/dim"])
    assert re.split(r"  +", lines[1]) == ["1", "-48.1250 ± 0.5000", "1.4465"]
    assert len(lines) == 6


def test_scores_do_not_depend_on_how_the_rows_were_sent(samovar: Command, rows: Path, tmp_path: Path) -> None:
    """Six rows go in two calls of at most four: the fake's scores depend on the row's index."""
    path = tmp_path / "scores.csv"
    assert samovar("score", "counter", "--input", f"image={rows}", "-o", path).code == 0
    header, *lines = path.read_text().splitlines()
    assert header == "row,nats,standard_error,bits_per_dimension,brightness"
    assert [float(line.split(",")[1]) for line in lines] == [-i * 48.125 for i in range(6)]


def test_reconstructions_are_shown_below_their_originals(
    samovar: Command, rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.png"
    assert samovar("reconstruct", "counter", "--input", rows, "-o", path).code == 0
    content = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    assert content.shape == (2 * 64 + 2, 6 * 48 + 5 * 2)
    assert content[0, ::50].tolist() == content[66, ::50].tolist() == [0, 16, 32, 48, 64, 80]


def test_latents_go_there_and_back(samovar: Command, rows: Path, tmp_path: Path) -> None:
    latents, again = tmp_path / "latents.npz", tmp_path / "again.npy"
    assert samovar("encode", "counter", "--input", rows, "-o", latents).code == 0
    assert samovar("decode", "counter", "--input", latents, "-o", again).code == 0
    assert np.load(again).tolist() == np.load(rows).tolist()


def test_classes_are_named(samovar: Command, rows: Path) -> None:
    header, *lines = cells(samovar("classify", "counter", "--input", rows).out)
    assert header == ["row", "class", "probability"]
    assert [line[1] for line in lines] == ["ant", "bee", "cat", "ant", "bee", "cat"]
    assert lines[0][2] == "0.8000"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["score", "counter"], "say which rows: --input FILE.npy"),
        (["encode", "counter", "--input", "latents.png", "-o", "x.npy"], "latents.png: No such file"),
        (["encode", "counter", "-o", "x.png"], "expected a name that ends in .npy, .npz"),
        (["encode", "counter"], "the following arguments are required: -o"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_transforms_say_what_they_miss(samovar: Command, words: list[str], said: str) -> None:
    ended = samovar(*words)
    assert ended.code == 2
    assert said in ended.err


def test_a_refusal_lists_its_violations_and_no_traceback(
    samovar: Command, service: Counting, tmp_path: Path
) -> None:
    service.refusals = [bad_request(rows="expected 1 to 10, got 11", seed="expected an integer")]
    ended = samovar("sample", "counter", "-o", tmp_path / "a.npy")
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "samovar: invalid request",
        "  rows: expected 1 to 10, got 11",
        "  seed: expected an integer",
    ]


def test_an_overloaded_server_says_when_to_come_back(
    samovar: Command, service: Counting, tmp_path: Path
) -> None:
    service.refusals = [overloaded()]
    ended = samovar("sample", "counter", "-o", tmp_path / "a.npy")
    assert (ended.code, ended.err) == (1, "samovar: 1000 rows wait\nTry again in 2.5 s.\n")


def test_an_unknown_model_or_operation_is_answered_with_the_known_ones(samovar: Command, rows: Path) -> None:
    assert "there are: counter, speaker" in samovar("model", "count").err
    ended = samovar("energy", "counter", "--input", rows)
    assert (ended.code, "it has sample, score" in ended.err) == (1, True)


def test_an_absent_server_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "127.0.0.1:1", "models"]) == 1
    assert "Is a server listening at 127.0.0.1:1? Name another with --address." in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "samovar sample NAME -n 64 --seed 7 -o grid.png" in capsys.readouterr().out


class Terminal(io.StringIO):
    """A stream that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_for_a_terminal_only() -> None:
    ticks: Iterator[float] = iter([0.0, 0.0, 2.0])
    terminal, pipe = Terminal(), io.StringIO()
    with ProgressBar(40, terminal, clock=lambda: next(ticks)) as bar:
        bar.show(10)
    with ProgressBar(40, pipe) as bar:
        bar.show(10)
    assert "10/40 rows, 5 rows/s, 6 s left" in terminal.getvalue()
    assert pipe.getvalue() == ""


def test_a_watched_sample_asks_for_previews_to_have_progress_to_show(server: Server, tmp_path: Path) -> None:
    terminal, its_end = os.openpty()
    words = ["--address", server.address, "sample", "counter", "-n", "4", "-o", str(tmp_path / "a.npy")]
    subprocess.run([sys.executable, "-m", "samovar", *words], stderr=its_end, check=True)
    os.close(its_end)
    with open(terminal, "rb", buffering=0) as screen:
        shown = re.findall(rb"(\d)/4 rows", screen.read(65536))
    assert server.service.requests[0].preview_every == 1  # type: ignore[attr-defined]
    assert shown == [b"0", b"1", b"2", b"3", b"3", b"3", b"4"]


def test_the_address_may_come_from_the_environment(server: Server) -> None:
    environment = {**os.environ, "SAMOVAR_ADDRESS": server.address}
    command = [sys.executable, "-m", "samovar", "server"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "abacus" in ended.stdout
