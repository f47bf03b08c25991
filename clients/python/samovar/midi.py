"""Standard MIDI files of token sequences (MIDI 1.0, format 1): a tempo track and one track per voice.

A sequence of music has one token for each of four voices in each frame of an eighth note, from the highest
voice to the lowest. A token is a pitch as its MIDI number, `hold` to continue the note before it, or `rest`.
The token `end` ends a piece.

The bytes are written by mido, the extra `samovar[midi]`.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
HOLD, REST, END = "hold", "rest", "end"
TICKS_PER_QUARTER = 480
TICKS_PER_FRAME = TICKS_PER_QUARTER // 2
QUARTERS_PER_MINUTE = 80
# The General MIDI program, counted from 0.
CHURCH_ORGAN = 19
VELOCITY = 80
# Silence between two pieces.
PAUSE_FRAMES = 4


class Note(NamedTuple):
    """A note of one voice: a MIDI pitch, its first frame, and the frame after its last."""

    pitch: int
    start: int
    end: int


def is_music(vocabulary: Sequence[str]) -> bool:
    """Return whether a vocabulary is one of voices in frames."""
    return {HOLD, REST, END} <= set(vocabulary)


def encode(pieces: Sequence[Sequence[str]]) -> bytes:
    """Encode pieces of music, one after the other, as a MIDI file.

    Args:
        pieces: The token texts of each piece. An incomplete last frame is dropped.

    Returns:
        The bytes of the file: one track with the tempo, and one for each voice.

    Raises:
        ImportError: If mido is not installed.
    """
    mido = _import_mido()
    file = mido.MidiFile(type=1, ticks_per_beat=TICKS_PER_QUARTER)
    tempo = mido.bpm2tempo(QUARTERS_PER_MINUTE)
    file.tracks.append(mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=tempo)]))
    for channel, notes in enumerate(_voices(pieces)):
        file.tracks.append(mido.MidiTrack(_messages(mido, channel, notes)))
    buffer = io.BytesIO()
    file.save(file=buffer)
    return buffer.getvalue()


def _import_mido() -> Any:
    try:
        import mido
    except ImportError as error:
        raise ImportError(
            "cannot write a MIDI file: mido is not installed; run: pip install 'samovar[midi]'"
        ) from error
    return mido


def _voices(pieces: Sequence[Sequence[str]]) -> list[list[Note]]:
    """Return the notes of each voice over all pieces."""
    voices: list[list[Note]] = [[] for _ in VOICES]
    start = 0
    for words in pieces:
        frames = _frames(words)
        for voice, notes in enumerate(voices):
            notes.extend(_notes([frame[voice] for frame in frames], start))
        start += len(frames) + PAUSE_FRAMES
    return voices


def _frames(words: Sequence[str]) -> list[Sequence[str]]:
    """Return the complete frames before the end token."""
    piece = words[: words.index(END)] if END in words else words
    last = len(piece) // len(VOICES) * len(VOICES)
    return [piece[first : first + len(VOICES)] for first in range(0, last, len(VOICES))]


def _notes(words: Sequence[str], start: int) -> Iterator[Note]:
    """Yield the notes of one voice, with frames counted from `start`; a hold after a rest is a rest."""
    pitch, first = REST, 0
    for frame, word in enumerate([*words, REST]):
        if word == HOLD:
            continue
        if pitch.isdecimal():
            yield Note(int(pitch), start + first, start + frame)
        pitch, first = word, frame


def _messages(mido: Any, channel: int, notes: Sequence[Note]) -> Iterator[Any]:
    """Yield the events of one voice: its name, its instrument and its notes, with times in ticks."""
    yield mido.MetaMessage("track_name", name=VOICES[channel])
    yield mido.Message("program_change", channel=channel, program=CHURCH_ORGAN)
    now = 0
    for note in notes:
        start, end = note.start * TICKS_PER_FRAME, note.end * TICKS_PER_FRAME
        yield mido.Message("note_on", channel=channel, note=note.pitch, velocity=VELOCITY, time=start - now)
        yield mido.Message("note_off", channel=channel, note=note.pitch, velocity=0, time=end - start)
        now = end
