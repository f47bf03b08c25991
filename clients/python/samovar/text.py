"""Texts that a model goes on writing, whole or piece by piece."""

from collections.abc import Iterator, Sequence

from samovar._messages import CallOptions
from samovar.client import Client
from samovar.errors import invalid_request
from samovar.model import DataSpec, Model, Scalar
from samovar.tokens import row, separator_of, tokens_of, words_of

PROMPT, STOP = "prompt", "stop"


def complete(
    client: Client, model: str, prompt: str = "", *, options: CallOptions | None = None, **parameters: Scalar
) -> str:
    """A text that begins with the prompt, which may be empty, and goes on as the model would.

    Parameters are those of the model's `sample`, such as tokens=200 or temperature=0.8; `stop` may
    be a word of the vocabulary too. `options` are what any call may say, such as {"seed": 7}.
    InvalidRequest names the first character that the model does not know, before anything is sent.
    """
    described = _described(client, model, options)
    words = tokens_of(prompt, described.data_spec, PROMPT)
    return prompt + "".join(pieces(client, described, words, options=options, **parameters))


def stream(
    client: Client, model: str, prompt: str = "", *, options: CallOptions | None = None, **parameters: Scalar
) -> Iterator[str]:
    """The same piece by piece, as the model writes it, the prompt left out."""
    described = _described(client, model, options)
    yield from pieces(
        client, described, tokens_of(prompt, described.data_spec, PROMPT), options=options, **parameters
    )


def pieces(
    client: Client,
    model: Model,
    prompt: Sequence[int],
    *,
    options: CallOptions | None = None,
    **parameters: Scalar,
) -> Iterator[str]:
    """What a model that is known writes after a prompt of tokens, as it comes."""
    settled = CallOptions(**(options or {}), parameters=_settled(parameters, model.data_spec))
    operation = model.operation("sample", settled.get("variant", ""))
    inputs = {PROMPT: row(prompt, model.data_spec)} if prompt else {}
    separator, seen = separator_of(model.data_spec), len(prompt)
    previews = int(operation.previewable)
    with client.stream(model.name, inputs=inputs, preview_every=previews, **settled) as events:
        for event in events:
            (tokens,) = event.outputs[operation.outputs[0].name]
            words = words_of(tokens, model.data_spec)
            if len(words) > seen:
                yield (separator if seen else "") + separator.join(words[seen:])
                seen = len(words)


def _described(client: Client, model: str, options: CallOptions | None) -> Model:
    given = options or {}
    return client.model(model, given.get("version", ""), given.get("format", ""))


def _settled(parameters: dict[str, Scalar], value: DataSpec) -> dict[str, Scalar]:
    """The parameters, with a stop that is given as a word by its index."""
    stop = parameters.get(STOP)
    if not isinstance(stop, str):
        return parameters
    words = tokens_of(stop, value, f"parameters[{STOP}]")
    if len(words) != 1:
        raise invalid_request(f"parameters[{STOP}]", f"expected one token, got {len(words)}: {stop!r}")
    return parameters | {STOP: words[0]}
