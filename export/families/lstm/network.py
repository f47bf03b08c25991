"""The LSTM network: one step for the programs, whole sequences for training, and the loss.

Shapes: B rows, T tokens, L layers, F = `width` units, V = number of logits.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from export.datasets import chorales
from export.datasets.loading import Dataset
from export.families.base import Preset
from export.probability.batch_invariant_ops import SIMD_WIDTH
from export.training.trainer import Network

# Tokens of a row that a training step reads.
WINDOW_TOKENS = 128
# Music repeats its voices in every frame, and its accents in every beat.
TOKENS_PER_BEAT = chorales.VOICES * chorales.FRAMES_PER_QUARTER
# Logit of a token that cannot be drawn. It is finite, so that every row stays finite.
_LOG_ZERO = -1e30

# h and c of every layer, each [B, L, F].
State = tuple[Tensor, Tensor]


class LSTM(Network):
    """p(x) over sequences [context] of the tokens 1..num_symbols, padded with 0 at the end.

    V is the size of the vocabulary, rounded up to a multiple of SIMD_WIDTH. Token 0 and the logits beyond the
    vocabulary are masked.
    """

    logit_mask: Tensor

    def __init__(self, data: Dataset, preset: Preset) -> None:
        super().__init__()
        (self.context,), vocabulary = data.spec.tensor.shape, data.spec.vocabulary
        self.width, self.depth = preset.width, preset.depth
        self.is_music = vocabulary == chorales.VOCABULARY
        self.period = TOKENS_PER_BEAT if self.is_music else 1
        self.stop_token = vocabulary.index(chorales.END) if self.is_music else 0
        self.num_symbols = len(vocabulary) - 1
        self.token_embedding = nn.Embedding(len(vocabulary), self.width)
        self.position_embedding = nn.Embedding(self.period, self.width)
        # A random vector that is common to all tokens slows training down.
        nn.init.zeros_(self.position_embedding.weight)
        dropout = preset.dropout if self.depth > 1 else 0.0
        self.layers = nn.LSTM(self.width, self.width, self.depth, batch_first=True, dropout=dropout)
        self.dropout = nn.Dropout(preset.dropout)
        self.head = nn.Linear(self.width, -(-len(vocabulary) // SIMD_WIDTH) * SIMD_WIDTH)
        indices = torch.arange(self.head.out_features)
        is_symbol = (indices > 0) & (indices <= self.num_symbols)
        self.register_buffer("logit_mask", torch.where(is_symbol, 0.0, _LOG_ZERO))
        self._open_forget_gates()

    def _open_forget_gates(self) -> None:
        """Set the biases of the forget gates to 1 (Jozefowicz, Zaremba & Sutskever 2015)."""
        for layer in range(self.depth):
            bias = getattr(self.layers, f"bias_ih_l{layer}")
            nn.init.ones_(bias[self.width : 2 * self.width])

    def step(self, previous: Tensor, position: Tensor, state: State) -> tuple[Tensor, State]:
        """Read one token, and return the logits [B, V] of the next token and the new state.

        Args:
            previous: the token to read, int64 [B].
            position: index of the next token in its sequence, int64 [B].
            state: h and c of every layer, each [B, L, F].
        """
        features = self.token_embedding(previous) + self.position_embedding(position % self.period)
        hidden, cells = [], []
        for layer, (h, c) in enumerate(zip(*(tensor.unbind(1) for tensor in state), strict=True)):
            features, cell = self._cell(layer, features, h, c)
            hidden.append(features)
            cells.append(cell)
        return self.logits(features), (torch.stack(hidden, 1), torch.stack(cells, 1))

    def _cell(self, layer: int, x: Tensor, h: Tensor, c: Tensor) -> State:
        """Return h and c [B, F] of a layer after its input x [B, F]."""
        input_weights, hidden_weights = (
            (getattr(self.layers, f"weight_{kind}_l{layer}"), getattr(self.layers, f"bias_{kind}_l{layer}"))
            for kind in ("ih", "hh")
        )
        gates = functional.linear(x, *input_weights) + functional.linear(h, *hidden_weights)
        input_gate, forget_gate, candidate, output_gate = gates.chunk(4, 1)
        cell = forget_gate.sigmoid() * c + input_gate.sigmoid() * candidate.tanh()
        return output_gate.sigmoid() * cell.tanh(), cell

    def logits(self, features: Tensor) -> Tensor:
        """Return the masked logits [..., V] of features [..., F]."""
        logits: Tensor = self.head(features)
        return logits + self.logit_mask

    def log_masses(self, tokens: Tensor, previous: Tensor | None = None) -> Tensor:
        """Return log p(x_t | x_1 .. x_(t-1)) in nats [B, T]; 0 for the token 0.

        Args:
            tokens: int64 [B, T].
            previous: the token before each, int64 [B, T]. By default `tokens` start their sequences.
        """
        previous = _shift(tokens) if previous is None else previous
        positions = torch.arange(tokens.shape[1], device=tokens.device) % self.period
        embedded = self.token_embedding(previous) + self.position_embedding(positions)
        features, _ = self.layers(self.dropout(embedded))
        logits = self.logits(self.dropout(features)).transpose(1, 2)
        return -functional.cross_entropy(logits, tokens, reduction="none", ignore_index=0)

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the negative log-mass of a window of each row, in nats per token [B]."""
        tokens, previous = self._draw_windows(rows.to(torch.int64))
        return -self.log_masses(tokens, previous).sum(1) / (tokens != 0).sum(1).clamp(min=1)

    def _draw_windows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return a window of each row, and the token before each of its tokens, both [B, WINDOW_TOKENS].

        Windows of text start anywhere, and their first token follows the empty token, as in rows to score.
        Windows of music start at a beat. Their first token follows the token before it. Many start at the
        start of the piece.
        """
        lead = WINDOW_TOKENS if self.is_music else 0
        spare = ((tokens != 0).sum(1, keepdim=True) - WINDOW_TOKENS).clamp(min=0) + lead + 1
        starts = (torch.rand(spare.shape, device=tokens.device) * spare).long() - lead
        starts = starts.clamp(min=0) // self.period * self.period
        indices = starts + torch.arange(WINDOW_TOKENS, device=tokens.device)
        window = tokens.gather(1, indices)
        return window, _shift(tokens).gather(1, indices) if self.is_music else _shift(window)


def _shift(tokens: Tensor) -> Tensor:
    """Return the token before each of tokens [B, T]: 0 before the first."""
    return functional.pad(tokens[:, :-1], (1, 0))
