"""The programs of the LSTM: sample, score and encode."""

import torch
from torch import Tensor, nn

from export.families.lstm.network import LSTM
from export.graphs.program import DataSpec, Input, Noise, Parameter, Program, Score, Steps, TensorSpec

# Divisor of the logits for a temperature of 0, which keeps only the most likely token.
_MIN_TEMPERATURE = 1e-4


def build_programs(lstm: LSTM, data_spec: DataSpec) -> tuple[Program, ...]:
    """Return the programs in the order of the family's operations."""
    sequence = data_spec.tensor
    return _sample(lstm, sequence), _score(lstm, sequence), _encode(lstm, sequence)


def sample_token(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor
) -> Tensor:
    """Draw a token from the most likely ones, by inversion of a uniform number.

    The logits are divided by the temperature. Then the top_k most likely tokens are kept, and of these the
    fewest that hold the fraction top_p of their mass. Equally likely tokens are kept or dropped together.

    Args:
        logits: [B, V].
        temperature: [B]; 0 keeps only the most likely token.
        top_k: int64 [B]; 0 keeps all tokens.
        top_p: [B]; 1 keeps all tokens.
        uniform: in [0, 1), [B].

    Returns:
        Tokens, int64 [B].
    """
    logits = logits - logits.amax(-1, keepdim=True)
    probabilities = (logits / temperature.clamp(min=_MIN_TEMPERATURE).unsqueeze(1)).softmax(-1)
    ranked = probabilities.sort(-1, descending=True).values
    limit = torch.where(top_k == 0, torch.full_like(top_k, probabilities.shape[1]), top_k)
    limit = torch.where(temperature == 0, torch.ones_like(limit), limit).unsqueeze(1)
    is_in_top_k = torch.arange(probabilities.shape[1], device=probabilities.device) < limit
    top = torch.where(is_in_top_k, ranked, torch.zeros_like(ranked))
    cumulative = top.cumsum(-1)
    is_kept = (top > 0) & (cumulative - top < top_p.unsqueeze(1) * cumulative[:, -1:])
    last = (is_kept.long().sum(-1, keepdim=True) - 1).clamp(min=0)
    minimum = ranked.gather(1, last)
    kept = torch.where(probabilities >= minimum, probabilities, torch.zeros_like(probabilities)).cumsum(-1)
    return (uniform.unsqueeze(1) * kept[:, -1:] >= kept[:, :-1]).long().sum(-1)


def _read(row: Tensor, index: Tensor) -> Tensor:
    """Return element `index` [B] of each row [B, N].

    The index is clamped: in slots without a row it exceeds N.
    """
    return row.gather(1, index.clamp(min=0, max=row.shape[1] - 1).unsqueeze(1)).squeeze(1)


def _write(row: Tensor, index: Tensor, element: Tensor) -> Tensor:
    """Return rows [B, N] with `element` [B] at `index` [B]."""
    is_written = torch.arange(row.shape[1], device=row.device) == index.unsqueeze(1)
    return torch.where(is_written, element.unsqueeze(1).to(row.dtype), row)


def _previous_token(sequence: Tensor, step_index: Tensor) -> Tensor:
    """Return the token before the one at step_index, int64 [B]: 0 before the first."""
    previous = _read(sequence, step_index - 1).to(torch.int64)
    return torch.where(step_index == 0, torch.zeros_like(previous), previous)


class _LSTMModule(nn.Module):
    """Base of the program modules that use the trained network."""

    def __init__(self, lstm: LSTM) -> None:
        super().__init__()
        self.lstm = lstm


