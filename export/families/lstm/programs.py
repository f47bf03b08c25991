"""LSTM over tokens: text by its characters, music by its voices.

Hochreiter & Schmidhuber, "Long short-term memory" (1997), with the forget gate of
Gers, Schmidhuber & Cummins (2000): the mass of a sequence is a product over its tokens,

    p(x) = prod_t p(x_t | x_1 .. x_(t-1)),    i, f, g, o = W x_(t-1) + U h_(t-1) + b,
    c_t = sigmoid(f) * c_(t-1) + sigmoid(i) * tanh(g),    h_t = sigmoid(o) * tanh(c_t),

products by element, from h_0 = c_0 = 0, and x_0 the empty token 0, which no sequence
contains. Every program here, for samples, scores and features, walks the same step from that
same beginning, so a sample's log-masses are its score, and a prompt is tokens that are
given instead of drawn. A text has no end of its own; a piece of music ends with `end`.

Top-k: Fan, Lewis & Dauphin (2018); top-p: Holtzman et al. (2020).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from export.artifacts.golden import Example
from export.artifacts.interpreter import Interpreter, make_rows
from export.datasets import chorales, text
from export.datasets.loading import DataError, Dataset
from export.evaluation.figures import Drawing, Panel
from export.evaluation.ngram import ORDER, WittenBell
from export.evaluation.sample_quality import play
from export.families.base import Preset
from export.graphs.program import Input, Noise, Parameter, Program, Score, Steps, TensorSpec
from export.probability.batch_invariant_ops import SIMD_WIDTH
from export.training.trainer import Network, Settings
from samovar.v1 import manifest_pb2

# Tokens that a step of training reads of a text: a window from anywhere, as the rows are that are scored.
WINDOW = 128
# Music repeats its voices each frame and its accents each beat.
BEAT = chorales.VOICES * chorales.FRAMES_PER_QUARTER
# The logarithm of nothing, finite so that no row carries an infinity.
_NOTHING = -1e30
# Divides logits in place of a temperature of 0, which takes the likeliest token only.
_COLDEST = 1e-4
PICTURED = 4

State = tuple[Tensor, Tensor]


class LSTM(Network):
    """p(x) on sequences of tokens 1..symbols, [context], 0 after the last one."""

    impossible: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        (self.context,), vocabulary = data.spec.tensor.shape, data.spec.vocabulary
        self.width, self.depth = preset.width, preset.depth
        self.is_music = vocabulary == chorales.VOCABULARY
        self.period = BEAT if self.is_music else 1
        self.stop = vocabulary.index(chorales.END) if self.is_music else 0
        self.symbols = len(vocabulary) - 1
        self.token = nn.Embedding(len(vocabulary), self.width)
        self.place = nn.Embedding(self.period, self.width)
        # Anything that all tokens have in common slows learning down.
        nn.init.zeros_(self.place.weight)
        dropout = preset.dropout if self.depth > 1 else 0.0
        self.layers = nn.LSTM(self.width, self.width, self.depth, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(preset.dropout)
        # As wide as it takes to have an index for every token, 0 among them, in whole packets.
        self.head = nn.Linear(self.width, -(-len(vocabulary) // SIMD_WIDTH) * SIMD_WIDTH)
        indices = torch.arange(self.head.out_features)
        is_token = (indices > 0) & (indices <= self.symbols)
        self.register_buffer("impossible", torch.where(is_token, 0.0, _NOTHING))
        self._remember()

    def _remember(self) -> None:
        """Open the forget gates at first (Jozefowicz, Zaremba & Sutskever 2015)."""
        for layer in range(self.depth):
            bias = getattr(self.layers, f"bias_ih_l{layer}")
            nn.init.ones_(bias[self.width : 2 * self.width])

    def step(self, previous: Tensor, place: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of the next token [B, packets] and the new state, after one token, int64 [B], at a place.

        The state is h and c of every layer, each [B, depth, width]; a place is a token's index.
        """
        features = self.token(previous) + self.place(place % self.period)
        hidden, cells = [], []
        for layer, (h, c) in enumerate(zip(*(each.unbind(1) for each in state), strict=True)):
            features, cell = self._cell(layer, features, h, c)
            hidden.append(features)
            cells.append(cell)
        return self.logits(features), (torch.stack(hidden, 1), torch.stack(cells, 1))

    def _cell(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> State:
        read, recall = (
            (getattr(self.layers, f"weight_{kind}_l{layer}"), getattr(self.layers, f"bias_{kind}_l{layer}"))
            for kind in ("ih", "hh")
        )
        gates = functional.linear(x, *read) + functional.linear(h, *recall)
        admit, keep, candidate, show = gates.chunk(4, 1)
        cell = keep.sigmoid() * c + admit.sigmoid() * candidate.tanh()
        return show.sigmoid() * cell.tanh(), cell

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., packets] of features [..., width]; _NOTHING for 0 and beyond the vocabulary."""
        logits: Tensor = self.head(features)
        return logits + self.impossible

    def log_masses(self, tokens: Tensor, before: Tensor | None = None) -> Tensor:
        """log p(x_t | the tokens before it) in nats [B, T] of int64 tokens [B, T]; 0 where there is none.

        `before` holds the token before each, where they are not from the beginning of a sequence.
        """
        before = _shifted(tokens) if before is None else before
        places = torch.arange(tokens.shape[1], device=tokens.device) % self.period
        features, _ = self.layers(self.dropout(self.token(before) + self.place(places)))
        logits = self.logits(self.dropout(features)).transpose(1, 2)
        return -functional.cross_entropy(logits, tokens, reduction="none", ignore_index=0)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Negative log-mass in nats per token [B], of a window of each row."""
        tokens, before = self._windows(rows.to(torch.int64))
        return -self.log_masses(tokens, before).sum(1) / (tokens != 0).sum(1).clamp(min=1)

    def _windows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Windows of rows [B, WINDOW] and the tokens before each of theirs.

        Those of a text are from anywhere and know of nothing before, as the rows that are scored.
        Those of music are whole beats after a token that they know, or often the beginning of the piece.
        """
        lead = WINDOW if self.is_music else 0
        spare = ((tokens != 0).sum(1, keepdim=True) - WINDOW).clamp(min=0) + lead + 1
        starts = (torch.rand(spare.shape, device=tokens.device) * spare).long() - lead
        starts = starts.clamp(min=0) // self.period * self.period
        chosen = starts + torch.arange(WINDOW, device=tokens.device)
        window = tokens.gather(1, chosen)
        return window, _shifted(tokens).gather(1, chosen) if self.is_music else _shifted(window)


def _shifted(tokens: Tensor) -> Tensor:
    """The token before each of [B, T]: 0 before the first."""
    return functional.pad(tokens[:, :-1], (1, 0))


def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """A token int64 [B] of logits [B, N], by inversion of a uniform number, among the likeliest ones.

    The logits are divided by the temperature; of them the top_k likeliest are kept (0 for all), and of those
    as few as have top_p of their mass. A temperature of 0 keeps the likeliest one. Equals stay together.
    """
    above = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=_COLDEST).unsqueeze(1)
    masses = above.softmax(-1)
    ranked = masses.sort(-1, descending=True).values
    most = torch.where(top_k == 0, torch.full_like(top_k, masses.shape[1]), top_k)
    most = torch.where(temperature == 0, torch.ones_like(most), most).unsqueeze(1)
    within = torch.where(
        torch.arange(masses.shape[1], device=masses.device) < most, ranked, torch.zeros_like(ranked)
    )
    reached = within.cumsum(-1)
    is_kept = (within > 0) & (reached - within < top_p.unsqueeze(1) * reached[:, -1:])
    last = (is_kept.long().sum(-1, keepdim=True) - 1).clamp(min=0)
    kept = torch.where(masses >= ranked.gather(1, last), masses, torch.zeros_like(masses)).cumsum(-1)
    return (uniform.unsqueeze(1) * kept[:, -1:] >= kept[:, :-1]).long().sum(-1)


def _at(row: Tensor, index: Tensor) -> Tensor:
    """The element of each row [B, N] at an index [B]; slots without a row count on, and read any."""
    return row.gather(1, index.clamp(min=0, max=row.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _put(row: Tensor, index: Tensor, element: Tensor) -> Tensor:
    """Rows [B, N] with an element [B] at an index [B]."""
    here = torch.arange(row.shape[1], device=row.device) == index.unsqueeze(1)
    return torch.where(here, element.unsqueeze(1).to(row.dtype), row)


def _before(sequence: Tensor, step_index: Tensor) -> Tensor:
    """The token before the one at step_index, int64 [B]: 0 before the first."""
    before = _at(sequence, step_index - 1).to(torch.int64)
    return torch.where(step_index == 0, torch.zeros_like(before), before)


def _length(sequence: Tensor) -> Tensor:
    """The number of tokens before the first 0, int64 [B]."""
    return ((sequence == 0).long().cumsum(-1) == 0).long().sum(-1)


class _Part(nn.Module):
    """A module of a program: a function of the trained network."""

    def __init__(self, lstm: LSTM) -> None:
        super().__init__()
        self.lstm = lstm


class SampleStep(_Part):
    """Take the prompt's token at step_index, or draw one after the prompt's end."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        hidden: Tensor,
        cell: Tensor,
        written: Tensor,
        log_masses: Tensor,
        num_drawn: Tensor,
        is_done: Tensor,
        prompt: Tensor,
        tokens: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        stop: Tensor,
        token_noise: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, ...]:
        logits, (hidden, cell) = self.lstm.step(_before(written, step_index), step_index, (hidden, cell))
        given = _at(prompt, step_index).to(torch.int64)
        is_given = (given != 0) & (num_drawn == 0)
        token = torch.where(is_given, given, draw(logits, temperature, top_k, top_p, token_noise))
        num_drawn = num_drawn + (~is_given).long()
        is_over = (num_drawn >= tokens) | (~is_given & (token == stop))
        return (
            hidden,
            cell,
            _put(written, step_index, token),
            _put(log_masses, step_index, _at(logits.log_softmax(-1), token)),
            num_drawn,
            is_done | is_over,
        )


