"""Walks and edits in a model's latent space: recipes over a client's calls.

A walk between two latents is straight (lerp), or along a great circle (slerp; White,
"Sampling Generative Networks", 2016), which keeps to the distance from the origin at
which draws from a standard normal lie. An edit adds the difference of two groups' mean
latents, an attribute vector (Larsen et al., "Autoencoding beyond Pixels", 2016).

What the recipes take for granted is read from the model's description, never its family:

- the first output of `encode` is a latent, and feeds the only required input of `decode`;
- when `encode` has a second output of that shape, it tells the spread: the encoder gives
  distributions, whose means lie nearer the origin than draws do, and walks between them are
  straight. A lone output is the latent itself, as of a flow, and walks are along a great circle;
- seeds stand for draws from a standard normal, by the generator's stream 0 at step 0, and walks
  between them are along a great circle. That suits models without `encode` too, such as GANs.

Rows are encoded and decoded with seed 0 unless another is given, so a recipe repeats itself.
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
from samovar.model import Model, Operation, Scalar, TensorSpec
from samovar.result import Result
from samovar.tensors import Array

Path = Literal["lerp", "slerp"]
T = TypeVar("T")

# The sine of an angle under which two directions count as one line, and have no arc between them.
_ON_A_LINE = 1e-6


class LatentOptions(TypedDict, total=False):
    """What a recipe's calls say besides rows and latents.

    inputs, parameters: each goes to `encode`, to `decode` or to both, as they declare it.
    version, format, seed: as for any call; the seed is 0 when left out.
    """

    inputs: Mapping[str, ArrayLike]
    parameters: Mapping[str, Scalar]
    version: str
    format: str
    seed: int


def lerp(a: ArrayLike, b: ArrayLike, share: ArrayLike) -> Array:
    """The point [..., *shape] at each share [...] of the straight way from a to b, both [*shape]."""
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.asarray(start + _along(share, start) * (end - start), np.float32)


def slerp(a: ArrayLike, b: ArrayLike, share: ArrayLike) -> Array:
    """The point [..., *shape] at each share [...] of the arc from a to b, both [*shape].

    Vectors on one line through the origin have no one arc between them: they are joined by lerp.
    """
    start, end = np.asarray(a, np.float64), np.asarray(b, np.float64)
    lengths = np.linalg.norm(start) * np.linalg.norm(end)
    cosine = float(np.clip((start * end).sum() / lengths, -1, 1)) if lengths else 1.0
    sine = np.sqrt(1 - cosine**2)
    if sine < _ON_A_LINE:
        return lerp(a, b, share)
    angle, part = np.arccos(cosine), _along(share, start)
    point = np.sin((1 - part) * angle) * start + np.sin(part * angle) * end
    return np.asarray(point / sine, np.float32)


def _along(share: ArrayLike, like: Array) -> Array:
    shares = np.asarray(share, np.float64)
    return shares.reshape(shares.shape + (1,) * like.ndim)


def encode(client: Client, model: str, rows: ArrayLike, **conditions: Unpack[LatentOptions]) -> Array:
    """The latents [N, *latent] of rows [N, *shape]: the first output of the model's `encode`."""
    return _Space.of(client, model, conditions).encode(rows)


def decode(client: Client, model: str, latents: ArrayLike, **conditions: Unpack[LatentOptions]) -> Array:
    """The rows [N, *shape] of latents [N, *latent]: the first output of the model's `decode`."""
    return _Space.of(client, model, conditions).decode(latents)


def draw(client: Client, model: str, rows: int, **conditions: Unpack[LatentOptions]) -> Array:
    """Latents [rows, *latent] from a standard normal: those that a sample of that seed begins with."""
    return _Space.of(client, model, conditions).draw(rows)


def interpolate(
    client: Client,
    model: str,
    a: ArrayLike,
    b: ArrayLike,
    count: int = 8,
    path: Path | None = None,
    **conditions: Unpack[LatentOptions],
) -> Array:
    """Rows [count, *shape] on the way from a to b, both ends included, as the model decodes them.

    a, b: a row [*shape] each, or an integer, which is the seed of a draw.
    path: when left out, what suits such latents, as the module says.
    """
    space = _Space.of(client, model, conditions)
    between_means = not _is_seed(a) and not _is_seed(b) and space.has_spread
    walk = {"lerp": lerp, "slerp": slerp, None: lerp if between_means else slerp}[path]
    return space.decode(walk(space.end(a), space.end(b), np.linspace(0, 1, count)))


