"""One request, asked for whole or in part, and what is wrong with its answer by the model's description."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

import samovar
from conformance.results import Found
from samovar._messages import CallOptions
from samovar.operations import parse_program_name

Array = NDArray[Any]
Scalar = bool | int | float | str

SEED = 1


@dataclass(frozen=True, eq=False)
class Request:
    """Rows of an operation, with some settings and inputs."""

    model: samovar.Model
    operation: samovar.Operation
    rows: int
    inputs: Mapping[str, Array]
    parameters: Mapping[str, Scalar] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """How many steps a row takes, unless it ends early."""
        defaults = {each.name: each.default for each in self.operation.parameters}
        return self.operation.steps.of({**defaults, **self.parameters})


@dataclass(frozen=True, eq=False)
class Answer:
    """What came back: arrays by name, what they are, and how long it took."""

    arrays: Mapping[str, Array]
    result: samovar.Result
    seconds: float

    @property
    def is_bitwise(self) -> bool:
        return self.result.run.determinism is samovar.Determinism.BITWISE

    def differs(self, other: "Answer") -> bool:
        """Whether anything is otherwise than in an answer of as many rows."""
        return any(array.tobytes() != other.arrays[name].tobytes() for name, array in self.arrays.items())


def ask(client: samovar.Client, request: Request, first: int = 0) -> Answer:
    """Ask for the rows from the first on."""
    name, rows = parse_program_name(request.operation.name)[0], request.rows - first
    inputs = {key: array[first:] for key, array in request.inputs.items()}
    options = CallOptions(
        version=request.model.version,
        seed=SEED,
        first_row=first,
        parameters=request.parameters,
        variant=request.operation.variant,
        timeout=None,
    )
    begun = time.perf_counter()
    if name == "sample":
        result = client.sample(request.model.name, rows, inputs=inputs, **options)
    else:
        result = getattr(client, name)(request.model.name, inputs, **options)
    seconds = time.perf_counter() - begun
    arrays = result.columns() if isinstance(result, samovar.Scores) else result.outputs
    return Answer(arrays, result, seconds)


def judged(client: samovar.Client, request: Request, answer: Answer, *further: str) -> Found:
    """What an answer is, also beside that for its last row alone; `further` is what else is wrong with it."""
    last = ask(client, request, request.rows - 1)
    run, result = answer.result.run, answer.result
    return Found(
        shape=result.value.shape,
        rightly=str(run.determinism),
        wrong=(*problems(request, answer), *unlike(answer, last), *further),
        steps=str(run.steps or ""),
        kind=str(result.kind) if isinstance(result, samovar.Scores) else "",
        seconds=answer.seconds,
    )


def problems(request: Request, answer: Answer) -> Iterator[str]:
    """What the description does not allow."""
    if answer.result.run.steps != request.steps:
        yield f"expected {request.steps} steps, got {answer.result.run.steps}"
    for spec in request.operation.outputs:
        if spec.name in answer.arrays:
            yield from misfits(spec, answer.arrays[spec.name], request.rows)


def unlike(whole: Answer, last: Answer) -> Iterator[str]:
    """Outputs whose last row is another when asked for alone."""
    for name, array in whole.arrays.items():
        if whole.is_bitwise and array[-1:].tobytes() != last.arrays[name].tobytes():
            yield f"{name}: the last row is another when asked for alone"


def misfits(spec: samovar.TensorSpec, array: Array, rows: int) -> Iterator[str]:
    """Where an array is not what a description says."""
    if (array.shape, array.dtype) != ((rows, *spec.shape), spec.dtype):
        yield f"{spec.name}: expected {spec} for {rows} rows, got {array.dtype}{list(array.shape)}"
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        yield f"{spec.name}: not finite"
    elif spec.minimum is not None and array.min() < spec.minimum:
        yield f"{spec.name}: expected at least {spec.minimum:g}, got {array.min():g}"
    elif spec.maximum is not None and array.max() > spec.maximum:
        yield f"{spec.name}: expected at most {spec.maximum:g}, got {array.max():g}"
