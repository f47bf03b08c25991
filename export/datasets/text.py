"""Text as rows of tokens: characters, a fixed split by contiguous parts, and a page to show them on.

A token is an index into the vocabulary. Index 0 is the empty text: it stands before
the beginning and after the end of a row, never inside. Knows no model.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tokens of a row at most.
CONTEXT = 512
# The vocabulary of the standard library's text, whatever the version of Python: printable ASCII and newline.
CHARACTERS = ("", "\n", *map(chr, range(32, 127)))
MAX_CHARACTERS = 255
VALIDATION_SHARE, TEST_SHARE = 0.05, 0.1

Tokens = NDArray[np.uint8]


@dataclass(frozen=True)
class Corpus:
    """Rows of tokens, uint8 [N, context], 0 after a row's end, in three parts."""

    vocabulary: tuple[str, ...]
    train: Tokens
    validation: Tokens
    test: Tokens


def load_standard_library() -> Corpus:
    """The language reference inside the standard library (pydoc_data.topics): about 370,000 characters.

    Each paragraph once, where the topics repeat each other; quotation marks and dashes become ASCII, what
    else is not ASCII is dropped. The text differs a little between versions of Python, and so do figures.
    """
    from pydoc_data.topics import topics

    paragraphs = dict.fromkeys(
        paragraph for topic in sorted(topics) for paragraph in re.split(r"\n{2,}", topics[topic].strip("\n"))
    )
    plain = "\n\n".join(paragraphs).translate(_PLAIN)
    return make_corpus("".join(character for character in plain if character in CHARACTERS), CHARACTERS)


_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."})


def read_corpus(path: Path) -> Corpus:
    """A file of UTF-8 text with its own characters as vocabulary; ValueError when they are too many."""
    text = path.read_bytes().decode()
    characters = sorted(set(text))
    if len(characters) > MAX_CHARACTERS:
        raise ValueError(
            f"{path}: expected at most {MAX_CHARACTERS} different characters, got {len(characters)}; "
            "replace the rare ones"
        )
    return make_corpus(text, ("", *characters))


def make_corpus(text: str, vocabulary: tuple[str, ...]) -> Corpus:
    """The last tenth of a text to test, the beginning of what is before it to validate, the rest to learn.

    What is learned ends where the test begins, as it is usual: next to it, a text is most like it.
    ValueError when there is not a full row for each part.
    """
    index = {character: number for number, character in enumerate(vocabulary)}
    tokens = np.array([index[character] for character in text], np.uint8)
    learned = int(len(tokens) * (1 - TEST_SHARE))
    chosen = int(learned * VALIDATION_SHARE)
    if chosen < CONTEXT:
        needed = round(CONTEXT / VALIDATION_SHARE / (1 - TEST_SHARE))
        raise ValueError(f"expected a text of {needed} characters or more, got {len(tokens)}")
    return Corpus(
        vocabulary=vocabulary,
        train=split_rows(tokens[chosen:learned]),
        validation=split_rows(tokens[:chosen]),
        test=split_rows(tokens[learned:]),
    )


def split_rows(tokens: Tokens, context: int = CONTEXT) -> Tokens:
    """A sequence cut into rows [N, context], the last one filled up with 0."""
    filled = np.zeros(-(-len(tokens) // context) * context, np.uint8)
    filled[: len(tokens)] = tokens
    return filled.reshape(-1, context)


def lengths(tokens: NDArray[Any]) -> NDArray[np.int64]:
    """The number of tokens before the first 0 of each row of [N, context], int64 [N]."""
    counts: NDArray[np.int64] = ((tokens == 0).cumsum(1) == 0).sum(1)
    return counts


def to_strings(tokens: NDArray[Any], vocabulary: tuple[str, ...]) -> list[str]:
    """Rows of tokens as text."""
    return ["".join(vocabulary[token] for token in row) for row in tokens.tolist()]


@dataclass(frozen=True)
class TextPanel:
    """Titled lines of text in the picture beside an artifact."""

    title: str
    lines: tuple[str, ...]

    def draw(self, axes: "Axes", levels: int) -> None:
        """Write the lines from the top, in a typewriter's face."""
        text = "\n".join(line.expandtabs(4) for line in self.lines)
        axes.text(0, 1, text, family="monospace", fontsize=5, va="top", parse_math=False, clip_on=True)
        axes.set_axis_off()