def attribute(
    client: Client,
    model: str,
    positives: ArrayLike,
    negatives: ArrayLike,
    **conditions: Unpack[LatentOptions],
) -> Array:
    """The direction [*latent] to the mean latent of rows with an attribute, from that of rows without."""
    space = _Space.of(client, model, conditions)
    having, lacking = (space.encode(rows).mean(0, dtype=np.float64) for rows in (positives, negatives))
    return np.asarray(having - lacking, np.float32)


def edit(
    client: Client,
    model: str,
    rows: ArrayLike,
    direction: ArrayLike,
    amount: float = 1.0,
    **conditions: Unpack[LatentOptions],
) -> Array:
    """Rows [N, *shape] moved by so many times a direction [*latent] of the latent space."""
    space = _Space.of(client, model, conditions)
    return space.decode(space.encode(rows) + np.float32(amount) * np.asarray(direction, np.float32))


@dataclass(frozen=True)
class _Space:
    """The ways into and out of one model's latent space."""

    client: Client
    model: Model
    conditions: LatentOptions

    @classmethod
    def of(cls, client: Client, model: str, conditions: LatentOptions) -> "_Space":
        described = client.model(model, conditions.get("version", ""), conditions.get("format", ""))
        coders = [each for name, each in described.operations.items() if name in ("encode", "decode")]
        _check("inputs", conditions, {each.tensor.name for coder in coders for each in coder.inputs})
        _check("parameters", conditions, {each.name for coder in coders for each in coder.parameters})
        return cls(client, described, conditions)

    @property
    def has_spread(self) -> bool:
        """Whether the encoder gives distributions, by their mean and spread."""
        latent, *others = self.model.operation("encode").outputs
        return bool(others) and others[0].shape == latent.shape

    def encode(self, rows: ArrayLike) -> Array:
        return self._through(self.client.encode, self.model.operation("encode"), rows)

    def decode(self, latents: ArrayLike) -> Array:
        return self._through(self.client.decode, self.model.operation("decode"), latents)

    def draw(self, rows: int) -> Array:
        return self._drawn(rows, self.conditions.get("seed", 0))

    def end(self, end: ArrayLike) -> Array:
        """The latent [*latent] of a row or of a seed."""
        row = np.asarray(end)
        latents = self._drawn(1, int(row)) if _is_seed(row) else self.encode(row[None])
        return np.asarray(latents[0])

    def _drawn(self, rows: int, seed: int) -> Array:
        shape = _main_input(self.model.operation("decode")).shape
        return noise.normal(np.full(rows, seed, np.uint64), np.arange(rows), np.zeros(rows), 0, shape)

    def _through(self, call: Callable[..., Result], operation: Operation, rows: ArrayLike) -> Array:
        inputs = {each.tensor.name for each in operation.inputs}
        parameters = {each.name for each in operation.parameters}
        options = CallOptions(
            version=self.model.version,
            format=self.conditions.get("format", ""),
            seed=self.conditions.get("seed", 0),
            parameters=_only(parameters, self.conditions.get("parameters", {})),
        )
        given = {_main_input(operation).name: rows, **_only(inputs, self.conditions.get("inputs", {}))}
        return call(self.model.name, given, **options).value


def _only(names: set[str], entries: Mapping[str, T]) -> dict[str, T]:
    return {name: entry for name, entry in entries.items() if name in names}


def _check(kind: Literal["inputs", "parameters"], conditions: LatentOptions, known: set[str]) -> None:
    for name in conditions.get(kind, {}):
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise invalid_request(f"{kind}[{name}]", f"neither encode nor decode has it; they have: {listed}")


def _main_input(operation: Operation) -> TensorSpec:
    """The only required input: a row for encode, a latent for decode."""
    required = [each.tensor for each in operation.inputs if not each.optional]
    if len(required) != 1:
        listed = ", ".join(spec.name for spec in required) or "none"
        raise invalid_request("inputs", f"expected one required input of {operation.name}, it has {listed}")
    return required[0]


def _is_seed(end: ArrayLike) -> bool:
    return np.ndim(end) == 0
