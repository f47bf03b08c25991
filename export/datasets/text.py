"""Text as rows of character tokens, with a fixed split into contiguous parts, and its picture panel.

A token is an index into the vocabulary. Index 0 is the empty string: it pads a row before its beginning and
after its end, and never occurs inside.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Maximum number of tokens in a row.
CONTEXT = 512
# Vocabulary of the standard library's text for every Python version: newline and printable ASCII.
CHARACTERS = ("", "\n", *map(chr, range(32, 127)))
MAX_CHARACTERS = 255
VALIDATION_FRACTION, TEST_FRACTION = 0.05, 0.1

Tokens = NDArray[np.uint8]

_TO_ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})


@dataclass(frozen=True)
class Corpus:
    """A vocabulary and three splits of token rows, uint8 [N, context], padded with 0."""

    vocabulary: tuple[str, ...]
    train: Tokens
    validation: Tokens
    test: Tokens


def load_standard_library() -> Corpus:
    """Load the language reference from the standard library (pydoc_data.topics), about 370,000 characters.

    A paragraph that several topics share is kept once. Quotation marks and dashes are converted to ASCII,
    other non-ASCII characters are dropped. The text, and figures measured on it, differ slightly between
    versions of Python.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(
        paragraph for topic in sorted(topics) for paragraph in re.split(r"\n{2,}", topics[topic].strip("\n"))
    )
    ascii_text = "\n\n".join(paragraphs).translate(_TO_ASCII)
    return make_corpus("".join(character for character in ascii_text if character in CHARACTERS), CHARACTERS)


def read_corpus(path: Path) -> Corpus:
    """Read a UTF-8 text file; its vocabulary is the characters that occur in it.

    Raises:
        ValueError: If the file has more than MAX_CHARACTERS different characters, or is too short.
    """
    text = path.read_bytes().decode()
    characters = sorted(set(text))
    if len(characters) > MAX_CHARACTERS:
        raise ValueError(
            f"{path}: expected at most {MAX_CHARACTERS} different characters, got {len(characters)}; "
            "replace the rare ones"
        )
    return make_corpus(text, ("", *characters))


def make_corpus(text: str, vocabulary: tuple[str, ...]) -> Corpus:
    """Tokenize a text and split it into contiguous parts.

    The last tenth is the test split. Of the text before it, the beginning is the validation split and the
    rest the training split. The training split ends where the test split begins, as is usual: adjacent
    text is the most similar.

    Raises:
        ValueError: If the text is too short for a full row in each split.
    """
    index = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.array([index[character] for character in text], np.uint8)
    test_start = int(len(tokens) * (1 - TEST_FRACTION))
    train_start = int(test_start * VALIDATION_FRACTION)
    if train_start < CONTEXT:
        minimum = round(CONTEXT / VALIDATION_FRACTION / (1 - TEST_FRACTION))
        raise ValueError(f"text too short: expected at least {minimum} characters, got {len(tokens)}")
    return Corpus(
        vocabulary=vocabulary,
        train=split_rows(tokens[train_start:test_start]),
        validation=split_rows(tokens[:train_start]),
        test=split_rows(tokens[test_start:]),
    )


def split_rows(tokens: Tokens, context: int = CONTEXT) -> Tokens:
    """Split a token sequence into rows [N, context]; the last row is padded with 0."""
    padded = np.zeros(-(-len(tokens) // context) * context, np.uint8)
    padded[: len(tokens)] = tokens
    return padded.reshape(-1, context)


def lengths(tokens: NDArray[Any]) -> NDArray[np.int64]:
    """Return the number of tokens before the first 0 of each row of [N, context], int64 [N]."""
    counts: NDArray[np.int64] = ((tokens == 0).cumsum(1) == 0).sum(1)
    return counts


def to_strings(tokens: NDArray[Any], vocabulary: tuple[str, ...]) -> list[str]:
    """Return each row of tokens as text."""
    return ["".join(vocabulary[token] for token in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class TextPanel:
    """Titled lines of text in the picture of an artifact."""

    title: str
    lines: tuple[str, ...]

    def draw(self, axes: "Axes", num_levels: int) -> None:
        """Draw the lines from the top in a monospace font."""
        text = "\n".join(line.expandtabs(4) for line in self.lines)
        axes.text(0, 1, text, family="monospace", fontsize=5, va="top", parse_math=False, clip_on=True)
        axes.set_axis_off()
