"""Conversion between texts and rows of tokens.

The vocabulary is the model's own: characters, or words separated by spaces, such as the pitches of a piece
of music. The empty token, if the vocabulary has one, pads a row.
"""

from collections.abc import Sequence

import numpy as np

from samovar.errors import invalid_request
from samovar.model import DataSpec
from samovar.tensors import Array


def encode(texts: Sequence[str], data_spec: DataSpec, field: str = "inputs") -> Array:
    """Encode texts as rows of tokens.

    Args:
        texts: The texts.
        data_spec: The model's data.
        field: The name of the request field in errors.

    Returns:
        Rows of token indices, [rows, context].

    Raises:
        InvalidRequest: If the model has no vocabulary, or a text has an unknown token or too many tokens.
    """
    return np.stack([pad_row(tokenize(text, data_spec, field), data_spec) for text in texts])


def decode(tokens: Array, data_spec: DataSpec) -> list[str]:
    """Decode rows of tokens [rows, context] as texts."""
    return [token_separator(data_spec).join(token_texts(row, data_spec)) for row in tokens]


def token_separator(data_spec: DataSpec) -> str:
    """Return the text between two tokens: "" if all tokens are characters, else a space."""
    return "" if all(len(text) <= 1 for text in data_spec.vocabulary) else " "


def tokenize(text: str, data_spec: DataSpec, field: str) -> list[int]:
    """Return the token indices of a text.

    Args:
        text: The text.
        data_spec: The model's data.
        field: The name of the request field in errors.

    Raises:
        InvalidRequest: If the model has no vocabulary, or the text has an unknown token or too many tokens.
    """
    if not data_spec.vocabulary:
        raise invalid_request(
            field, f"expected a model of text; a row of this model is {data_spec.kind} {data_spec.tensor}"
        )
    words = list(text) if not token_separator(data_spec) else text.split()
    index = {word: number for number, word in enumerate(data_spec.vocabulary) if word}
    for position, word in enumerate(words):
        if word not in index:
            known = token_separator(data_spec).join(index)
            raise invalid_request(
                field, f"unknown token {word!r} at position {position}; expected tokens of {known!r}"
            )
    (context,) = data_spec.tensor.shape
    if len(words) > context:
        raise invalid_request(field, f"expected at most {context} tokens, got {len(words)}")
    return [index[word] for word in words]


def pad_row(tokens: Sequence[int], data_spec: DataSpec) -> Array:
    """Return tokens as a row [context], padded with the empty token.

    Raises:
        InvalidRequest: If padding is necessary and the vocabulary has no empty token.
    """
    (context,) = data_spec.tensor.shape
    has_padding = "" in data_spec.vocabulary
    if len(tokens) < context and not has_padding:
        raise invalid_request("inputs", f"expected {context} tokens, got {len(tokens)}")
    padding = data_spec.vocabulary.index("") if has_padding else 0
    row = np.full(context, padding, data_spec.tensor.dtype)
    row[: len(tokens)] = tokens
    return row


def token_texts(tokens: Array, data_spec: DataSpec) -> list[str]:
    """Return the texts of one row of tokens, up to the first empty one."""
    texts = [data_spec.vocabulary[token] for token in tokens.tolist()]
    return texts[: texts.index("")] if "" in texts else texts
