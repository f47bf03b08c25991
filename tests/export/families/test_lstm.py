"""The LSTM: its cell is the cell, its masses sum to one, and its samples are drawn from them."""

import dataclasses
from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import chorales, loading, text
from export.evaluation.ngram import WittenBell
from export.families.base import Preset
from export.families.lstm import FAMILY, LSTM
from export.families.lstm.network import TOKENS_PER_BEAT, WINDOW_TOKENS
from export.families.lstm.programs import sample_token
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings, fit

TINY = Preset(width=12, depth=2, training=Settings(steps=1))
STARTER = FAMILY.presets["starter"]
Tokens = NDArray[np.uint8]


def dataset(vocabulary: tuple[str, ...], rows: Tokens) -> loading.Dataset:
    part = loading.Split(rows, np.zeros(len(rows), np.int64))
    tensor = TensorSpec("sequence", "uint8", rows.shape[1:], 0, len(vocabulary) - 1)
    value = DataSpec("tokens", tensor, len(vocabulary), vocabulary)
    return loading.Dataset("few", value, part, part, part, sha256="")


def untrained(given: loading.Dataset, preset: Preset = TINY) -> LSTM:
    torch.manual_seed(0)
    network = FAMILY.build_network(given, preset)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.5 * torch.randn_like(weights))
    return network.eval().requires_grad_(False)


def interpreter_of(given: loading.Dataset) -> Interpreter:
    return eager_interpreter(given.spec, FAMILY.build_programs(untrained(given), given))


@pytest.fixture(scope="module")
def abc() -> loading.Dataset:
    """Sequences of three letters."""
    return dataset(("", "a", "b", "c"), np.ones((4, 3), np.uint8))


@pytest.fixture(scope="module")
def abc_interpreter(abc: loading.Dataset) -> Interpreter:
    return interpreter_of(abc)


@pytest.fixture(scope="module")
def words() -> loading.Dataset:
    """Sequences of up to 24 of 20 letters."""
    rows = np.random.default_rng(0).integers(1, 21, (4, 24)).astype(np.uint8)
    return dataset(("", *"abcdefghijklmnopqrst"), rows)


@pytest.fixture(scope="module")
def interpreter(words: loading.Dataset) -> Interpreter:
    return interpreter_of(words)


def sample(interpreter: Interpreter, count: int, seed: int = 0, **given: Any) -> Tensors:
    inputs = {"prompt": given.pop("prompt")} if "prompt" in given else {}
    return interpreter.run(
        "sample", make_rows(interpreter.program("sample"), seed, range(count), given, inputs)
    )


def score(interpreter: Interpreter, rows: Tokens) -> Tensors:
    request = make_rows(interpreter.program("score"), 0, range(len(rows)), inputs={"sequence": rows})
    return interpreter.run("score", request)


def padded(rows: list[list[int]], context: int) -> Tokens:
    filled = np.zeros((len(rows), context), np.uint8)
    for row, tokens in zip(filled, rows, strict=True):
        row[: len(tokens)] = tokens
    return filled


def every(length: int, symbols: int = 3) -> Tokens:
    return padded([list(row) for row in product(range(1, symbols + 1), repeat=length)], 3)


def test_the_step_is_torchs_cell(words: loading.Dataset) -> None:
    """Token by token, against nn.LSTM over the whole sequence, with the same weights."""
    network, tokens = untrained(words), torch.from_numpy(words.test.rows).long()
    state = (torch.zeros(4, 2, 12), torch.zeros(4, 2, 12))
    steps = []
    for index in range(tokens.shape[1]):
        before = tokens[:, index - 1] if index else torch.zeros(4, dtype=torch.int64)
        logits, state = network.step(before, torch.full((4,), index), state)
        steps.append(logits.log_softmax(-1).gather(1, tokens[:, index : index + 1])[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1), network.log_masses(tokens), atol=1e-5, rtol=1e-5)
    previous = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    embedded = network.token_embedding(previous) + network.position_embedding.weight[0]
    _, (hidden, cell) = network.layers(embedded)
    torch.testing.assert_close(state[0].transpose(0, 1), hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[1].transpose(0, 1), cell, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 7, 23])
