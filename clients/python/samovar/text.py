"""Text completion with token models."""

from collections.abc import Iterator, Sequence

from samovar._messages import CallOptions
from samovar.client import Client
from samovar.errors import invalid_request
from samovar.model import DataSpec, Model, Scalar
from samovar.tokens import pad_row, token_separator, token_texts, tokenize

PROMPT, STOP = "prompt", "stop"


def complete(
    client: Client, model: str, prompt: str = "", *, options: CallOptions | None = None, **parameters: Scalar
) -> str:
    """Return the prompt and its continuation.

    Args:
        client: The client.
        model: The model's name.
        prompt: The beginning of the text; may be empty.
        options: Options of the call, such as {"seed": 7}; see `CallOptions`.
        **parameters: Parameters of the model's `sample`, such as tokens=200 or temperature=0.8. `stop` may
            be a token's text instead of its index.

    Raises:
        InvalidRequest: If the prompt or `stop` has an unknown token (before anything is sent), or a parameter
            is invalid.

    Example:
        story = text.complete(client, "stories-lstm", "Once", tokens=200, options={"seed": 7})
    """
    described = _fetch_model(client, model, options)
    tokens = tokenize(prompt, described.data_spec, PROMPT)
    return prompt + "".join(stream_tokens(client, described, tokens, options=options, **parameters))


def stream(
    client: Client, model: str, prompt: str = "", *, options: CallOptions | None = None, **parameters: Scalar
) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces, as the model produces them.

    Args:
        client: The client.
        model: The model's name.
        prompt: The beginning of the text; may be empty. It is not yielded.
        options: Options of the call; see `CallOptions`.
        **parameters: Parameters of the model's `sample`; see `complete`.

    Raises:
        InvalidRequest: If the prompt or `stop` has an unknown token, or a parameter is invalid.
    """
    described = _fetch_model(client, model, options)
    tokens = tokenize(prompt, described.data_spec, PROMPT)
    yield from stream_tokens(client, described, tokens, options=options, **parameters)


def stream_tokens(
    client: Client,
    model: Model,
    prompt: Sequence[int],
    *,
    options: CallOptions | None = None,
    **parameters: Scalar,
) -> Iterator[str]:
    """Yield the continuation of a tokenized prompt in pieces, as the model produces them.

    Args:
        client: The client.
        model: The model's description.
        prompt: Token indices.
        options: Options of the call; see `CallOptions`.
        **parameters: Parameters of the model's `sample`; see `complete`.

    Raises:
        InvalidRequest: If `stop` has an unknown token, or a parameter is invalid.
    """
    data_spec = model.data_spec
    call_options = CallOptions(**(options or {}), parameters=_resolve_stop(parameters, data_spec))
    operation = model.operation("sample", call_options.get("variant", ""))
    inputs = {PROMPT: pad_row(prompt, data_spec)} if prompt else {}
    separator, num_seen = token_separator(data_spec), len(prompt)
    preview_every = int(operation.previewable)
    with client.stream(model.name, inputs=inputs, preview_every=preview_every, **call_options) as events:
        for event in events:
            (tokens,) = event.outputs[operation.outputs[0].name]
            texts = token_texts(tokens, data_spec)
            if len(texts) > num_seen:
                yield (separator if num_seen else "") + separator.join(texts[num_seen:])
                num_seen = len(texts)


def _fetch_model(client: Client, model: str, options: CallOptions | None) -> Model:
    options = options or {}
    return client.model(model, options.get("version", ""), options.get("format", ""))


def _resolve_stop(parameters: dict[str, Scalar], data_spec: DataSpec) -> dict[str, Scalar]:
    """Return the parameters with the text of a stop token replaced by its index."""
    stop = parameters.get(STOP)
    if not isinstance(stop, str):
        return parameters
    tokens = tokenize(stop, data_spec, f"parameters[{STOP}]")
    if len(tokens) != 1:
        raise invalid_request(f"parameters[{STOP}]", f"expected one token, got {len(tokens)}: {stop!r}")
    return parameters | {STOP: tokens[0]}
