"""The LSTM family for the exporter: presets, golden requests, quality and figures."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets import chorales, text
from export.datasets.loading import DataError, Dataset
from export.evaluation.figures import ImageGrid, Plot
from export.evaluation.ngram import ORDER, WittenBell
from export.evaluation.sample_quality import run_in_chunks
from export.families.base import Preset
from export.families.lstm.network import LSTM
from export.families.lstm.programs import build_programs
from export.graphs.program import Program
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Rows in a plot of the figure.
NUM_PLOT_ROWS = 4
# Temperature of the less random samples in the figure.
LOW_TEMPERATURE = 0.7


class Family:
    """Exporter family of LSTMs."""

    name = "lstm"
    description = "LSTM over characters or voices (Hochreiter & Schmidhuber 1997), exact token by token."
    operations: tuple[str, ...] = ("sample", "score", "encode")
    unsupported_operations: Mapping[str, str] = {
        "reconstruct": "the features of a sequence cannot be decoded; use sample to continue a sequence",
        "decode": "the features of a sequence cannot be decoded; use sample to continue a sequence",
        "energy": "the model's mass is normalized; use score for the exact log-mass",
        "classify": "the sequences have no classes",
    }
    presets: Mapping[str, Preset] = {
        "tiny": Preset(width=16, depth=2, training=Settings(steps=1, batch_rows=4), evaluation_rows=4),
        "starter": Preset(
            width=224,
            depth=1,
            dropout=0.1,
            training=Settings(
                steps=900,
                batch_rows=24,
                learning_rate=7e-3,
                ema_decay=0.99,
                evaluations=4,
                validation_rows=200,
            ),
        ),
        "medium": Preset(
            width=320,
            depth=2,
            dropout=0.15,
            training=Settings(
                steps=2600, batch_rows=32, learning_rate=3e-3, evaluations=6, validation_rows=200
            ),
        ),
        "full": Preset(
            width=768,
            depth=3,
            dropout=0.4,
            training=Settings(steps=12_000, batch_rows=128, learning_rate=2e-3),
        ),
    }

    def build_network(self, data: Dataset, preset: Preset) -> LSTM:
        """Return an untrained network.

        Raises:
            DataError: the data are not sequences of tokens.
        """
        if data.spec.kind != "tokens":
            raise DataError(
                f"{data.name}: expected sequences of tokens, got {data.spec.kind} rows; use --data text, "
                "--data chorales, or a --data-dir with input.txt"
            )
        return LSTM(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """Return sample, score and encode."""
        assert isinstance(network, LSTM)
        return build_programs(network, data.spec)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """Return golden requests with and without prompts, with every parameter, on short sequences."""
        rows = data.test.rows[:3].copy()
        for row, length in zip(rows, (20, 9, 1), strict=True):
            row[length:] = 0
        top_k, stop = min(12, data.spec.num_levels - 1), int(rows[0, 0])
        parameters = {"tokens": 12, "temperature": 0.7, "top_k": top_k, "top_p": 0.9, "stop": stop}
        return (
            Example("sample", seed=1, parameters={"tokens": 24}),
            Example("sample", seed=2, first_row=5, parameters=parameters, inputs={"prompt": rows}),
            Example("sample", seed=3, parameters={"tokens": 8, "temperature": 0}, inputs={"prompt": rows}),
            Example("score", inputs={"sequence": rows}),
            Example("encode", inputs={"sequence": rows}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Return the negative log-likelihood of test rows, that of an n-gram model, and the difference.

        The n-gram model is fitted to the same training rows.
        """
        rows = data.test.rows[: preset.evaluation_rows]
        score_rows = make_rows(interpreter.program("score"), 0, range(len(rows)), inputs={"sequence": rows})
        scores = run_in_chunks(interpreter, "score", score_rows, "log-mass of test rows")
        nats, lengths = scores["log_mass"].astype(np.float64), scores["length"]
        ngram = WittenBell(data.train.rows, len(data.spec.vocabulary) - 1)
        ngram_nats = ngram.log_probabilities(rows)
        if data.spec.vocabulary == chorales.VOCABULARY:
            frames = (lengths - 1) // chorales.VOICES
            by_frame = _compare(nats, ngram_nats, frames, "nats/frame", 1)
            return [*by_frame, _negative_log_likelihood(nats, lengths, "nats/token", 1)]
        return _compare(nats, ngram_nats, lengths, "bits/char", math.log(2))

    def build_plots(self, interpreter: Interpreter, data: Dataset) -> Sequence[Plot]:
        """Return test rows and samples at two temperatures, as text or as piano rolls."""
        vocabulary = data.spec.vocabulary
        plots = {
            "test rows": data.test.rows[:NUM_PLOT_ROWS],
            "samples": _samples(interpreter, 1),
            f"samples, temperature {LOW_TEMPERATURE}": _samples(interpreter, LOW_TEMPERATURE),
        }
        if vocabulary == chorales.VOCABULARY:
            max_level = data.spec.num_levels - 1
            return [
                ImageGrid(title, chorales.piano_roll(rows) * max_level, columns=1)
                for title, rows in plots.items()
            ]
        return [
            text.TextPanel(title, tuple("\n~\n".join(text.to_strings(rows, vocabulary)).split("\n")))
            for title, rows in plots.items()
        ]


def _samples(interpreter: Interpreter, temperature: float) -> NDArray[np.uint8]:
    parameters = {"temperature": temperature}
    rows = make_rows(interpreter.program("sample"), 0, range(NUM_PLOT_ROWS), parameters)
    return interpreter.run("sample", rows)["sequence"]


def _compare(
    nats: NDArray[np.float64],
    ngram_nats: NDArray[np.float64],
    counts: NDArray[np.int64],
    unit: str,
    nats_per_unit: float,
) -> list[manifest_pb2.Quality]:
    """Return the figures of the model, of the n-gram model, and of their difference."""
    baseline = _negative_log_likelihood(ngram_nats, counts, unit, nats_per_unit)
    baseline.name = f"negative log-likelihood of a {ORDER}-gram"
    baseline.doc = f"Interpolated Witten-Bell model of the same training rows. {baseline.doc}"
    gain = _negative_log_likelihood(ngram_nats - nats, counts, unit, nats_per_unit)
    gain.name = f"gain over the {ORDER}-gram"
    gain.doc = "The difference of the two, row by row."
    return [_negative_log_likelihood(nats, counts, unit, nats_per_unit), baseline, gain]


def _negative_log_likelihood(
    nats: NDArray[np.float64], counts: NDArray[np.int64], unit: str, nats_per_unit: float
) -> manifest_pb2.Quality:
    """Return -sum(nats) / sum(counts) in `unit`, with the standard error of a ratio of means.

    Args:
        nats: log-mass of each row [N].
        counts: number of characters, tokens or frames of each row [N].
        unit: name of the unit.
        nats_per_unit: 1 for nats, log(2) for bits.
    """
    rate = -nats.sum() / counts.sum()
    residuals = nats + rate * counts
    error = math.sqrt(np.square(residuals).sum() * len(nats) / max(len(nats) - 1, 1)) / counts.sum()
    return manifest_pb2.Quality(
        name="negative log-likelihood",
        value=float(rate / nats_per_unit),
        unit=unit,
        standard_error=float(error / nats_per_unit),
        doc=f"Exact, on {len(nats)} test rows, each from the initial state.",
    )


FAMILY = Family()
