"""Tests of the LSTM: equal to torch's LSTM, normalized mass, and samples that follow the scores."""

import dataclasses
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import chorales, loading, text
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
    split = loading.Split(rows, np.zeros(len(rows), np.int64))
    tensor = TensorSpec("sequence", "uint8", rows.shape[1:], 0, len(vocabulary) - 1)
    data_spec = DataSpec("tokens", tensor, len(vocabulary), vocabulary)
    return loading.Dataset("few", data_spec, split, split, split, sha256="")


def untrained(data: loading.Dataset, preset: Preset = TINY) -> LSTM:
    torch.manual_seed(0)
    network = FAMILY.build_network(data, preset)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.5 * torch.randn_like(weights))
    return network.eval().requires_grad_(False)


def make_interpreter(data: loading.Dataset) -> Interpreter:
    return eager_interpreter(data.spec, FAMILY.build_programs(untrained(data), data))


@pytest.fixture(scope="module")
def abc() -> loading.Dataset:
    """Sequences of three tokens, with three symbols."""
    return dataset(("", "a", "b", "c"), np.ones((4, 3), np.uint8))


@pytest.fixture(scope="module")
def abc_interpreter(abc: loading.Dataset) -> Interpreter:
    return make_interpreter(abc)


@pytest.fixture(scope="module")
def words() -> loading.Dataset:
    """Sequences of up to 24 tokens, with 20 symbols."""
    rows = np.random.default_rng(0).integers(1, 21, (4, 24)).astype(np.uint8)
    return dataset(("", *"abcdefghijklmnopqrst"), rows)


@pytest.fixture(scope="module")
def interpreter(words: loading.Dataset) -> Interpreter:
    return make_interpreter(words)


def sample(interpreter: Interpreter, count: int, seed: int = 0, **parameters: Any) -> Tensors:
    inputs = {"prompt": parameters.pop("prompt")} if "prompt" in parameters else {}
    return interpreter.run(
        "sample", make_rows(interpreter.program("sample"), seed, range(count), parameters, inputs)
    )


def score(interpreter: Interpreter, rows: Tokens) -> Tensors:
    request = make_rows(interpreter.program("score"), 0, range(len(rows)), inputs={"sequence": rows})
    return interpreter.run("score", request)


def pad(rows: list[list[int]], context: int) -> Tokens:
    padded = np.zeros((len(rows), context), np.uint8)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = tokens
    return padded


def all_sequences(length: int, symbols: int = 3) -> Tokens:
    """Return all sequences of `length` symbols, padded to [N, 3]."""
    return pad([list(row) for row in product(range(1, symbols + 1), repeat=length)], 3)


