"""Requests, their responses, and the comparison of a response with the model's description."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import samovar
from conformance.results import Outcome
from samovar._messages import CallOptions
from samovar.operations import parse_program_name

Array = NDArray[Any]
Scalar = bool | int | float | str

SEED = 1


@dataclass(frozen=True, eq=False)
class Request:
    """A request for rows of an operation, without a seed; `parameters` holds those off their defaults."""

    model: samovar.Model
    operation: samovar.Operation
    num_rows: int
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def num_steps(self) -> int:
        """Number of steps of a row that does not end early."""
        defaults = {parameter.name: parameter.default for parameter in self.operation.parameters}
        return self.operation.steps.num_steps({**defaults, **self.parameters})


@dataclass(frozen=True, eq=False)
class Response:
    """The response to a request: all arrays by name, the client's result, and the duration."""

    arrays: Mapping[str, Array]
    result: samovar.Result
    seconds: float

    @property
    def is_bitwise(self) -> bool:
        """Whether the server guarantees bitwise equal rows for equal requests."""
        return self.result.run.determinism is samovar.Determinism.BITWISE

    def differs_from(self, other: "Response") -> bool:
        """Return whether any byte differs from a response with the same shapes."""
        return any(array.tobytes() != other.arrays[name].tobytes() for name, array in self.arrays.items())


Exchange = tuple[Request, Response]


def send(client: samovar.Client, request: Request, first_row: int = 0) -> Response:
    """Send a request for the rows from `first_row` on, with seed SEED, and return the response."""
    operation, _ = parse_program_name(request.operation.name)
    num_rows = request.num_rows - first_row
    inputs = {name: array[first_row:] for name, array in request.inputs.items()}
    options = CallOptions(
        version=request.model.version,
        seed=SEED,
        first_row=first_row,
        parameters=request.parameters,
        variant=request.operation.variant,
        timeout=None,
    )
    start = time.perf_counter()
    if operation == "sample":
        result = client.sample(request.model.name, num_rows, inputs=inputs, **options)
    else:
        result = getattr(client, operation)(request.model.name, inputs, **options)
    seconds = time.perf_counter() - start
    arrays = result.columns() if isinstance(result, samovar.Scores) else result.outputs
    return Response(arrays, result, seconds)


def evaluate(client: samovar.Client, request: Request, response: Response, *problems: str) -> Outcome:
    """Compare a response with the description, and its last row with a request for that row alone.

    Args:
        client: connection to the server.
        request: the request.
        response: the response to `request`.
        *problems: problems that the caller found.

    Returns:
        The outcome, with all problems.
    """
    last = send(client, request, request.num_rows - 1)
    run, result = response.result.run, response.result
    return Outcome(
        shape=result.value.shape,
        summary=str(run.determinism),
        problems=(*_response_problems(request, response), *_last_row_problems(response, last), *problems),
        steps=str(run.steps or ""),
        score_kind=str(result.kind) if isinstance(result, samovar.Scores) else "",
        seconds=response.seconds,
    )


def tensor_problems(spec: samovar.TensorSpec, array: Array, num_rows: int) -> Iterator[str]:
    """Yield the differences of an array from the description of its rows."""
    if (array.shape, array.dtype) != ((num_rows, *spec.shape), spec.dtype):
        yield f"{spec.name}: expected {spec} for {num_rows} rows, got {array.dtype}{list(array.shape)}"
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        yield f"{spec.name}: expected finite values, got non-finite ones"
    elif spec.minimum is not None and array.min() < spec.minimum:
        yield f"{spec.name}: expected values >= {spec.minimum:g}, got {array.min():g}"
    elif spec.maximum is not None and array.max() > spec.maximum:
        yield f"{spec.name}: expected values <= {spec.maximum:g}, got {array.max():g}"


def _response_problems(request: Request, response: Response) -> Iterator[str]:
    if response.result.run.steps != request.num_steps:
        yield f"expected {request.num_steps} steps, got {response.result.run.steps}"
    for spec in request.operation.outputs:
        if spec.name in response.arrays:
            yield from tensor_problems(spec, response.arrays[spec.name], request.num_rows)


def _last_row_problems(response: Response, last: Response) -> Iterator[str]:
    for name, array in response.arrays.items():
        if response.is_bitwise and array[-1:].tobytes() != last.arrays[name].tobytes():
            yield f"{name}: the last row differs from a request for that row alone"
