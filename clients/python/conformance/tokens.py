"""Text and music through samovar.text and samovar.midi: prompts, streams, stops, and bytes to play."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import samovar
from conformance.requests import SEED, Array, Scalar
from conformance.results import Exercise, Found
from samovar import midi, text, tokens
from samovar._messages import CallOptions

# Settings with which the likeliest token alone is left.
COLDEST: Mapping[str, Scalar] = {"temperature": 0.0, "top_k": 1, "top_p": 0.0}
LENGTH, PROMPT = 32, 4


@dataclass(frozen=True)
class Writer:
    """A model of tokens that goes on from a prompt."""

    client: samovar.Client
    model: samovar.Model

    def exercises(self) -> Iterator[Exercise]:
        """What to do; nothing with a model that does not write."""
        usual = self.model.operations.get("sample")
        if usual is None or text.PROMPT not in {each.tensor.name for each in usual.inputs}:
            return
        settings = {each.name for each in usual.parameters}
        yield self._exercise("complete a prompt", self._completed)
        yield self._exercise("stream token by token", self._streamed)
        if text.STOP in settings:
            yield self._exercise("stop at a word", self._stopped)
        for name in sorted(COLDEST.keys() & settings):
            likeliest = partial(self._likeliest, name)
            yield self._exercise(f"{name}={COLDEST[name]:g} for any seed", likeliest)
        if midi.is_music(self.model.data_spec.vocabulary):
            yield self._exercise("MIDI bytes", self._played)

    def _completed(self) -> Found:
        """What goes on from a prompt is what a sample that is given its tokens has."""
        prompt = self._joined(self._words()[:PROMPT])
        row = tokens.encode([prompt], self.model.data_spec)
        wanted = self._joined(self._words({text.PROMPT: row}))
        return _same(self._write(prompt), wanted, "the sample with the prompt's tokens")

    def _streamed(self) -> Found:
        pieces = list(text.stream(self.client, self.model.name, "", options=self._options(), **self._short()))
        found = _same("".join(pieces), self._write(), "what is written at once")
        late = () if len(pieces) > 1 else ("all came at once",)
        return Found(found.shape, f"{len(pieces)} pieces", found.wrong + late)

    def _stopped(self) -> Found:
        """With a word of a text as its stop, the text ends where that word comes first."""
        words = self._words()
        stop = words[len(words) // 2]
        return _same(
            self._write(settings={text.STOP: stop}),
            self._joined(words[: words.index(stop) + 1]),
            "up to the word",
        )

    def _likeliest(self, name: str) -> Found:
        """Where no chance is left, seeds make no difference."""
        setting = {name: COLDEST[name]}
        return _same(
            self._write(settings=setting), self._write(seed=SEED + 1, settings=setting), "for another seed"
        )

    def _played(self) -> Found:
        """A file with a track for the tempo and one for each voice."""
        played = midi.encode([self._words()])
        wanted = played.startswith(b"MThd") and played.count(b"MTrk") == 1 + len(midi.VOICES)
        return Found((len(played),), "format 1", () if wanted else ("no tracks for all voices",))

    def _write(self, prompt: str = "", seed: int = SEED, settings: Mapping[str, Scalar] = {}) -> str:
        every = {**self._short(), **settings}
        return text.complete(self.client, self.model.name, prompt, options=self._options(seed), **every)

    def _words(self, inputs: Mapping[str, Array] | None = None) -> list[str]:
        """What a sample has, without the help of samovar.text."""
        options = CallOptions(**self._options(), parameters=self._short())
        sample = self.client.sample(self.model.name, inputs=inputs, **options)
        return tokens.words_of(sample.value[0], self.model.data_spec)

    def _joined(self, words: Sequence[str]) -> str:
        return tokens.separator_of(self.model.data_spec).join(words)

    def _options(self, seed: int = SEED) -> CallOptions:
        return CallOptions(seed=seed, version=self.model.version, timeout=None)

    def _short(self) -> dict[str, Scalar]:
        """How much to write, where that may be said."""
        settings = {each.name: each for each in self.model.operations["sample"].parameters}
        return {"tokens": min(LENGTH, int(settings["tokens"].maximum))} if "tokens" in settings else {}

    def _exercise(self, what: str, do: Callable[[], Found]) -> Exercise:
        return Exercise(self.model.name, "sample", what, 1, do)


def _same(written: str, wanted: str, than: str) -> Found:
    wrong = () if written == wanted else (f"{written[:40]!r} is not {wanted[:40]!r}, {than}",)
    return Found((len(written),), "same words", wrong)
