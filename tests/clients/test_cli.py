"""Tests of the command line: output, files, errors and exit codes."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from samovar.cli.commands import COMMANDS
from samovar.cli.main import main
from samovar.cli.parser import build_parser
from samovar.cli.progress import ProgressBar
from tests.support.fake_server import FakeServer, FakeService, bad_request, images, overloaded


class Completed(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


Command = Callable[..., Completed]


@pytest.fixture
def samovar(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Completed:
        try:
            code = main(["--address", server.address, *map(str, arguments)])
        except SystemExit as error:
            code = int(error.code or 0)
        return Completed(code, *capsys.readouterr())

    return run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.npy"
    np.save(path, images(0, np.arange(6)))
    return path


def split_columns(text: str) -> list[list[str]]:
    return [re.split(r"  +", line) for line in text.splitlines()]


def process_command(server: FakeServer, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "samovar", "--address", server.address, *map(str, arguments)]


def test_models_command_lists_models_and_versions(samovar: Command) -> None:
    completed = samovar("models")
    header, newest, older, other = split_columns(completed.out)
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
    assert (older[1], other[0], completed.code) == ("1", "speaker", 0)


def test_model_command_describes_parameters_inputs_and_quality(samovar: Command) -> None:
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


def test_server_command_prints_limits(samovar: Command) -> None:
    assert ["", "message size limit", "64 MiB"] in split_columns(samovar("server").out)


def test_sample_writes_format_of_file_suffix(samovar: Command, tmp_path: Path) -> None:
    expected = images(7, np.arange(2, 6))
    for name in ("rows.npy", "rows.npz", "rows.png"):
        path = tmp_path / name
        completed = samovar("sample", "counter", "-n", 4, "--seed", 7, "--first-row", 2, "-o", path)
        assert completed.code == 0
        assert f"4 rows in {path}; version 2 (onnx), seed 7, 4 steps, bitwise" in completed.out
    assert np.load(tmp_path / "rows.npy").tolist() == expected.tolist()
    with np.load(tmp_path / "rows.npz") as saved:
        assert list(saved) == ["image", "count"]
        assert saved["count"].tolist() == [2, 3, 4, 5]
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size == (2 * 48 + 2, 2 * 64 + 2)
        assert picture.getpixel((0, 0)) == round(9 / 16 * 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.npy", "rows.npz", "rows.png"]


def test_sample_of_text_is_printed_or_written(samovar: Command, tmp_path: Path) -> None:
    assert samovar("sample", "speaker", "-n", 2).out == "abc\nbcd\n"
    samovar("sample", "speaker", "-n", 2, "-o", tmp_path / "lines.txt")
    assert (tmp_path / "lines.txt").read_text() == "abc\nbcd\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "rows.jpg"], "rows.jpg: expected a file name that ends in .npy, .npz, .png, .txt"),
        (["-o", "nowhere/rows.npy"], "nowhere/rows.npy: no such directory: nowhere"),
        (
            ["-o", "rows.txt"],
            "cannot write rows.txt: .txt files hold text, got image uint8[8, 6]; use .npy or .npz",
        ),
        ([], "missing output: use -o FILE.npy, FILE.npz, or FILE.png for images"),
        (
            ["-o", "a.npy", "--param", "step=3"],
            "unknown parameter 'step' of sample; expected one of: steps, scale, greedy, order",
        ),
        (["-o", "a.npy", "--param", "steps=many"], "expected a value of type integer"),
        (["-o", "a.npy", "--param", "greedy=1"], "expected a value of type boolean"),
        (["-o", "a.npy", "--param", "steps"], "expected NAME=VALUE"),
        (["-o", "a.npy", "--label", "dog"], "expected classes of counter: ant, bee, cat"),
        (["-o", "a.npy", "--input", "label=dog"], "expected numbers or FILE.npy"),
        (["-o", "a.npy", "--input", "absent.npy"], "cannot read absent.npy: No such file"),
        (["-o", "a.npy", "-n", "-1"], "expected an integer >= 0, got -1"),
    ],
)
def test_sample_rejects_wrong_usage_before_any_request(
    samovar: Command, service: FakeService, arguments: list[str], message: str
) -> None:
    completed = samovar("sample", "counter", *arguments)
    assert completed.code == 2
    assert message in completed.err
    assert service.requests == []


def test_param_values_have_declared_types(samovar: Command, service: FakeService, tmp_path: Path) -> None:
    parameters = [
        argument
        for value in ("steps=3", "scale=1", "greedy=true", "order=down")
        for argument in ("--param", value)
    ]
    assert samovar("sample", "counter", "-o", tmp_path / "a.npy", *parameters).code == 0
    (request,) = service.requests
    assert {name: value.WhichOneof("value") for name, value in request.parameters.items()} == {  # type: ignore[attr-defined]
        "steps": "integer_value",
        "scale": "float_value",
        "greedy": "boolean_value",
        "order": "choice_value",
    }


@pytest.mark.parametrize("arguments", [["--label", "cat"], ["--label", "2"], ["--input", "label=2"]])
def test_label_accepts_class_name_or_index(samovar: Command, tmp_path: Path, arguments: list[str]) -> None:
    path = tmp_path / "cats.npy"
    assert samovar("sample", "counter", "-n", 3, "--seed", 0, *arguments, "-o", path).code == 0
    assert np.load(path)[:, 0, 0].tolist() == [2, 3, 4]


def test_preview_every_writes_unfinished_rows(server: FakeServer, tmp_path: Path) -> None:
    """The fake server sends a preview and the last rows, and then blocks: the file holds the preview."""
    server.service.blocks = True
    path = tmp_path / "rows.npy"
    arguments = ("sample", "counter", "-n", 6, "--seed", 4, "--preview-every", 2, "-o", path)
    with subprocess.Popen(process_command(server, *arguments)) as process:
        assert server.service.blocked.wait(500)
        while not path.exists():
            assert process.poll() is None
        preview = np.load(path)
        process.send_signal(signal.SIGINT)
    assert preview[:, 0, 0].tolist() == [2, 2, 3, 3, 4, 4]


def test_ctrl_c_cancels_call_and_exits_with_130(server: FakeServer, tmp_path: Path) -> None:
    server.service.blocks = True
    command = process_command(server, "sample", "counter", "-n", 6, "-o", tmp_path / "a.npy")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert server.service.blocked.wait(500)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=500)
    assert (process.returncode, err) == (130, "\nsamovar: cancelled\n")
    assert server.service.cancelled.wait(500)
    assert not list(tmp_path.iterdir())


def test_score_prints_kind_mean_and_table(samovar: Command, rows: Path) -> None:
    completed = samovar("score", "counter", "--input", rows, "--param", "draws=20")
    kind, mean, blank, header, *lines = completed.out.splitlines()
    assert kind == "lower bound on the log-density in nats, 20 draws per row; 48 dimensions, integers 0..16"
    assert mean == "mean of 6 rows: -120.3125 ± 36.7561 nats, 3.6161 ± 1.1047 bits/dim"
    assert (blank, header.split()) == ("", ["row", "nats", "bits/dim"])
    assert re.split(r"  +", lines[1]) == ["1", "-48.1250 ± 0.5000", "1.4465"]
    assert len(lines) == 6


def test_score_in_several_calls_keeps_row_indices(samovar: Command, rows: Path, tmp_path: Path) -> None:
    """Six rows take two calls of at most four rows; a score of the fake server depends on the row index."""
    path = tmp_path / "scores.csv"
    assert samovar("score", "counter", "--input", f"image={rows}", "-o", path).code == 0
    header, *lines = path.read_text().splitlines()
    assert header == "row,nats,standard_error,bits_per_dimension,brightness"
    assert [float(line.split(",")[1]) for line in lines] == [-i * 48.125 for i in range(6)]


def test_reconstruct_png_shows_originals_above_reconstructions(
    samovar: Command, rows: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.png"
    assert samovar("reconstruct", "counter", "--input", rows, "-o", path).code == 0
    content = np.asarray(Image.open(io.BytesIO(path.read_bytes())))
    assert content.shape == (2 * 64 + 2, 6 * 48 + 5 * 2)
    assert content[0, ::50].tolist() == content[66, ::50].tolist() == [0, 16, 32, 48, 64, 80]


def test_decode_inverts_encode(samovar: Command, rows: Path, tmp_path: Path) -> None:
    latents, again = tmp_path / "latents.npz", tmp_path / "again.npy"
    assert samovar("encode", "counter", "--input", rows, "-o", latents).code == 0
    assert samovar("decode", "counter", "--input", latents, "-o", again).code == 0
    assert np.load(again).tolist() == np.load(rows).tolist()


def test_classify_prints_class_names(samovar: Command, rows: Path) -> None:
    header, *lines = split_columns(samovar("classify", "counter", "--input", rows).out)
    assert header == ["row", "class", "probability"]
    assert [line[1] for line in lines] == ["ant", "bee", "cat", "ant", "bee", "cat"]
    assert lines[0][2] == "0.8000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "counter"], "missing input: use --input FILE.npy"),
        (
            ["encode", "counter", "--input", "latents.png", "-o", "x.npy"],
            "cannot read latents.png: No such file",
        ),
        (["encode", "counter", "-o", "x.png"], "expected a file name that ends in .npy, .npz"),
        (["encode", "counter"], "the following arguments are required: -o"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_command_without_required_argument_names_it(
    samovar: Command, arguments: list[str], message: str
) -> None:
    completed = samovar(*arguments)
    assert completed.code == 2
    assert message in completed.err


def test_rejected_request_prints_violations_without_traceback(
    samovar: Command, service: FakeService, tmp_path: Path
) -> None:
    service.errors = [bad_request(rows="expected 1 to 10, got 11", seed="expected an integer")]
    completed = samovar("sample", "counter", "-o", tmp_path / "a.npy")
    assert completed.code == 1
    assert completed.err.splitlines() == [
        "samovar: invalid request",
        "  rows: expected 1 to 10, got 11",
        "  seed: expected an integer",
    ]


def test_overloaded_server_prints_retry_delay(samovar: Command, service: FakeService, tmp_path: Path) -> None:
    service.errors = [overloaded()]
    completed = samovar("sample", "counter", "-o", tmp_path / "a.npy")
    assert (completed.code, completed.err) == (1, "samovar: 1000 rows are queued\nRetry in 2.5 s.\n")


def test_unknown_model_or_operation_lists_known_ones(samovar: Command, rows: Path) -> None:
    assert "expected one of: counter, speaker" in samovar("model", "count").err
    completed = samovar("energy", "counter", "--input", rows)
    assert (completed.code, "it supports sample, score" in completed.err) == (1, True)


def test_unreachable_server_prints_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--address", "127.0.0.1:1", "models"]) == 1
    assert (
        "Is a server listening at 127.0.0.1:1? Set another address with --address." in capsys.readouterr().err
    )


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "samovar sample NAME -n 64 --seed 7 -o grid.png" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_command_shows_examples_that_parse(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "samovar"
        assert build_parser("").parse_args(arguments).command == command


@pytest.mark.parametrize("option", ["--variant", "--method"])
def test_variant_and_its_former_name_select_variant(samovar: Command, tmp_path: Path, option: str) -> None:
    completed = samovar("sample", "counter", option, "inpaint", "-o", tmp_path / "a.npy")
    assert completed.code == 1
    assert "unknown variant 'inpaint' of sample" in completed.err


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["complete", "speaker"]])
def test_closed_pipe_ends_command_silently_with_141(server: FakeServer, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    completed = subprocess.run(
        process_command(server, *arguments), stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (completed.returncode, completed.stderr) == (141, "")


def test_full_disk_fails_with_one_line(server: FakeServer) -> None:
    with open("/dev/full", "w") as full:
        completed = subprocess.run(
            process_command(server, "models"), stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert completed.returncode == 1
    assert re.fullmatch(r"samovar: .*No space left on device\n", completed.stderr)


@pytest.mark.slow
def test_pipe_closed_during_output_ends_command_silently_with_141(server: FakeServer, tmp_path: Path) -> None:
    """The table does not fit in the buffer of a pipe: the command is still writing when `head` exits."""
    path = tmp_path / "rows.npy"
    np.save(path, images(0, np.arange(2000)).repeat(10, axis=0))
    command = shlex.join(process_command(server, "score", "counter", "--input", path))
    script = f"{command} | head -n 1; exit ${{PIPESTATUS[0]}}"
    completed = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (completed.returncode, completed.stderr) == (141, "")
    assert completed.stdout.startswith("lower bound on the log-density")


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_bar_writes_to_terminals_only() -> None:
    ticks: Iterator[float] = iter([0.0, 0.0, 2.0])
    terminal, pipe = Terminal(), io.StringIO()
    with ProgressBar(40, terminal, clock=lambda: next(ticks)) as bar:
        bar.update(10)
    with ProgressBar(40, pipe) as bar:
        bar.update(10)
    assert "10/40 rows, 5 rows/s, 6 s left" in terminal.getvalue()
    assert pipe.getvalue() == ""


def test_sample_on_terminal_requests_previews_for_progress(server: FakeServer, tmp_path: Path) -> None:
    terminal, stderr = os.openpty()
    command = process_command(server, "sample", "counter", "-n", 4, "-o", tmp_path / "a.npy")
    subprocess.run(command, stderr=stderr, check=True)
    os.close(stderr)
    with open(terminal, "rb", buffering=0) as screen:
        counts = re.findall(rb"(\d)/4 rows", screen.read(65536))
    assert server.service.requests[0].preview_every == 1  # type: ignore[attr-defined]
    assert counts == [b"0", b"1", b"2", b"3", b"3", b"3", b"4"]


def test_address_is_read_from_environment(server: FakeServer) -> None:
    environment = {**os.environ, "SAMOVAR_ADDRESS": server.address}
    command = [sys.executable, "-m", "samovar", "server"]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "abacus" in completed.stdout
