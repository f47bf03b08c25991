"""Bach's four-part chorales as rows of tokens, from the corpus that comes with music21.

Time goes by in frames of an eighth note. A frame has a token for every voice, from
the soprano down: the pitch that begins then, as its MIDI number, `hold` while the note
before sounds on, or `rest`; after the last frame comes `end`. Notes shorter than a frame
that do not sound at its beginning are left out. Index 0 is the empty token, after the
end of a row as in text.py. Knows no model.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.datasets.text import Corpus, Tokens

VOICES = 4
FRAMES_PER_QUARTER = 2
# Tokens of a row at most: 20 bars of four quarters, with the end. Longer chorales are left out.
CONTEXT = 640
HOLD, REST, END = "hold", "rest", "end"
LOWEST, HIGHEST = 36, 84
VOCABULARY = ("", END, HOLD, REST, *map(str, range(LOWEST, HIGHEST + 1)))
# Of the chorales: every tenth to test, the ones after those to validate.
FOLDS, TEST_FOLD, VALIDATION_FOLD = 10, 0, 1
# Transpositions of what is learned, in semitones, as far as every voice stays in its range.
SHIFTS = range(-6, 6)

_REST = -1
# Pitches [frames, VOICES], _REST for none; and where a note begins, of the same shape.
Frames = tuple[NDArray[np.int64], NDArray[np.bool_]]


def load_chorales() -> Corpus:
    """The chorales with four voices, each once; those to learn also transposed. Takes a minute at first.

    ModuleNotFoundError when music21 is not there.
    """
    pieces = [piece for piece in _unique(_parsed()) if len(piece[0]) * VOICES < CONTEXT]
    folds = np.arange(len(pieces)) % FOLDS
    held = {
        fold: [piece for piece, own in zip(pieces, folds, strict=True) if own == fold]
        for fold in (TEST_FOLD, VALIDATION_FOLD)
    }
    learned = [piece for piece, fold in zip(pieces, folds, strict=True) if fold not in held]
    return Corpus(
        vocabulary=VOCABULARY,
        train=tokenize([again for piece in learned for again in transpose(piece, voice_ranges(learned))]),
        validation=tokenize(held[VALIDATION_FOLD]),
        test=tokenize(held[TEST_FOLD]),
    )


def tokenize(pieces: list[Frames]) -> Tokens:
    """Pieces as rows of tokens, uint8 [N, CONTEXT]."""
    tokens = np.zeros((len(pieces), CONTEXT), np.uint8)
    for row, (pitches, begins) in zip(tokens, pieces, strict=True):
        named = np.where(begins, pitches - LOWEST + VOCABULARY.index(str(LOWEST)), VOCABULARY.index(HOLD))
        named = np.where(pitches == _REST, VOCABULARY.index(REST), named)
        row[: named.size] = named.ravel()
        row[named.size] = VOCABULARY.index(END)
    return tokens


def voice_ranges(pieces: list[Frames]) -> NDArray[np.int64]:
    """The lowest and the highest pitch of every voice, [2, VOICES]."""
    pitches = np.concatenate([pitches for pitches, _ in pieces])
    return np.stack([np.where(pitches == _REST, HIGHEST, pitches).min(0), pitches.max(0)])


def transpose(piece: Frames, voice_ranges: NDArray[np.int64]) -> Iterator[Frames]:
    """The piece in every key in which all its voices stay in their ranges, its own among them."""
    pitches, begins = piece
    for shift in SHIFTS:
        moved = np.where(pitches == _REST, _REST, pitches + shift)
        if ((pitches == _REST) | ((moved >= voice_ranges[0]) & (moved <= voice_ranges[1]))).all():
            yield moved, begins


def _unique(pieces: Iterator[Frames]) -> list[Frames]:
    return list(
        {pitches.tobytes() + begins.tobytes(): (pitches, begins) for pitches, begins in pieces}.values()
    )


def _parsed() -> Iterator[Frames]:
    from music21 import corpus

    scores = corpus.chorales.Iterator()
    for score in tqdm(scores, "  reading chorales", total=371, unit="chorale", dynamic_ncols=True):
        if len(score.parts) == VOICES:
            yield _frames(score)


def piano_roll(tokens: Tokens) -> NDArray[np.bool_]:
    """Which pitches sound in every frame, [N, HIGHEST - LOWEST + 1, frames], the highest first."""
    voices = tokens[:, : tokens.shape[1] // VOICES * VOICES].reshape(len(tokens), -1, VOICES).astype(np.int64)
    sounding = np.zeros((len(tokens), HIGHEST - LOWEST + 1, voices.shape[1]), bool)
    current = np.zeros(voices[:, 0].shape, np.int64)
    first = VOCABULARY.index(str(LOWEST))
    for frame in range(voices.shape[1]):
        current = np.where(voices[:, frame] == VOCABULARY.index(HOLD), current, voices[:, frame])
        row, voice = np.nonzero(current >= first)
        sounding[row, len(sounding[0]) - 1 - (current[row, voice] - first), frame] = True
    return sounding


def _frames(score: Any) -> Frames:
    voices = [list(_notes(part)) for part in score.parts]
    total = max(int(end * FRAMES_PER_QUARTER) for notes in voices for *_, end in notes)
    pitches = np.full((total, VOICES), _REST)
    begins = np.zeros((total, VOICES), bool)
    for voice, notes in enumerate(voices):
        for pitch, is_tied, start, end in notes:
            first, last = (-int(-time * FRAMES_PER_QUARTER // 1) for time in (start, end))
            pitches[first:last, voice] = pitch
            begins[first : min(first + 1, last), voice] = not is_tied
    return pitches, begins


def _notes(part: Any) -> Iterator[tuple[int, bool, float, float]]:
    """Pitch, whether it is tied to the note before, start and end in quarters, of every note of a part."""
    for note in part.flatten().notes:
        is_tied = note.tie is not None and note.tie.type != "start"
        # Where a part divides, its upper note is the voice.
        yield (
            max(pitch.midi for pitch in note.pitches),
            is_tied,
            note.offset,
            note.offset + note.quarterLength,
        )
