"""Checks of models of tokens with samovar.text and samovar.midi: prompts, streams, stop tokens, MIDI."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import samovar
from conformance.requests import SEED, Array, Scalar
from conformance.results import Check, Outcome
from samovar import midi, text, tokens
from samovar._messages import CallOptions

# Values of parameters with which only the most probable token can be drawn.
_GREEDY: Mapping[str, Scalar] = {"temperature": 0.0, "top_k": 1, "top_p": 0.0}
_MAX_TOKENS, _PROMPT_TOKENS = 32, 4


@dataclass(frozen=True)
class TokenChecks:
    """Checks of a model that continues prompts."""

    client: samovar.Client
    model: samovar.Model

    def checks(self) -> Iterator[Check]:
        """Yield the checks; none for a model without prompts."""
        sample = self.model.operations.get("sample")
        if sample is None or text.PROMPT not in {input_.tensor.name for input_ in sample.inputs}:
            return
        parameters = {parameter.name for parameter in sample.parameters}
        yield self._check("complete a prompt", self._complete_prompt)
        yield self._check("stream token by token", self._stream)
        if text.STOP in parameters:
            yield self._check("stop at a token", self._stop)
        for name in sorted(_GREEDY.keys() & parameters):
            yield self._check(
                f"{name}={_GREEDY[name]:g} with two seeds", partial(self._sample_greedily, name)
            )
        if midi.is_music(self.model.data_spec.vocabulary):
            yield self._check("MIDI file", self._write_midi)

    def _complete_prompt(self) -> Outcome:
        """Check that completing a text gives the sample whose input has the text's tokens."""
        prompt = self._join(self._sample()[:_PROMPT_TOKENS])
        row = tokens.encode([prompt], self.model.data_spec)
        expected = self._join(self._sample({text.PROMPT: row}))
        return _compare(self._complete(prompt), expected, "the sample with the tokens of the prompt")

    def _stream(self) -> Outcome:
        chunks = list(
            text.stream(self.client, self.model.name, "", options=self._options(), **self._length())
        )
        outcome = _compare("".join(chunks), self._complete(), "the text of one response")
        problems = outcome.problems + (() if len(chunks) > 1 else ("expected several chunks, got one",))
        return Outcome(outcome.shape, f"{len(chunks)} chunks", problems)

    def _stop(self) -> Outcome:
        """Check that a text ends where a stop token, which occurs in it, comes first."""
        words = self._sample()
        stop = words[len(words) // 2]
        expected = self._join(words[: words.index(stop) + 1])
        return _compare(
            self._complete(parameters={text.STOP: stop}), expected, "the text up to the stop token"
        )

    def _sample_greedily(self, name: str) -> Outcome:
        """Check that two seeds give equal texts if only the most probable token can be drawn."""
        parameters = {name: _GREEDY[name]}
        first, second = (self._complete(seed=seed, parameters=parameters) for seed in (SEED, SEED + 1))
        return _compare(first, second, "the text with another seed")

    def _write_midi(self) -> Outcome:
        """Check that a MIDI file has one track for the tempo and one for each voice."""
        content = midi.encode([self._sample()])
        is_complete = content.startswith(b"MThd") and content.count(b"MTrk") == 1 + len(midi.VOICES)
        return Outcome((len(content),), "format 1", () if is_complete else ("expected one track per voice",))

    def _complete(self, prompt: str = "", seed: int = SEED, parameters: Mapping[str, Scalar] = {}) -> str:
        all_parameters = {**self._length(), **parameters}
        return text.complete(
            self.client, self.model.name, prompt, options=self._options(seed), **all_parameters
        )

    def _sample(self, inputs: Mapping[str, Array] | None = None) -> list[str]:
        """Return the words of a sample, without samovar.text."""
        options = CallOptions(**self._options(), parameters=self._length())
        sample = self.client.sample(self.model.name, inputs=inputs, **options)
        return tokens.token_texts(sample.value[0], self.model.data_spec)

    def _join(self, words: Sequence[str]) -> str:
        return tokens.token_separator(self.model.data_spec).join(words)

    def _options(self, seed: int = SEED) -> CallOptions:
        return CallOptions(seed=seed, version=self.model.version, timeout=None)

    def _length(self) -> dict[str, Scalar]:
        """Return the parameter that limits the number of tokens, if the model has one."""
        parameters = {parameter.name: parameter for parameter in self.model.operations["sample"].parameters}
        return (
            {"tokens": min(_MAX_TOKENS, int(parameters["tokens"].maximum))} if "tokens" in parameters else {}
        )

    def _check(self, name: str, run: Callable[[], Outcome]) -> Check:
        return Check(self.model.name, "sample", name, 1, run)


def _compare(actual: str, expected: str, description: str) -> Outcome:
    problems = (
        () if actual == expected else (f"expected {description}, {expected[:40]!r}, got {actual[:40]!r}",)
    )
    return Outcome((len(actual),), "equal text", problems)