def test_a_token_changes_its_own_mass_and_later_ones_only(
    position: int, interpreter: Interpreter, words: loading.Dataset
) -> None:
    other = words.test.rows.copy()
    other[:, position] = other[:, position] % 20 + 1
    masses, changed = (score(interpreter, rows)["log_mass_by_token"] for rows in (words.test.rows, other))
    np.testing.assert_array_equal(masses[:, :position], changed[:, :position])
    assert (masses[:, position : position + 2] != changed[:, position : position + 2]).all()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_masses_of_all_sequences_of_a_length_sum_to_one(length: int, abc_interpreter: Interpreter) -> None:
    answer = score(abc_interpreter, every(length))
    assert np.exp(answer["log_mass"].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert (answer["length"] == length).all()
    assert answer["log_mass"].std() > 0.1


def test_the_score_is_the_sum_over_its_tokens_and_ends_at_the_first_empty_one(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    rows = words.test.rows[:3].copy()
    rows[0, 5:] = 0
    rows[1, 5] = 0
    rows[2] = 0
    answer = score(interpreter, rows)
    whole = score(interpreter, words.test.rows[:2])["log_mass_by_token"][:, :5]
    assert answer["length"].tolist() == [5, 5, 0]
    np.testing.assert_allclose(answer["log_mass_by_token"][:2, :5], whole, rtol=1e-6)
    assert (answer["log_mass_by_token"][:, 5:] == 0).all()
    np.testing.assert_allclose(answer["log_mass"], answer["log_mass_by_token"].sum(1), rtol=1e-5)


def test_samples_follow_the_masses(abc_interpreter: Interpreter) -> None:
    """Frequencies of all 27 sequences among 4096 samples: a chi-square test at five standard deviations."""
    drawn = sample(abc_interpreter, 4096)["sequence"]
    seen = np.bincount((drawn.astype(int) - 1) @ [9, 3, 1], minlength=27)
    expected = 4096 * np.exp(score(abc_interpreter, every(3))["log_mass"])
    statistic = ((seen - expected) ** 2 / expected)[expected > 5].sum()
    freedom = (expected > 5).sum() - 1
    assert freedom > 10
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_the_masses_of_a_sample_are_its_score(interpreter: Interpreter, settings: dict[str, Any]) -> None:
    """Under the model itself, whatever the settings were."""
    drawn = sample(interpreter, 5, **settings)
    scored = score(interpreter, drawn["sequence"])
    np.testing.assert_allclose(drawn["log_mass_by_token"], scored["log_mass_by_token"], atol=1e-6)
    assert (drawn["length"] == 24).all()


def test_a_temperature_of_zero_takes_the_likeliest_token(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    cold, single = (
        sample(interpreter, 3, 4, **given)["sequence"] for given in ({"temperature": 0}, {"top_k": 1})
    )
    assert (cold == cold[0]).all()
    np.testing.assert_array_equal(cold, single)
    tokens, network = torch.from_numpy(cold[:1]).long(), untrained(words)
    chosen = network.log_masses(tokens)[0]
    for position in range(24):
        others = tokens.repeat(20, 1)
        others[:, position] = torch.arange(1, 21)
        assert chosen[position] == pytest.approx(float(network.log_masses(others)[:, position].max()))


def shares(top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> list[float]:
    """How often each of five tokens of mass 0.4, 0.1, 0.3, 0.05, 0.15 is drawn, over a grid of uniforms."""
    count = 20_000
    logits = torch.full((count, 16), -1e30)
    logits[:, 1:6] = torch.tensor([0.4, 0.1, 0.3, 0.05, 0.15]).log()
    uniform = (torch.arange(count) + 0.5) / count
    scalars = torch.full((count,), temperature), torch.full((count,), top_k), torch.full((count,), top_p)
    drawn = sample_token(logits, *scalars, uniform)
    assert drawn.min() >= 1
    assert drawn.max() <= 5
    return (torch.bincount(drawn, minlength=6)[1:] / count).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.4, 0.1, 0.3, 0.05, 0.15]),
        ({"top_k": 1}, [1, 0, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_k": 20}, [0.4, 0.1, 0.3, 0.05, 0.15]),
        ({"top_p": 0.0}, [1, 0, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"top_p": 0.8}, [0.4 / 0.85, 0, 0.3 / 0.85, 0, 0.15 / 0.85]),
        ({"top_k": 3, "top_p": 0.5}, [4 / 7, 0, 3 / 7, 0, 0]),
        ({"temperature": 0.0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [x * x / 0.285 for x in (0.4, 0.1, 0.3, 0.05, 0.15)]),
    ],
)
def test_draws_are_from_the_likeliest_tokens(settings: dict[str, Any], expected: list[float]) -> None:
    assert shares(**settings) == pytest.approx(expected, abs=2e-4)


def test_a_prompt_is_kept_and_may_be_given_in_parts(interpreter: Interpreter) -> None:
    """A sample's own beginning, given as a prompt to the same seed, is continued to the same sample."""
    whole = sample(interpreter, 4, 9)
    for length in (1, 10, 24):
        prompt = np.where(np.arange(24) < length, whole["sequence"], 0).astype(np.uint8)
        again = sample(interpreter, 4, 9, prompt=prompt)
        np.testing.assert_array_equal(again["sequence"], whole["sequence"])
        np.testing.assert_allclose(again["log_mass_by_token"], whole["log_mass_by_token"], atol=1e-6)


def test_tokens_count_those_that_are_drawn_and_a_prompt_ends_at_its_first_empty_one(
    interpreter: Interpreter,
) -> None:
    prompt = padded([[], [5], [3, 4, 0, 7], [2] * 22, [2] * 24], 24)
    drawn = sample(interpreter, 5, tokens=4, prompt=prompt)
    assert drawn["length"].tolist() == [4, 5, 6, 24, 24]
    assert drawn["sequence"][1:3, :2].tolist() == [[5, drawn["sequence"][1, 1]], [3, 4]]
    for row, length in zip(drawn["sequence"], drawn["length"], strict=True):
        assert (row[:length] > 0).all()
        assert (row[length:] == 0).all()


def test_a_stop_ends_a_row_when_it_is_drawn_and_not_when_it_is_given(interpreter: Interpreter) -> None:
    free = sample(interpreter, 30, 2)["sequence"]
    stop = int(free[0, 3])
    prompt = padded([[stop], *(list[int]() for _ in range(29))], 24)
    drawn = sample(interpreter, 30, 2, stop=stop)
    assert sample(interpreter, 30, 2, stop=stop, prompt=prompt)["length"][0] > 1
    for row, length, whole in zip(drawn["sequence"], drawn["length"], free, strict=True):
        where = np.flatnonzero(whole == stop)
        assert length == (where[0] + 1 if len(where) else 24)
        np.testing.assert_array_equal(row[:length], whole[:length])


def test_features_are_of_the_whole_sequence_and_of_nothing_after_it(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    def features(rows: Tokens) -> NDArray[np.float32]:
        request = make_rows(interpreter.program("encode"), 0, range(len(rows)), inputs={"sequence": rows})
        return interpreter.run("encode", request)["features"]

    network, rows = untrained(words), words.test.rows.copy()
    shorter = np.where(np.arange(24) < 10, rows, 0).astype(np.uint8)
    hidden, _ = network.layers(
        network.token_embedding(torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)))).long())
        + network.position_embedding.weight[0]
    )
    np.testing.assert_allclose(features(rows), hidden[:, 24], atol=1e-5)
    np.testing.assert_allclose(features(shorter), hidden[:, 10], atol=1e-5)


