"""A model's tokens as words and back. Knows what a value looks like, and no calls.

The vocabulary is the model's own: characters, or words with blanks between them, such
as the pitches of a piece of music. Its empty word, where it has one, fills up a row.
"""

from collections.abc import Sequence

import numpy as np

from samovar.errors import invalid_request
from samovar.model import DataSpec
from samovar.tensors import Array


def encode(texts: Sequence[str], value: DataSpec, field: str = "inputs") -> Array:
    """Texts as rows of tokens [rows, context]; InvalidRequest for a text that is no row of the model's."""
    return np.stack([row(tokens_of(text, value, field), value) for text in texts])


def decode(tokens: Array, value: DataSpec) -> list[str]:
    """Rows of tokens [rows, context] as texts."""
    return [separator_of(value).join(words_of(each, value)) for each in tokens]


def separator_of(value: DataSpec) -> str:
    """What stands between two words: nothing where all of them are characters."""
    return "" if all(len(word) <= 1 for word in value.vocabulary) else " "


def tokens_of(text: str, value: DataSpec, field: str) -> list[int]:
    """The indices of a text's words; InvalidRequest for the first one that there is not, and for too many."""
    if not value.vocabulary:
        raise invalid_request(
            field, f"expected a model of text; a row of this one is {value.kind} {value.tensor}"
        )
    words = list(text) if not separator_of(value) else text.split()
    index = {word: number for number, word in enumerate(value.vocabulary) if word}
    for position, word in enumerate(words):
        if word not in index:
            raise invalid_request(
                field, f"the model does not know {word!r}, at position {position}; {_known(value)}"
            )
    (context,) = value.tensor.shape
    if len(words) > context:
        raise invalid_request(field, f"expected at most {context} tokens, got {len(words)}")
    return [index[word] for word in words]


def row(tokens: Sequence[int], value: DataSpec) -> Array:
    """Tokens as a row [context], the empty word after them; InvalidRequest when there is no empty word."""
    (context,) = value.tensor.shape
    if len(tokens) < context and "" not in value.vocabulary:
        raise invalid_request("inputs", f"expected {context} tokens, got {len(tokens)}")
    filled = np.full(context, value.vocabulary.index("") if "" in value.vocabulary else 0, value.tensor.dtype)
    filled[: len(tokens)] = tokens
    return filled


def words_of(tokens: Array, value: DataSpec) -> list[str]:
    """The words of one row of tokens up to the first empty one."""
    words = [value.vocabulary[token] for token in tokens.tolist()]
    return words[: words.index("")] if "" in words else words


def _known(value: DataSpec) -> str:
    words = [word for word in value.vocabulary if word]
    return f"it knows {separator_of(value).join(words)!r}"