class SampleStep(_LSTMModule):
    """Take the prompt's token at step_index, or draw one after the end of the prompt."""

    def forward(  # noqa: PLR0913 (bound by name)
        self,
        hidden: Tensor,
        cell: Tensor,
        generated: Tensor,
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
        previous = _previous_token(generated, step_index)
        logits, (hidden, cell) = self.lstm.step(previous, step_index, (hidden, cell))
        prompt_token = _read(prompt, step_index).to(torch.int64)
        is_prompt = (prompt_token != 0) & (num_drawn == 0)
        drawn = sample_token(logits, temperature, top_k, top_p, token_noise)
        token = torch.where(is_prompt, prompt_token, drawn)
        num_drawn = num_drawn + (~is_prompt).long()
        is_over = (num_drawn >= tokens) | (~is_prompt & (token == stop))
        return (
            hidden,
            cell,
            _write(generated, step_index, token),
            _write(log_masses, step_index, _read(logits.log_softmax(-1), token)),
            num_drawn,
            is_done | is_over,
        )


class SampleReadout(nn.Module):
    """State -> tokens so far with 0 after them, their log-masses, and their number."""

    def forward(self, generated: Tensor, log_masses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return generated.clone(), log_masses.clone(), (generated != 0).long().sum(-1)


class ScoreStep(_LSTMModule):
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
        previous = _previous_token(sequence, step_index)
        logits, (hidden, cell) = self.lstm.step(previous, step_index, (hidden, cell))
        token = _read(sequence, step_index).to(torch.int64)
        log_mass = _read(logits.log_softmax(-1), token)
        log_mass = torch.where(token == 0, torch.zeros_like(log_mass), log_mass)
        is_last = (token == 0) | (_read(sequence, step_index + 1) == 0)
        return hidden, cell, _write(log_masses, step_index, log_mass), total + log_mass, is_last


class ScoreReadout(nn.Module):
    """State -> log-mass of the sequence, log-masses of its tokens, and their number."""

    def forward(self, total: Tensor, log_masses: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = ((sequence == 0).long().cumsum(-1) == 0).long().sum(-1)
        return total.clone(), log_masses.clone(), length


class EncodeStep(_LSTMModule):
    """Read the token before step_index. The row is done if there is no token at step_index."""

    def forward(
        self, hidden: Tensor, cell: Tensor, sequence: Tensor, step_index: Tensor
    ) -> tuple[Tensor, ...]:
        previous = _previous_token(sequence, step_index)
        _, (hidden, cell) = self.lstm.step(previous, step_index, (hidden, cell))
        return hidden, cell, _read(sequence, step_index) == 0


class EncodeReadout(nn.Module):
    """State -> h of the last layer [B, F]."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, -1].clone()


def _sample(lstm: LSTM, sequence: TensorSpec) -> Program:
    prompt_doc = f"{sequence.doc}; the start of the sequence"
    prompt = TensorSpec("prompt", sequence.dtype, sequence.shape, 0, sequence.maximum, prompt_doc)
    return Program(
        operation="sample",
        step=SampleStep(lstm),
        readout=SampleReadout(),
        outputs=(sequence, _log_masses(lstm, "log_mass_by_token"), _length(sequence)),
        doc="Draw tokens one after the other, with or without a prompt.",
        state=(
            *_state(lstm),
            TensorSpec("generated", sequence.dtype, sequence.shape, doc="the tokens so far"),
            _log_masses(lstm, "log_masses"),
            TensorSpec("num_drawn", "int64", doc="number of drawn tokens, without the prompt"),
            TensorSpec("is_done", "bool", doc="true after the last token"),
        ),
        steps=Steps(fixed=lstm.context, done_flag="is_done"),
        parameters=_sampling_parameters(lstm),
        inputs=(Input(prompt, optional=True),),
        noise=(Noise("token_noise", "uniform", (), 0, "draws the token of the step, by inversion"),),
        previewable=True,
    )


def _sampling_parameters(lstm: LSTM) -> tuple[Parameter, ...]:
    context, last = lstm.context, lstm.num_symbols
    return (
        Parameter(
            "tokens", "integer", context, 1, context,
            doc=f"maximum number of tokens to draw; prompt and drawn tokens together are at most {context}",
        ),
        Parameter(
            "temperature", "float", 1, 0, 2,
            doc="divides the logits: 1 is the model's own distribution, 0 takes the most likely token",
        ),
        Parameter("top_k", "integer", 0, 0, last, doc="draws from the k most likely tokens; 0 for all"),
        Parameter(
            "top_p", "float", 1, 0, 1,
            doc="draws from the fewest most likely tokens with this total probability, after temperature and "
            "top_k",
        ),
        Parameter(
            "stop", "integer", lstm.stop_token, 0, last,
            doc="ends the sequence after this token is drawn; 0 for no stop token",
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
            _length(sequence),
        ),
        doc="Log-mass of a sequence: the log-probability that sample, without a prompt, starts with it.",
        state=(
            *_state(lstm),
            _log_masses(lstm, "log_masses"),
            TensorSpec("total", doc="sum of the log-masses so far"),
            TensorSpec("is_done", "bool", doc="true after the last token"),
        ),
        steps=Steps(fixed=lstm.context, done_flag="is_done"),
        inputs=(Input(sequence),),
        score=Score(
            "exact", lstm.context, f"tokens 1..{lstm.num_symbols}", "log_mass", row_dimensions_output="length"
        ),
    )


def _encode(lstm: LSTM, sequence: TensorSpec) -> Program:
    features = TensorSpec("features", shape=(lstm.width,), doc="h of the last layer after the sequence")
    return Program(
        operation="encode",
        step=EncodeStep(lstm),
        readout=EncodeReadout(),
        outputs=(features,),
        doc="Features of a sequence: the network's state after it. They cannot be decoded.",
        state=(*_state(lstm), TensorSpec("is_done", "bool", doc="true after the last token")),
        # One more step than tokens: the first step reads the empty token before the sequence.
        steps=Steps(fixed=lstm.context + 1, done_flag="is_done"),
        inputs=(Input(sequence),),
    )


def _state(lstm: LSTM) -> tuple[TensorSpec, TensorSpec]:
    shape = (lstm.depth, lstm.width)
    return (
        TensorSpec("hidden", shape=shape, doc="h of every layer"),
        TensorSpec("cell", shape=shape, doc="c of every layer"),
    )


def _log_masses(lstm: LSTM, name: str) -> TensorSpec:
    doc = (
        "log-mass of each token given the tokens before it, in nats, under the model without temperature, "
        "top_k and top_p; 0 after the last token"
    )
    return TensorSpec(name, shape=(lstm.context,), doc=doc)


def _length(sequence: TensorSpec) -> TensorSpec:
    return TensorSpec("length", "int64", (), 0, sequence.shape[0], "number of tokens")