def test_it_learns_what_there_is_to_learn() -> None:
    """A text that repeats three letters has no surprises but where a row begins."""
    corpus = text.split_rows(np.tile(np.array([1, 2, 3], np.uint8), 2000))
    given = dataset(("", "a", "b", "c"), corpus)
    preset = Preset(width=16, depth=1, training=Settings(60, 8, 2e-2, ema_decay=0.8, evaluations=2))
    network = FAMILY.build_network(given, preset)
    fit(network, given, preset.training)
    nats = -network.log_masses(torch.from_numpy(corpus[:4]).long())
    assert nats[:, 0].mean() == pytest.approx(np.log(3), abs=0.3)
    assert nats[:, 1:].mean() < 0.05


def test_windows_of_music_are_whole_beats_after_what_was_there() -> None:
    lengths = np.array([300, 300, 20, 640] * 8)
    rows = np.where(np.arange(640) < lengths[:, None], np.arange(640) % 49 + 4, 0).astype(np.uint8)
    network = FAMILY.build_network(dataset(chorales.VOCABULARY, rows), TINY)
    torch.manual_seed(0)
    tokens, before = network._draw_windows(torch.from_numpy(rows).long())
    assert tokens.shape == before.shape == (32, WINDOW_TOKENS)
    torch.testing.assert_close(tokens[:, :-1], before[:, 1:])
    beginnings = 0
    for row, window, first in zip(rows, tokens.numpy(), before[:, 0].tolist(), strict=True):
        starts = [
            s
            for s in range(0, 640 - WINDOW_TOKENS + 1, TOKENS_PER_BEAT)
            if (row[s : s + WINDOW_TOKENS] == window).all()
        ]
        assert any(first == (row[s - 1] if s else 0) for s in starts)
        assert window[0] != 0
        beginnings += first == 0
    assert 8 <= beginnings < 24


