"""Music as a Standard MIDI File (MIDI 1.0, format 1): a track for the tempo, and one for each voice.

What a token means, models and this file agree on: time goes by in frames of an eighth
note; a frame has a token for each of four voices, from the highest down, which is a
pitch as its MIDI number, `hold` while the note before sounds on, or `rest`; `end` ends a piece.
"""

import struct
from collections.abc import Iterator, Sequence

VOICES = ("Soprano", "Alto", "Tenor", "Bass")
HOLD, REST, END = "hold", "rest", "end"
TICKS_PER_QUARTER = 480
TICKS_PER_FRAME = TICKS_PER_QUARTER // 2
QUARTERS_PER_MINUTE = 80
# Of General MIDI, counted from 0.
CHURCH_ORGAN = 19
VELOCITY = 80
# Between two pieces.
PAUSE_FRAMES = 4

# Pitch, first frame, and the frame after the last.
Note = tuple[int, int, int]


def is_music(vocabulary: Sequence[str]) -> bool:
    """Whether a vocabulary speaks of voices in frames."""
    return {HOLD, REST, END} <= set(vocabulary)


def encode(pieces: Sequence[Sequence[str]]) -> bytes:
    """Pieces, each the words of its tokens, one after the other in one file."""
    voices: list[list[Note]] = [[] for _ in VOICES]
    start = 0
    for words in pieces:
        frames = _frames(words)
        for voice, notes in enumerate(voices):
            notes.extend(_notes([frame[voice] for frame in frames], start))
        start += len(frames) + PAUSE_FRAMES
    tempo = b"\x00\xff\x51\x03" + (60_000_000 // QUARTERS_PER_MINUTE).to_bytes(3, "big")
    tracks = [_track(tempo), *(_voice(number, notes) for number, notes in enumerate(voices))]
    header = struct.pack(">4sIHHH", b"MThd", 6, 1, len(tracks), TICKS_PER_QUARTER)
    return header + b"".join(tracks)


def _frames(words: Sequence[str]) -> list[Sequence[str]]:
    """Whole frames up to the end."""
    sounding = list(words[: words.index(END)] if END in words else words)
    last = len(sounding) // len(VOICES) * len(VOICES)
    return [sounding[first : first + len(VOICES)] for first in range(0, last, len(VOICES))]


def _notes(words: Sequence[str], start: int) -> Iterator[Note]:
    """The notes of one voice, frames counted from `start`; a hold after nothing is a rest."""
    pitch, first = REST, 0
    for frame, word in enumerate([*words, REST]):
        if word == HOLD:
            continue
        if pitch.isdecimal():
            yield int(pitch), start + first, start + frame
        pitch, first = word, frame


def _voice(number: int, notes: Sequence[Note]) -> bytes:
    """The track of a voice on its own channel: its name, its instrument, its notes."""
    name = VOICES[number].encode()
    events = b"\x00\xff\x03" + _length(len(name)) + name + bytes([0, 0xC0 | number, CHURCH_ORGAN])
    now = 0
    for pitch, first, end in notes:
        begins, ends = first * TICKS_PER_FRAME, end * TICKS_PER_FRAME
        events += _length(begins - now) + bytes([0x90 | number, pitch, VELOCITY])
        events += _length(ends - begins) + bytes([0x80 | number, pitch, 0])
        now = ends
    return _track(events)


def _track(events: bytes) -> bytes:
    events += b"\x00\xff\x2f\x00"
    return struct.pack(">4sI", b"MTrk", len(events)) + events


def _length(number: int) -> bytes:
    """A variable-length quantity: seven bits a byte, the greatest first, the top bit set but in the last."""
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(number & 0x7F | 0x80)
    return bytes(reversed(groups))
