"""Tests of the chorales: tokens, transposition, piano rolls and parsing."""

import numpy as np

from export.datasets import chorales

# Pitches and onsets [frames, voices]; -1 is a rest.
PIECE = (
    np.array([[67, 62, 59, 43], [67, 62, -1, 55], [69, 62, 59, 55]]),
    np.array([[True, True, True, True], [False, False, False, True], [True, True, True, False]]),
)


def test_tokenize_writes_one_token_for_each_voice_and_frame() -> None:
    (row,) = chorales.tokenize([PIECE])
    words = [chorales.VOCABULARY[token] for token in row[:13]]
    assert words == ["67", "62", "59", "43", "hold", "hold", "rest", "55", "69", "62", "59", "hold", "end"]
    assert (row[13:] == 0).all()


def test_transpose_keeps_voices_in_their_ranges() -> None:
    ranges = np.array([[66, 60, 58, 42], [72, 64, 60, 60]])
    transposed = list(chorales.transpose(PIECE, ranges))
    assert [pitches[0, 0] - 67 for pitches, _ in transposed] == [-1, 0, 1]
    assert all(pitches[1, 2] == -1 for pitches, _ in transposed)
    np.testing.assert_array_equal(chorales.voice_ranges([PIECE]), [[67, 62, 59, 43], [69, 62, 59, 55]])


def test_piano_roll_marks_the_pitches_that_sound() -> None:
    roll = chorales.piano_roll(chorales.tokenize([PIECE]))[0]
    sounding = [sorted(84 - np.flatnonzero(roll[:, frame])) for frame in range(4)]
    assert sounding == [[43, 59, 62, 67], [55, 62, 67], [55, 59, 62, 69], []]


def test_parsed_chorale_has_the_pitches_and_onsets_of_the_score() -> None:
    """BWV 269 starts with an upbeat on a G major chord. Its bass then moves in eighth notes."""
    from music21 import corpus

    pitches, onsets = chorales._to_frames(corpus.parse("bach/bwv269"))
    assert pitches[:3].tolist() == [[67, 62, 59, 43], [67, 62, 59, 43], [67, 62, 59, 55]]
    assert onsets[:3].tolist() == [[True] * 4, [False] * 4, [True] * 4]
    assert pitches[6, :].tolist() == [74, 62, 57, 54]