def test_windows_of_text_begin_with_nothing(words: loading.Dataset) -> None:
    rows = np.tile(np.arange(1, 21, dtype=np.uint8), (16, 20))
    tokens, before = FAMILY.build_network(dataset(words.spec.vocabulary, rows), TINY)._draw_windows(
        torch.from_numpy(rows).long()
    )
    assert (before[:, 0] == 0).all()
    assert len(set(tokens[:, 0].tolist())) > 3


def test_images_are_refused(words: loading.Dataset) -> None:
    value = DataSpec("image", TensorSpec("image", "uint8", (8, 8), 0, 16), 17)
    with pytest.raises(loading.DataError, match="expected sequences of tokens, got image rows"):
        FAMILY.build_network(dataclasses.replace(words, spec=value), TINY)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_an_n_gram_is_a_distribution(order: int) -> None:
    rows = np.random.default_rng(1).integers(1, 4, (20, 9)).astype(np.uint8)
    model = WittenBell(rows, 3, order)
    for context in ([], [1], [2, 2], [3, 1, 2], [1, 1, 1, 1, 1]):
        assert sum(model.probability(context, token) for token in (1, 2, 3)) == pytest.approx(1)
    shorter = padded([[1, 2, 3, 1]], 9)
    steps = [model.probability([1, 2, 3][:end], token) for end, token in enumerate([1, 2, 3, 1])]
    assert model.log_probabilities(shorter) == pytest.approx([np.log(steps).sum()])


def test_an_n_gram_is_witten_and_bells() -> None:
    """By hand: `aab` once, two symbols; p(b|a) = (1 + 2 p(b)) / (2 + 2), p(b) = (1 + 2/2) / (3 + 2)."""
    model = WittenBell(padded([[1, 1, 2]], 4), 2, order=2)
    assert model.probability([], 2) == pytest.approx(2 / 5)
    assert model.probability([1], 2) == pytest.approx((1 + 2 * 2 / 5) / 4)
    assert model.probability([2], 2) == pytest.approx(2 / 5)


