"""Interpolation and editing in a model's latent space, built on the operations of a client.

Interpolation between two latents is linear (lerp) or spherical (slerp, White 2016). An edit adds an
attribute vector: the difference of the mean latents of two groups (Larsen et al., "Autoencoding beyond
Pixels", 2016).

The functions read the model's description and never its family:

- The first output of `encode` is the latent. It is the only required input of `decode`.
- If `encode` has a second output of the same shape, that output is the spread of a distribution.
  Interpolation between the means is then linear, because means lie nearer to the origin than draws do.
  Otherwise the output is the latent itself, as for a flow, and interpolation is spherical.
- A seed stands for a draw from a standard normal distribution: stream 0 at step 0 of the generator
  (noise.py). Interpolation between draws is spherical. It needs no `encode`, so it works for GANs.

Rows are encoded and decoded with seed 0 by default, so that equal calls return equal rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, TypeVar, Unpack

import numpy as np
from numpy.typing import ArrayLike

from samovar import noise
from samovar._messages import CallOptions
from samovar.client import Client
from samovar.errors import invalid_request
from samovar.interpolation import lerp, slerp
from samovar.model import Model, Operation, Scalar, TensorSpec
from samovar.result import Result
from samovar.tensors import Array

__all__ = [
    "LatentOptions",
    "Path",
    "attribute",
    "decode",
    "draw",
    "edit",
    "encode",
    "interpolate",
    "lerp",
    "slerp",
]

Path = Literal["lerp", "slerp"]
T = TypeVar("T")


class LatentOptions(TypedDict, total=False):
    """Options of the functions in this module; each is optional.

    Attributes:
        inputs: Optional inputs by name, such as a class label. Each goes to `encode`, to `decode` or to
            both, as the operations declare it.
        parameters: Parameters by name, passed on in the same way.
        version: A version of the model. Default: the newest.
        format: "onnx", "torchscript" or "torch_export". Default: the server's first format.
        seed: The seed of the calls, 0 <= seed < 2**64. Default: 0.
    """

    inputs: Mapping[str, ArrayLike]
    parameters: Mapping[str, Scalar]
    version: str
    format: str
    seed: int


def encode(client: Client, model: str, rows: ArrayLike, **options: Unpack[LatentOptions]) -> Array:
    """Return the latents of rows: the first output of the model's `encode`.

    Args:
        client: The client.
        model: The model's name.
        rows: Rows of the model's data, [N, *shape].
        **options: See `LatentOptions`.

    Returns:
        The latents, [N, *latent].

    Raises:
        UnsupportedOperation: If the model lacks `encode`.
        InvalidRequest: If the rows or an option do not fit the model.
    """
    return _LatentSpace.create(client, model, options).encode(rows)


def decode(client: Client, model: str, latents: ArrayLike, **options: Unpack[LatentOptions]) -> Array:
    """Return the rows of latents: the first output of the model's `decode`.

    Args:
        client: The client.
        model: The model's name.
        latents: Latents, [N, *latent].
        **options: See `LatentOptions`.

    Returns:
        The rows, [N, *shape].

    Raises:
        UnsupportedOperation: If the model lacks `decode`.
        InvalidRequest: If the latents or an option do not fit the model.
    """
    return _LatentSpace.create(client, model, options).decode(latents)


def draw(client: Client, model: str, rows: int, **options: Unpack[LatentOptions]) -> Array:
    """Return standard normal latents, drawn from the seed in the options.

    Args:
        client: The client.
        model: The model's name.
        rows: Number of latents.
        **options: See `LatentOptions`.

    Returns:
        The latents from which `sample` starts with the same seed, float32 [rows, *latent].

    Raises:
        UnsupportedOperation: If the model lacks `decode`, whose input gives the shape.
    """
    return _LatentSpace.create(client, model, options).draw(rows)


def interpolate(
    client: Client,
    model: str,
    a: ArrayLike,
    b: ArrayLike,
    count: int = 8,
    path: Path | None = None,
    **options: Unpack[LatentOptions],
) -> Array:
    """Return decoded rows between two ends.

    Args:
        client: The client.
        model: The model's name.
        a: The first end: a row [*shape], or an integer as the seed of a draw.
        b: The last end, in the same form.
        count: Number of rows, both ends included.
        path: "lerp" or "slerp". Default: "lerp" between the means of distributions, else "slerp".
        **options: See `LatentOptions`.

    Returns:
        The rows, [count, *shape].

    Raises:
        UnsupportedOperation: If the model lacks `decode`, or `encode` when an end is a row.
        InvalidRequest: If an end or an option does not fit the model.

    Example:
        >>> latent.interpolate(client, "digits-vae", 1, 2, count=5).shape  # doctest: +SKIP
        (5, 8, 8)
    """
    space = _LatentSpace.create(client, model, options)
    between_means = not _is_seed(a) and not _is_seed(b) and space.has_spread
    interpolation = {"lerp": lerp, "slerp": slerp, None: lerp if between_means else slerp}[path]
    weights = np.linspace(0, 1, count)
    return space.decode(interpolation(space.latent_of(a), space.latent_of(b), weights))


def attribute(
    client: Client,
    model: str,
    positives: ArrayLike,
    negatives: ArrayLike,
    **options: Unpack[LatentOptions],
) -> Array:
    """Return the attribute vector of two groups: the difference of their mean latents.

    Args:
        client: The client.
        model: The model's name.
        positives: Rows that have the attribute, [N, *shape].
        negatives: Rows that lack it, [M, *shape].
        **options: See `LatentOptions`.

    Returns:
        The direction from the negatives to the positives, float32 [*latent].

    Raises:
        UnsupportedOperation: If the model lacks `encode`.
        InvalidRequest: If the rows or an option do not fit the model.
    """
    space = _LatentSpace.create(client, model, options)
    positive, negative = (space.encode(rows).mean(0, dtype=np.float64) for rows in (positives, negatives))
    return np.asarray(positive - negative, np.float32)


def edit(
    client: Client,
    model: str,
    rows: ArrayLike,
    direction: ArrayLike,
    amount: float = 1.0,
    **options: Unpack[LatentOptions],
) -> Array:
    """Return rows moved along a direction of the latent space.

    Args:
        client: The client.
        model: The model's name.
        rows: Rows, [N, *shape].
        direction: A direction such as an attribute vector, [*latent].
        amount: Factor of the direction.
        **options: See `LatentOptions`.

    Returns:
        The edited rows, [N, *shape].

    Raises:
        UnsupportedOperation: If the model lacks `encode` or `decode`.
        InvalidRequest: If the rows or an option do not fit the model.
    """
    space = _LatentSpace.create(client, model, options)
    return space.decode(space.encode(rows) + np.float32(amount) * np.asarray(direction, np.float32))


@dataclass(frozen=True)
class _LatentSpace:
    """Encoder and decoder of one model, with the options of their calls."""

    client: Client
    model: Model
    options: LatentOptions

    @classmethod
    def create(cls, client: Client, model: str, options: LatentOptions) -> "_LatentSpace":
        described = client.model(model, options.get("version", ""), options.get("format", ""))
        operations = [
            described.operations[name] for name in ("encode", "decode") if name in described.operations
        ]
        _check(
            "inputs", options, {entry.tensor.name for operation in operations for entry in operation.inputs}
        )
        _check(
            "parameters", options, {entry.name for operation in operations for entry in operation.parameters}
        )
        return cls(client, described, options)

    @property
    def has_spread(self) -> bool:
        """Whether the encoder returns distributions, as mean and spread."""
        latent, *others = self.model.operation("encode").outputs
        return bool(others) and others[0].shape == latent.shape

    def encode(self, rows: ArrayLike) -> Array:
        return self._call(self.client.encode, self.model.operation("encode"), rows)

    def decode(self, latents: ArrayLike) -> Array:
        return self._call(self.client.decode, self.model.operation("decode"), latents)

    def draw(self, rows: int) -> Array:
        return self._draw(rows, self.options.get("seed", 0))

    def latent_of(self, end: ArrayLike) -> Array:
        """Return the latent [*latent] of a row or of a seed."""
        row = np.asarray(end)
        latents = self._draw(1, int(row)) if _is_seed(row) else self.encode(row[None])
        return np.asarray(latents[0])

    def _draw(self, rows: int, seed: int) -> Array:
        shape = _required_input(self.model.operation("decode")).shape
        return noise.normal(np.full(rows, seed, np.uint64), np.arange(rows), np.zeros(rows), 0, shape)

    def _call(self, method: Callable[..., Result], operation: Operation, rows: ArrayLike) -> Array:
        input_names = {entry.tensor.name for entry in operation.inputs}
        parameter_names = {entry.name for entry in operation.parameters}
        call_options = CallOptions(
            version=self.model.version,
            format=self.options.get("format", ""),
            seed=self.options.get("seed", 0),
            parameters=_select(parameter_names, self.options.get("parameters", {})),
        )
        inputs = {
            _required_input(operation).name: rows,
            **_select(input_names, self.options.get("inputs", {})),
        }
        return method(self.model.name, inputs, **call_options).value


def _select(names: set[str], entries: Mapping[str, T]) -> dict[str, T]:
    return {name: entry for name, entry in entries.items() if name in names}


def _check(kind: Literal["inputs", "parameters"], options: LatentOptions, known: set[str]) -> None:
    for name in options.get(kind, {}):
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise invalid_request(
                f"{kind}[{name}]", f"unknown to encode and decode; expected one of: {listed}"
            )


def _required_input(operation: Operation) -> TensorSpec:
    """Return the only required input: a row for encode, a latent for decode."""
    required = [entry.tensor for entry in operation.inputs if not entry.optional]
    if len(required) != 1:
        listed = ", ".join(spec.name for spec in required) or "none"
        raise invalid_request(
            "inputs", f"expected one required input of {operation.name}, got {len(required)}: {listed}"
        )
    return required[0]


def _is_seed(end: ArrayLike) -> bool:
    return np.ndim(end) == 0
