"""LSTM over tokens of text and music (Hochreiter & Schmidhuber 1997)."""

from export.families.lstm.programs import BEAT, FAMILY, LSTM, WINDOW, draw

__all__ = ["BEAT", "FAMILY", "LSTM", "WINDOW", "draw"]
