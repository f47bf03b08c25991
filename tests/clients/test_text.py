"""Tests of tokens, text completion and MIDI files."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import samovar
from samovar import midi, text, tokens
from samovar.cli.main import main
from tests.support.datasets import CONTEXT
from tests.support.live_server import HANG_SECONDS, serving


@pytest.fixture(scope="module")
def address(models_of: Callable[..., Path]) -> Iterator[str]:
    """Address of a server with two untrained models of tokens, one of letters and one of pitches."""
    with serving(models_of("letters-lstm", "pitches-lstm", formats=("onnx",))) as running:
        yield running.address


@pytest.fixture
def client(address: str) -> Iterator[samovar.Client]:
    with samovar.Client(address, timeout=HANG_SECONDS) as client:
        yield client


@pytest.fixture
def command(address: str, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        code = main(["--address", address, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def letters(client: samovar.Client) -> samovar.DataSpec:
    return client.model("letters-lstm").data_spec


def test_tokens_round_trip_characters(letters: samovar.DataSpec) -> None:
    rows = tokens.encode(["abba", ""], letters)
    assert rows.dtype == np.uint8
    assert rows[:, :5].tolist() == [[3, 4, 4, 3, 0], [0] * 5]
    assert tokens.decode(rows, letters) == ["abba", ""]


def test_tokens_of_several_characters_are_separated_by_spaces(client: samovar.Client) -> None:
    data_spec = client.model("pitches-lstm").data_spec
    rows = tokens.encode(["60 hold  67\nend"], data_spec)
    assert rows[0, :5].tolist() == [4, 2, 11, 1, 0]
    assert tokens.decode(rows, data_spec) == ["60 hold 67 end"]


def test_complete_is_equal_for_equal_seeds(client: samovar.Client) -> None:
    first, repeated = (text.complete(client, "letters-lstm", "abc", options={"seed": 5}) for _ in range(2))
    other = text.complete(client, "letters-lstm", "abc", options={"seed": 6})
    assert first == repeated != other
    assert first.startswith("abc")
    assert len(first) == CONTEXT
    assert len(text.complete(client, "letters-lstm", tokens=7, temperature=0.5)) == 7


def test_stream_yields_text_in_pieces(client: samovar.Client) -> None:
    pieces = list(text.stream(client, "letters-lstm", "abc", tokens=9, options={"seed": 5}))
    assert 1 < len(pieces) <= 9
    assert "abc" + "".join(pieces) == text.complete(
        client, "letters-lstm", "abc", tokens=9, options={"seed": 5}
    )


def test_complete_separates_words_by_spaces(client: samovar.Client) -> None:
    music = text.complete(client, "pitches-lstm", "60 60", tokens=8, stop=0, options={"seed": 5})
    assert music.startswith("60 60 ")
    assert len(music.split(" ")) == 10


def test_complete_accepts_stop_as_text(client: samovar.Client) -> None:
    whole = text.complete(client, "letters-lstm", options={"seed": 8})
    stop = whole[5]
    stopped = text.complete(client, "letters-lstm", stop=stop, options={"seed": 8})
    assert stopped == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize(
    ("prompt", "stop", "message"),
    [
        ("abz", 0, r"prompt: unknown token 'z' at position 2; expected tokens of '\\n abcdefgh'"),
        ("a" * 25, 0, "prompt: expected at most 24 tokens, got 25"),
        ("a", "x", r"parameters\[stop\]: unknown token 'x'"),
        ("a", "ab", r"parameters\[stop\]: expected one token, got 2: 'ab'"),
    ],
)
def test_complete_rejects_unknown_tokens_before_sending(
    client: samovar.Client, prompt: str, stop: int | str, message: str
) -> None:
    with pytest.raises(samovar.InvalidRequest, match=message):
        text.complete(client, "letters-lstm", prompt, stop=stop)


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (np.full((1, CONTEXT), 11), {}, r"inputs\[prompt\]: expected elements from 0 to 10, got 11"),
        (
            np.ones((1, 25)),
            {},
            r"inputs\[prompt\]: expected uint8\[rows, 24\] from 0 to 10, got uint8\[1, 25\]",
        ),
        (np.ones((1, 24)), {"tokens": 25}, r"parameters\[tokens\]: expected an integer from 1 to 24, got 25"),
        (np.ones((1, 24)), {"tokens": 0}, r"parameters\[tokens\]: expected an integer from 1 to 24, got 0"),
        (np.ones((1, 24)), {"top_p": 1.5}, r"parameters\[top_p\]: expected a float from 0 to 1, got 1.5"),
        (np.ones((1, 24)), {"stop": 11}, r"parameters\[stop\]: expected an integer from 0 to 10, got 11"),
    ],
)
def test_server_rejects_inputs_and_parameters_out_of_range(
    client: samovar.Client, inputs: np.ndarray, parameters: dict[str, float], message: str
) -> None:
    with pytest.raises(samovar.InvalidRequest, match=message):
        client.sample("letters-lstm", inputs={"prompt": inputs.astype(np.uint8)}, parameters=parameters)


def test_score_sums_tokens_and_divides_bits_by_row_length(
    client: samovar.Client, letters: samovar.DataSpec
) -> None:
    scores = client.score("letters-lstm", tokens.encode(["abcdef", "ab"], letters))
    assert scores.kind is samovar.ScoreKind.EXACT
    assert scores.outputs["length"].tolist() == [6, 2]
    log_masses = scores.outputs["log_mass_by_token"]
    np.testing.assert_allclose(log_masses.sum(1), scores.nats, rtol=1e-5)
    assert scores.bits_per_dimension is not None
    np.testing.assert_allclose(scores.bits_per_dimension, -scores.nats / np.log(2) / [6, 2], rtol=1e-5)


def test_unsupported_operation_has_reason(client: samovar.Client, letters: samovar.DataSpec) -> None:
    with pytest.raises(samovar.UnsupportedOperation, match="cannot be decoded; use sample"):
        client.reconstruct("letters-lstm", tokens.encode(["ab"], letters))


def test_command_complete_prints_text(
    command: Callable[..., tuple[int, str, str]], client: samovar.Client
) -> None:
    code, out, err = command("complete", "letters-lstm", "abc", "--tokens", 9, "--seed", 5)
    expected = text.complete(client, "letters-lstm", "abc", tokens=9, options={"seed": 5})
    assert (code, out, err) == (0, f"{expected}\n", "seed 5\n")
    whole = text.complete(client, "letters-lstm", stop="\n", temperature=1.5, options={"seed": 3})
    options = ("--stop", r"\n", "--param", "temperature=1.5", "--seed", 3)
    assert command("complete", "letters-lstm", *options)[1] == f"{whole}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("abz",), 1, "unknown token 'z' at position 2"),
        (("abc", "--tokens", 25), 1, "expected an integer from 1 to 24, got 25"),
        (
            ("abc", "--param", "heat=1"),
            2,
            "unknown parameter 'heat' of sample; expected one of: tokens, temperature",
        ),
        (("abc", "-o", "a.mid"), 2, ".mid files hold music, got sequence uint8[24]"),
    ],
)
def test_command_complete_reports_errors(
    command: Callable[..., tuple[int, str, str]], arguments: tuple[str, ...], code: int, message: str
) -> None:
    actual, _, err = command("complete", "letters-lstm", *arguments)
    assert actual == code
    assert message in err


def test_command_writes_midi_file(command: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    one, two = tmp_path / "one.mid", tmp_path / "two.mid"
    assert command("complete", "pitches-lstm", "60 62 64 65", "--seed", 1, "-o", one)[0] == 0
    assert command("sample", "pitches-lstm", "-n", 2, "--seed", 1, "-o", two)[0] == 0
    assert [struct.unpack(">HHH", path.read_bytes()[8:14]) for path in (one, two)] == [(1, 5, 480)] * 2


WORDS = "67 62 rest 43 hold 64 59 hold hold hold 59 55 end".split()  # noqa: SIM905 (as it is written)
# Voice, pitch, start and end in ticks; a quarter has 480.
NOTES = [(0, 67, 0, 720), (1, 62, 0, 240), (1, 64, 240, 720), (2, 59, 240, 480), (2, 59, 480, 720)]
BASS = [(3, 43, 0, 480), (3, 55, 480, 720)]


def read_notes(content: bytes) -> list[tuple[int, int, int, int]]:
    """Return the notes of a MIDI file, parsed independently of the library that writes it."""
    kind, length, form, tracks, division = struct.unpack(">4sIHHH", content[:14])
    assert (kind, length, form, tracks, division) == (b"MThd", 6, 1, 5, 480)
    notes, at = list[tuple[int, int, int, int]](), 14
    for _ in range(tracks):
        kind, length = struct.unpack(">4sI", content[at : at + 8])
        assert kind == b"MTrk"
        notes += _read_track(content[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(content)
    return notes


def _read_track(track: bytes) -> Iterator[tuple[int, int, int, int]]:
    at, now, starts, ended = 0, 0, dict[int, int](), False
    while at < len(track):
        assert not ended
        delta = 0
        while True:
            byte, at = track[at], at + 1
            delta = delta << 7 | byte & 0x7F
            if byte < 0x80:
                break
        now += delta
        match track[at] >> 4:
            case 0x9:
                starts[track[at + 1]] = now
                at += 3
            case 0x8:
                yield track[at] & 15, track[at + 1], starts.pop(track[at + 1]), now
                at += 3
            case 0xC:
                at += 2
            case 0xF:
                ended = track[at + 1] == 0x2F
                at += 3 + track[at + 2]
    assert ended
    assert not starts


def test_midi_file_has_the_notes() -> None:
    assert read_notes(midi.encode([WORDS])) == NOTES + BASS


def test_midi_pieces_are_consecutive_and_incomplete_frames_dropped() -> None:
    later = [(voice, pitch, a + 7 * 240, b + 7 * 240) for voice, pitch, a, b in NOTES + BASS]
    notes = read_notes(midi.encode([WORDS, [*WORDS[:-1], "60", "60"]]))
    assert sorted(notes) == sorted(NOTES + BASS + later)
    assert read_notes(midi.encode([[]])) == []


def test_midi_long_rests_have_multibyte_delta_times() -> None:
    words = ["60"] * 4 + ["rest"] * 400 + ["61"] * 4
    assert read_notes(midi.encode([words]))[:2] == [(0, 60, 0, 240), (0, 61, 101 * 240, 102 * 240)]


def test_midi_file_is_readable_by_music21(tmp_path: Path) -> None:
    from music21 import converter

    path = tmp_path / "piece.mid"
    path.write_bytes(midi.encode([WORDS]))
    score: Any = converter.parse(path)
    read = [
        [(note.pitch.midi, float(note.offset), float(note.quarterLength)) for note in part.flatten().notes]
        for part in score.parts
    ]
    expected = [
        [(p, a / 480, (b - a) / 480) for v, p, a, b in NOTES + BASS if v == voice] for voice in range(4)
    ]
    assert read == expected