def test_step_equals_torch_lstm(words: loading.Dataset) -> None:
    """Steps over all tokens equal nn.LSTM over the whole sequence, with the same weights."""
    network, tokens = untrained(words), torch.from_numpy(words.test.rows).long()
    state = (torch.zeros(4, 2, 12), torch.zeros(4, 2, 12))
    steps = []
    for index in range(tokens.shape[1]):
        previous = tokens[:, index - 1] if index else torch.zeros(4, dtype=torch.int64)
        logits, state = network.step(previous, torch.full((4,), index), state)
        steps.append(logits.log_softmax(-1).gather(1, tokens[:, index : index + 1])[:, 0])
    torch.testing.assert_close(torch.stack(steps, 1), network.log_masses(tokens), atol=1e-5, rtol=1e-5)
    previous = torch.nn.functional.pad(tokens[:, :-1], (1, 0))
    embedded = network.token_embedding(previous) + network.position_embedding.weight[0]
    _, (hidden, cell) = network.layers(embedded)
    torch.testing.assert_close(state[0].transpose(0, 1), hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state[1].transpose(0, 1), cell, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", [0, 7, 23])
def test_score_by_token_depends_on_earlier_tokens_only(
    position: int, interpreter: Interpreter, words: loading.Dataset
) -> None:
    modified = words.test.rows.copy()
    modified[:, position] = modified[:, position] % 20 + 1
    masses, changed = (score(interpreter, rows)["log_mass_by_token"] for rows in (words.test.rows, modified))
    np.testing.assert_array_equal(masses[:, :position], changed[:, :position])
    assert (masses[:, position : position + 2] != changed[:, position : position + 2]).all()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_score_masses_of_all_sequences_of_a_length_sum_to_one(
    length: int, abc_interpreter: Interpreter
) -> None:
    outputs = score(abc_interpreter, all_sequences(length))
    assert np.exp(outputs["log_mass"].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert (outputs["length"] == length).all()
    assert outputs["log_mass"].std() > 0.1


def test_score_is_the_sum_over_tokens_before_the_first_empty_one(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    rows = words.test.rows[:3].copy()
    rows[0, 5:] = 0
    rows[1, 5] = 0
    rows[2] = 0
    outputs = score(interpreter, rows)
    whole = score(interpreter, words.test.rows[:2])["log_mass_by_token"][:, :5]
    assert outputs["length"].tolist() == [5, 5, 0]
    np.testing.assert_allclose(outputs["log_mass_by_token"][:2, :5], whole, rtol=1e-6)
    assert (outputs["log_mass_by_token"][:, 5:] == 0).all()
    np.testing.assert_allclose(outputs["log_mass"], outputs["log_mass_by_token"].sum(1), rtol=1e-5)


def test_sample_frequencies_follow_the_masses(abc_interpreter: Interpreter) -> None:
    """A chi-square test of all 27 sequences in 4096 samples, at five standard deviations."""
    drawn = sample(abc_interpreter, 4096)["sequence"]
    observed = np.bincount((drawn.astype(int) - 1) @ [9, 3, 1], minlength=27)
    expected = 4096 * np.exp(score(abc_interpreter, all_sequences(3))["log_mass"])
    statistic = ((observed - expected) ** 2 / expected)[expected > 5].sum()
    freedom = (expected > 5).sum() - 1
    assert freedom > 10
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.6}])
def test_sample_log_masses_equal_its_score(interpreter: Interpreter, parameters: dict[str, Any]) -> None:
    """The log-masses are those of the model, for all sampling parameters."""
    drawn = sample(interpreter, 5, **parameters)
    scored = score(interpreter, drawn["sequence"])
    np.testing.assert_allclose(drawn["log_mass_by_token"], scored["log_mass_by_token"], atol=1e-6)
    assert (drawn["length"] == 24).all()