def test_quality_compares_with_the_n_gram_on_the_same_rows(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    ours, rival, gain = FAMILY.measure_quality(interpreter, words, STARTER)
    nats = score(interpreter, words.test.rows)["log_mass"]
    assert ours.value == pytest.approx(-nats.sum() / (4 * 24) / np.log(2), rel=1e-5)
    assert (ours.unit, rival.unit) == ("bits/char", "bits/char")
    assert gain.value == pytest.approx(rival.value - ours.value, rel=1e-4)
    assert ours.standard_error == pytest.approx(nats.std(ddof=1) / 2 / 24 / np.log(2), rel=1e-4)


def test_text_of_the_standard_library_is_characters_in_three_parts() -> None:
    given = loading.load("text")
    assert given.spec.vocabulary == text.CHARACTERS
    assert len(given.spec.vocabulary) == 97
    parts = [given.validation, given.train, given.test]
    whole = "".join("".join(text.to_strings(part.rows, text.CHARACTERS)) for part in parts)
    assert len(whole) > 200_000
    assert set(whole) <= set(text.CHARACTERS)
    assert text.lengths(given.test.rows).sum() / len(whole) == pytest.approx(0.1, abs=0.001)
    paragraphs = Counter(paragraph for paragraph in whole.split("\n\n") if len(paragraph) > 80)
    assert max(paragraphs.values()) == 1


def test_a_folder_with_text_has_its_own_vocabulary(tmp_path: Any) -> None:
    written = "né à Zürich\n" * 2000
    (tmp_path / "input.txt").write_text(written, encoding="utf-8")
    given = loading.load("digits", tmp_path)
    assert given.spec.vocabulary == ("", *sorted(set(written)))
    (first,) = text.to_strings(given.test.rows[:1], given.spec.vocabulary)
    assert first == written[int(len(written) * 0.9) :][: text.CONTEXT]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("short", r"expected a text of \d+ characters or more, got 5"),
        ("".join(map(chr, range(32, 400))) * 100, "expected at most 255 different characters, got 368"),
    ],
)
def test_a_text_that_cannot_be_learned_is_refused(tmp_path: Any, written: str, said: str) -> None:
    (tmp_path / "input.txt").write_text(written, encoding="utf-8")
    with pytest.raises(ValueError, match=said):
        loading.load("digits", tmp_path)


PIECE = (
    np.array([[67, 62, 59, 43], [67, 62, -1, 55], [69, 62, 59, 55]]),
    np.array([[True, True, True, True], [False, False, False, True], [True, True, True, False]]),
)


def test_a_piece_is_a_token_for_each_voice_and_frame() -> None:
    (row,) = chorales.tokenize([PIECE])
    words = [chorales.VOCABULARY[token] for token in row[:13]]
    assert words == ["67", "62", "59", "43", "hold", "hold", "rest", "55", "69", "62", "59", "hold", "end"]
    assert (row[13:] == 0).all()


def test_pieces_are_moved_within_the_ranges_of_the_voices() -> None:
    ranges = np.array([[66, 60, 58, 42], [72, 64, 60, 60]])
    moved = list(chorales.transpose(PIECE, ranges))
    assert [pitches[0, 0] - 67 for pitches, _ in moved] == [-1, 0, 1]
    assert all(pitches[1, 2] == -1 for pitches, _ in moved)
    np.testing.assert_array_equal(chorales.voice_ranges([PIECE]), [[67, 62, 59, 43], [69, 62, 59, 55]])


def test_a_roll_shows_what_sounds() -> None:
    roll = chorales.piano_roll(chorales.tokenize([PIECE]))[0]
    sounding = [sorted(84 - np.flatnonzero(roll[:, frame])) for frame in range(4)]
    assert sounding == [[43, 59, 62, 67], [55, 62, 67], [55, 59, 62, 69], []]


def test_a_chorale_is_read_as_it_is_written() -> None:
    """BWV 269 begins with an upbeat on a G major chord; its bass then moves in eighths."""
    from music21 import corpus

    pitches, begins = chorales._to_frames(corpus.parse("bach/bwv269"))
    assert pitches[:3].tolist() == [[67, 62, 59, 43], [67, 62, 59, 43], [67, 62, 59, 55]]
    assert begins[:3].tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert pitches[6, :].tolist() == [74, 62, 57, 54]