class SampleReadout(nn.Module):
    """The tokens so far, 0 after them, and how many they are."""

    def forward(self, written: Tensor, log_masses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return written.clone(), log_masses.clone(), (written != 0).long().sum(-1)


class ScoreStep(_Part):
    """Add the log-mass of the token at step_index."""

    def forward(
        self,
        hidden: Tensor,
        cell: Tensor,
        log_masses: Tensor,
        total: Tensor,
        sequence: Tensor,
        step_index: Tensor,
    ) -> tuple[Tensor, ...]:
        logits, (hidden, cell) = self.lstm.step(_before(sequence, step_index), step_index, (hidden, cell))
        token = _at(sequence, step_index).to(torch.int64)
        log_mass = _at(logits.log_softmax(-1), token)
        log_mass = torch.where(token == 0, torch.zeros_like(log_mass), log_mass)
        is_last = (token == 0) | (_at(sequence, step_index + 1) == 0)
        return hidden, cell, _put(log_masses, step_index, log_mass), total + log_mass, is_last


class ScoreReadout(nn.Module):
    """The log-mass of the sequence, that of every token, and their number."""

    def forward(self, total: Tensor, log_masses: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return total.clone(), log_masses.clone(), _length(sequence)


class EncodeStep(_Part):
    """Read the token before step_index; a row is done where there is none to read next."""

    def forward(
        self, hidden: Tensor, cell: Tensor, sequence: Tensor, step_index: Tensor
    ) -> tuple[Tensor, ...]:
        _, (hidden, cell) = self.lstm.step(_before(sequence, step_index), step_index, (hidden, cell))
        return hidden, cell, _at(sequence, step_index) == 0


class EncodeReadout(nn.Module):
    """The last layer's h."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, -1].clone()


class Family:
    """The LSTM as the exporter sees it."""

    name = "lstm"
    description = "LSTM over characters or voices (Hochreiter & Schmidhuber 1997), exact token by token."
    operations: tuple[str, ...] = ("sample", "score", "encode")
    unsupported_operations: Mapping[str, str] = {
        "reconstruct": "the features of a sequence cannot be decoded; sample continues a sequence",
        "decode": "the features of a sequence cannot be decoded; sample continues a sequence",
        "energy": "the score is exact; the energy is its negative",
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
        """An untrained network; DataError when the rows are not sequences."""
        if data.spec.kind != "tokens":
            raise DataError(
                f"{data.name}: expected sequences of tokens, got {data.spec.kind} rows; train on "
                "--data text, --data chorales, or a --data-dir with input.txt"
            )
        return LSTM(data, preset)

    def build_programs(self, network: Network, data: Dataset) -> tuple[Program, ...]:
        """sample, score and encode."""
        assert isinstance(network, LSTM)
        sequence = data.spec.tensor
        return _sample(network, sequence), _score(network, sequence), _encode(network, sequence)

    def build_examples(self, data: Dataset) -> tuple[Example, ...]:
        """From nothing and from prompts, with every parameter; scores and features of short sequences."""
        rows = data.test.rows[:3].copy()
        for row, length in zip(rows, (20, 9, 1), strict=True):
            row[length:] = 0
        few = min(12, data.spec.num_levels - 1)
        settings = {"tokens": 12, "temperature": 0.7, "top_k": few, "top_p": 0.9, "stop": int(rows[0, 0])}
        return (
            Example("sample", seed=1, parameters={"tokens": 24}),
            Example("sample", seed=2, first_row=5, parameters=settings, inputs={"prompt": rows}),
            Example("sample", seed=3, parameters={"tokens": 8, "temperature": 0}, inputs={"prompt": rows}),
            Example("score", inputs={"sequence": rows}),
            Example("encode", inputs={"sequence": rows}),
        )

    def measure_quality(
        self, interpreter: Interpreter, data: Dataset, preset: Preset
    ) -> list[manifest_pb2.Quality]:
        """Exact log-masses of test rows beside those of an n-gram model of the same training rows."""
        rows = data.test.rows[: preset.evaluation_rows]
        given = make_rows(interpreter.program("score"), 0, range(len(rows)), inputs={"sequence": rows})
        scores = play(interpreter, "score", given, "log-mass of test rows")
        nats, lengths = scores["log_mass"].astype(np.float64), scores["length"]
        rival = WittenBell(data.train.rows, len(data.spec.vocabulary) - 1).log_masses(rows)
        if data.spec.vocabulary == chorales.VOCABULARY:
            frames = (lengths - 1) // chorales.VOICES
            return [*_figures(nats, rival, frames, "nats/frame", 1), _rate(nats, lengths, "nats/token", 1)]
        return _figures(nats, rival, lengths, "bits/char", math.log(2))

    def build_panels(self, interpreter: Interpreter, data: Dataset) -> Sequence[Drawing]:
        """Test rows beside samples, as text or as the pitches that sound."""
        real, vocabulary = data.test.rows[:PICTURED], data.spec.vocabulary
        drawn = {
            title: interpreter.run(
                "sample", make_rows(interpreter.program("sample"), 0, range(PICTURED), given)
            )
            for title, given in {"samples": {}, "samples, temperature 0.7": {"temperature": 0.7}}.items()
        }
        shown = {"test rows": real} | {title: outputs["sequence"] for title, outputs in drawn.items()}
        if vocabulary == chorales.VOCABULARY:
            ink = data.spec.num_levels - 1
            return [Panel(title, chorales.piano_roll(rows) * ink, columns=1) for title, rows in shown.items()]
        return [
            text.TextPanel(title, tuple("\n~\n".join(text.to_strings(rows, vocabulary)).split("\n")))
            for title, rows in shown.items()
        ]


def _figures(
    nats: NDArray[np.float64], rival: NDArray[np.float64], counts: NDArray[np.int64], unit: str, size: float
) -> list[manifest_pb2.Quality]:
    anchor = _rate(rival, counts, unit, size)
    anchor.name = f"the same of a {ORDER}-gram"
    anchor.doc = f"Interpolated by Witten and Bell, of the same training rows. {anchor.doc}"
    gain = _rate(rival - nats, counts, unit, size)
    gain.name = f"gain over the {ORDER}-gram"
    gain.doc = "The difference of the two, row by row."
    return [_rate(nats, counts, unit, size), anchor, gain]


def _rate(
    nats: NDArray[np.float64], counts: NDArray[np.int64], unit: str, size: float
) -> manifest_pb2.Quality:
    """-sum of nats / sum of counts, each nat being 1 / size of the unit; the error is of a ratio of means."""
    rate = -nats.sum() / counts.sum()
    residuals = nats + rate * counts
    error = math.sqrt(np.square(residuals).sum() * len(nats) / max(len(nats) - 1, 1)) / counts.sum()
    return manifest_pb2.Quality(
        name="negative log-likelihood",
        value=float(rate / size),
        unit=unit,
        standard_error=float(error / size),
        doc=f"Exact, {len(nats)} test rows, each from the state that the program starts with.",
    )


def _state(lstm: LSTM) -> tuple[TensorSpec, TensorSpec]:
    shape = (lstm.depth, lstm.width)
    return (
        TensorSpec("hidden", shape=shape, doc="h of every layer"),
        TensorSpec("cell", shape=shape, doc="c of every layer"),
    )


def _log_masses(lstm: LSTM, name: str) -> TensorSpec:
    doc = "log-mass of each token given those before it, in nats, under the model itself; 0 after the last"
    return TensorSpec(name, shape=(lstm.context,), doc=doc)


def _length_of(sequence: TensorSpec) -> TensorSpec:
    return TensorSpec("length", "int64", (), 0, sequence.shape[0], "number of tokens")


def _sample(lstm: LSTM, sequence: TensorSpec) -> Program:
    prompt = f"{sequence.doc}; what it begins with"
    return Program(
        operation="sample",
        step=SampleStep(lstm),
        readout=SampleReadout(),
        outputs=(sequence, _log_masses(lstm, "log_mass_by_token"), _length_of(sequence)),
        doc="Draw tokens one after the other, from nothing or after a prompt.",
        state=(
            *_state(lstm),
            TensorSpec("written", sequence.dtype, sequence.shape, doc="the tokens so far"),
            _log_masses(lstm, "log_masses"),
            TensorSpec("num_drawn", "int64", doc="tokens drawn, those of the prompt not among them"),
            TensorSpec("is_done", "bool", doc="true after the last token"),
        ),
        steps=Steps(fixed=lstm.context, done_flag="is_done"),
        parameters=_settings(lstm),
        inputs=(
            Input(TensorSpec("prompt", sequence.dtype, sequence.shape, 0, sequence.maximum, prompt), True),
        ),
        noise=(Noise("token_noise", "uniform", (), 0, "draws the step's token, by inversion"),),
        previewable=True,
    )


def _settings(lstm: LSTM) -> tuple[Parameter, ...]:
    most, last = lstm.context, lstm.symbols
    return (
        Parameter(
            "tokens", "integer", most, 1, most,
            doc=f"how many to draw at most; a sequence, with its prompt, has no more than {most}",
        ),
        Parameter(
            "temperature", "float", 1, 0, 2,
            doc="divides the logits: 1 is the model's own, 0 takes the likeliest token",
        ),
        Parameter("top_k", "integer", 0, 0, last, doc="draws among the likeliest k tokens; 0 among all"),
        Parameter(
            "top_p", "float", 1, 0, 1,
            doc="draws among the likeliest tokens with this much of the mass, after temperature and top_k",
        ),
        Parameter(
            "stop", "integer", lstm.stop, 0, last,
            doc="ends the sequence with this token once it is drawn; 0 for none",
        ),
    )  # fmt: skip


def _score(lstm: LSTM, sequence: TensorSpec) -> Program:
    return Program(
        operation="score",
        step=ScoreStep(lstm),
        readout=ScoreReadout(),
        outputs=(
            TensorSpec("log_mass", doc="log-mass of the sequence, in nats"),
            _log_masses(lstm, "log_mass_by_token"),
            _length_of(sequence),
        ),
        doc="Log-mass of a sequence as the beginning of what sample draws without a prompt.",
        state=(
            *_state(lstm),
            _log_masses(lstm, "log_masses"),
            TensorSpec("total", doc="their sum so far"),
            TensorSpec("is_done", "bool", doc="true after the last token"),
        ),
        steps=Steps(fixed=lstm.context, done_flag="is_done"),
        inputs=(Input(sequence),),
        score=Score(
            "exact", lstm.context, f"tokens 1..{lstm.symbols}", "log_mass", row_dimensions_output="length"
        ),
    )


def _encode(lstm: LSTM, sequence: TensorSpec) -> Program:
    return Program(
        operation="encode",
        step=EncodeStep(lstm),
        readout=EncodeReadout(),
        outputs=(TensorSpec("features", shape=(lstm.width,), doc="the last layer's h after the sequence"),),
        doc="What the network knows after a sequence: features, from which it cannot be had back.",
        state=(*_state(lstm), TensorSpec("is_done", "bool", doc="true after the last token")),
        # One more than there are tokens: the first step reads the empty token before them.
        steps=Steps(fixed=lstm.context + 1, done_flag="is_done"),
        inputs=(Input(sequence),),
    )


FAMILY = Family()