def test_sample_with_temperature_zero_takes_the_most_likely_token(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    cold, single = (
        sample(interpreter, 3, 4, **parameters)["sequence"]
        for parameters in ({"temperature": 0}, {"top_k": 1})
    )
    assert (cold == cold[0]).all()
    np.testing.assert_array_equal(cold, single)
    tokens, network = torch.from_numpy(cold[:1]).long(), untrained(words)
    chosen = network.log_masses(tokens)[0]
    for position in range(24):
        others = tokens.repeat(20, 1)
        others[:, position] = torch.arange(1, 21)
        assert chosen[position] == pytest.approx(float(network.log_masses(others)[:, position].max()))


def frequencies(top_k: int = 0, top_p: float = 1.0, temperature: float = 1.0) -> list[float]:
    """Return the frequencies of five tokens of mass 0.4, 0.1, 0.3, 0.05, 0.15 over a grid of uniforms."""
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
    ("parameters", "expected"),
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
def test_sample_token_draws_from_the_most_likely_tokens(
    parameters: dict[str, Any], expected: list[float]
) -> None:
    assert frequencies(**parameters) == pytest.approx(expected, abs=2e-4)


def test_sample_continues_a_prefix_of_a_sample_to_the_same_sample(interpreter: Interpreter) -> None:
    """The prefix of a sample is the prompt of a request with the same seed."""
    whole = sample(interpreter, 4, 9)
    for length in (1, 10, 24):
        prompt = np.where(np.arange(24) < length, whole["sequence"], 0).astype(np.uint8)
        continued = sample(interpreter, 4, 9, prompt=prompt)
        np.testing.assert_array_equal(continued["sequence"], whole["sequence"])
        np.testing.assert_allclose(continued["log_mass_by_token"], whole["log_mass_by_token"], atol=1e-6)


def test_sample_tokens_limits_drawn_tokens_after_the_prompt(
    interpreter: Interpreter,
) -> None:
    """The prompt ends at its first empty token."""
    prompt = pad([[], [5], [3, 4, 0, 7], [2] * 22, [2] * 24], 24)
    drawn = sample(interpreter, 5, tokens=4, prompt=prompt)
    assert drawn["length"].tolist() == [4, 5, 6, 24, 24]
    assert drawn["sequence"][1:3, :2].tolist() == [[5, drawn["sequence"][1, 1]], [3, 4]]
    for row, length in zip(drawn["sequence"], drawn["length"], strict=True):
        assert (row[:length] > 0).all()
        assert (row[length:] == 0).all()


def test_sample_stops_at_a_drawn_stop_token_and_not_at_one_in_the_prompt(interpreter: Interpreter) -> None:
    free = sample(interpreter, 30, 2)["sequence"]
    stop = int(free[0, 3])
    prompt = pad([[stop], *(list[int]() for _ in range(29))], 24)
    drawn = sample(interpreter, 30, 2, stop=stop)
    assert sample(interpreter, 30, 2, stop=stop, prompt=prompt)["length"][0] > 1
    for row, length, whole in zip(drawn["sequence"], drawn["length"], free, strict=True):
        stops = np.flatnonzero(whole == stop)
        assert length == (stops[0] + 1 if len(stops) else 24)
        np.testing.assert_array_equal(row[:length], whole[:length])


def test_encode_reads_the_sequence_up_to_the_first_empty_token(
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


def test_fit_learns_a_repeating_text() -> None:
    """A text that repeats three letters is predictable except at the start of a row."""
    corpus = text.split_rows(np.tile(np.array([1, 2, 3], np.uint8), 2000))
    data = dataset(("", "a", "b", "c"), corpus)
    preset = Preset(width=16, depth=1, training=Settings(60, 8, 2e-2, ema_decay=0.8, evaluations=2))
    network = FAMILY.build_network(data, preset)
    fit(network, data, preset.training)
    nats = -network.log_masses(torch.from_numpy(corpus[:4]).long())
    assert nats[:, 0].mean() == pytest.approx(np.log(3), abs=0.3)
    assert nats[:, 1:].mean() < 0.05


def test_windows_of_music_start_at_beats_after_the_preceding_token() -> None:
    lengths = np.array([300, 300, 20, 640] * 8)
    rows = np.where(np.arange(640) < lengths[:, None], np.arange(640) % 49 + 4, 0).astype(np.uint8)
    network = FAMILY.build_network(dataset(chorales.VOCABULARY, rows), TINY)
    torch.manual_seed(0)
    tokens, previous = network._draw_windows(torch.from_numpy(rows).long())
    assert tokens.shape == previous.shape == (32, WINDOW_TOKENS)
    torch.testing.assert_close(tokens[:, :-1], previous[:, 1:])
    num_piece_starts = 0
    for row, window, first in zip(rows, tokens.numpy(), previous[:, 0].tolist(), strict=True):
        starts = [
            s
            for s in range(0, 640 - WINDOW_TOKENS + 1, TOKENS_PER_BEAT)
            if (row[s : s + WINDOW_TOKENS] == window).all()
        ]
        assert any(first == (row[s - 1] if s else 0) for s in starts)
        assert window[0] != 0
        num_piece_starts += first == 0
    assert 8 <= num_piece_starts < 24


def test_windows_of_text_start_after_the_empty_token(words: loading.Dataset) -> None:
    rows = np.tile(np.arange(1, 21, dtype=np.uint8), (16, 20))
    tokens, previous = FAMILY.build_network(dataset(words.spec.vocabulary, rows), TINY)._draw_windows(
        torch.from_numpy(rows).long()
    )
    assert (previous[:, 0] == 0).all()
    assert len(set(tokens[:, 0].tolist())) > 3


def test_network_rejects_images(words: loading.Dataset) -> None:
    image_spec = DataSpec("image", TensorSpec("image", "uint8", (8, 8), 0, 16), 17)
    with pytest.raises(loading.DataError, match="expected sequences of tokens, got image rows"):
        FAMILY.build_network(dataclasses.replace(words, spec=image_spec), TINY)


def test_quality_compares_with_the_ngram_on_the_same_rows(
    interpreter: Interpreter, words: loading.Dataset
) -> None:
    figure, baseline, gain = FAMILY.measure_quality(interpreter, words, STARTER)
    nats = score(interpreter, words.test.rows)["log_mass"]
    assert figure.value == pytest.approx(-nats.sum() / (4 * 24) / np.log(2), rel=1e-5)
    assert (figure.unit, baseline.unit) == ("bits/char", "bits/char")
    assert gain.value == pytest.approx(baseline.value - figure.value, rel=1e-4)
    assert figure.standard_error == pytest.approx(nats.std(ddof=1) / 2 / 24 / np.log(2), rel=1e-4)
