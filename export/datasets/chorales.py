"""Bach's four-part chorales as rows of tokens, from the corpus of music21.

Time is divided into frames of an eighth note. A frame has one token per voice, from the soprano down: the
MIDI number of the pitch that starts in the frame, `hold` while the previous note continues, or `rest`. `end`
follows the last frame. Shorter notes that do not sound at the start of a frame are dropped. Index 0 is the
empty token that pads a row, as in text.py.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from export.datasets.text import Corpus, Tokens

VOICES = 4
FRAMES_PER_QUARTER = 2
# Maximum number of tokens in a row: 20 bars of four quarters, with the end. Longer chorales are left out.
CONTEXT = 640
HOLD, REST, END = "hold", "rest", "end"
LOWEST, HIGHEST = 36, 84
VOCABULARY = ("", END, HOLD, REST, *map(str, range(LOWEST, HIGHEST + 1)))
# Every tenth chorale is in the test split, the one after it in the validation split.
FOLDS, TEST_FOLD, VALIDATION_FOLD = 10, 0, 1
# Transpositions of the training split, in semitones, as long as every voice stays in its range.
SHIFTS = range(-6, 6)

_REST = -1
# Pitches [frames, VOICES] with _REST for rests, and whether a note starts there, of the same shape.
Frames = tuple[NDArray[np.int64], NDArray[np.bool_]]


def load_chorales() -> Corpus:
    """Load the chorales with four voices, without duplicates; the training split is also transposed.

    Parsing takes a minute the first time; music21 caches the result.

    Raises:
        ModuleNotFoundError: If music21 is not installed.
    """
    pieces = [piece for piece in _without_duplicates(_parse()) if len(piece[0]) * VOICES < CONTEXT]
    folds = [index % FOLDS for index in range(len(pieces))]
    test = [piece for piece, fold in zip(pieces, folds, strict=True) if fold == TEST_FOLD]
    validation = [piece for piece, fold in zip(pieces, folds, strict=True) if fold == VALIDATION_FOLD]
    train = [
        piece for piece, fold in zip(pieces, folds, strict=True) if fold not in (TEST_FOLD, VALIDATION_FOLD)
    ]
    ranges = voice_ranges(train)
    return Corpus(
        vocabulary=VOCABULARY,
        train=tokenize([transposed for piece in train for transposed in transpose(piece, ranges)]),
        validation=tokenize(validation),
        test=tokenize(test),
    )


def tokenize(pieces: list[Frames]) -> Tokens:
    """Convert pieces to rows of tokens, uint8 [N, CONTEXT]."""
    tokens = np.zeros((len(pieces), CONTEXT), np.uint8)
    for row, (pitches, onsets) in zip(tokens, pieces, strict=True):
        indices = np.where(onsets, pitches - LOWEST + VOCABULARY.index(str(LOWEST)), VOCABULARY.index(HOLD))
        indices = np.where(pitches == _REST, VOCABULARY.index(REST), indices)
        row[: indices.size] = indices.ravel()
        row[indices.size] = VOCABULARY.index(END)
    return tokens


def voice_ranges(pieces: list[Frames]) -> NDArray[np.int64]:
    """Return the lowest and the highest pitch of every voice, [2, VOICES]."""
    pitches = np.concatenate([pitches for pitches, _ in pieces])
    return np.stack([np.where(pitches == _REST, HIGHEST, pitches).min(0), pitches.max(0)])


def transpose(piece: Frames, ranges: NDArray[np.int64]) -> Iterator[Frames]:
    """Yield the piece in every key, the original included, in which all voices stay in their ranges."""
    pitches, onsets = piece
    for shift in SHIFTS:
        shifted = np.where(pitches == _REST, _REST, pitches + shift)
        if ((pitches == _REST) | ((shifted >= ranges[0]) & (shifted <= ranges[1]))).all():
            yield shifted, onsets


def piano_roll(tokens: Tokens) -> NDArray[np.bool_]:
    """Return which pitches sound in each frame, bool [N, HIGHEST - LOWEST + 1, frames], highest first."""
    voices = tokens[:, : tokens.shape[1] // VOICES * VOICES].reshape(len(tokens), -1, VOICES).astype(np.int64)
    sounding = np.zeros((len(tokens), HIGHEST - LOWEST + 1, voices.shape[1]), bool)
    current = np.zeros(voices[:, 0].shape, np.int64)
    first_pitch = VOCABULARY.index(str(LOWEST))
    for frame in range(voices.shape[1]):
        current = np.where(voices[:, frame] == VOCABULARY.index(HOLD), current, voices[:, frame])
        row, voice = np.nonzero(current >= first_pitch)
        sounding[row, len(sounding[0]) - 1 - (current[row, voice] - first_pitch), frame] = True
    return sounding


def _without_duplicates(pieces: Iterator[Frames]) -> list[Frames]:
    return list(
        {pitches.tobytes() + onsets.tobytes(): (pitches, onsets) for pitches, onsets in pieces}.values()
    )


def _parse() -> Iterator[Frames]:
    from music21 import corpus

    scores = corpus.chorales.Iterator()
    for score in tqdm(scores, "  reading chorales", total=371, unit="chorale", dynamic_ncols=True):
        if len(score.parts) == VOICES:
            yield _to_frames(score)


def _to_frames(score: Any) -> Frames:
    voices = [list(_notes(part)) for part in score.parts]
    num_frames = max(int(end * FRAMES_PER_QUARTER) for notes in voices for *_, end in notes)
    pitches = np.full((num_frames, VOICES), _REST)
    onsets = np.zeros((num_frames, VOICES), bool)
    for voice, notes in enumerate(voices):
        for pitch, is_tied, start, end in notes:
            # Round both times up to the next frame.
            first, last = (-int(-time * FRAMES_PER_QUARTER // 1) for time in (start, end))
            pitches[first:last, voice] = pitch
            onsets[first : min(first + 1, last), voice] = not is_tied
    return pitches, onsets


def _notes(part: Any) -> Iterator[tuple[int, bool, float, float]]:
    """Yield pitch, whether it is tied to the previous note, start and end in quarters, of every note."""
    for note in part.flatten().notes:
        is_tied = note.tie is not None and note.tie.type != "start"
        # Where a part divides, the upper note is the voice.
        yield (
            max(pitch.midi for pitch in note.pitches),
            is_tied,
            note.offset,
            note.offset + note.quarterLength,
        )
