"""Exercise every operation of every model that a server serves, through the wire, and print what came of it.

python operations.py                                # all models of the server on this machine
python operations.py --rows 8 digits-vae            # one of them, with more rows

What to ask for is read from the models' descriptions alone: each operation and method as it is, with its
optional inputs, and with each choice of its settings. Rows to work on are samples of a model with such
values where one is served, and random numbers within the declared bounds where none is. An answer is
right when it has the declared shape, type and bounds, holds no NaN, and when the last row, asked for alone,
is the same: to the byte where the server says "bitwise". What a model lacks is asked for too, and has to be
refused with FAILED_PRECONDITION. Exits with 1 if anything was otherwise.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

import samovar
from samovar.errors import from_rpc
from samovar.v1 import inference_pb2
from samovar.v1.inference_pb2_grpc import InferenceStub

Array = NDArray[Any]

OPERATIONS = ("sample", "reconstruct", "score", "energy", "encode", "decode", "classify")
SEED = 1
LINE = "{:<17}{:<18}{:<26}{:>5}{:>7}  {:<13}{:<18}{:>8}  {}"


@dataclass(frozen=True)
class Cell:
    """One way of asking a model for one of its operations; `what` tells it from the others."""

    model: samovar.Model
    operation: samovar.Operation
    what: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    inputs: tuple[samovar.Input, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back: arrays by name, what they are, and how long it took."""

    arrays: Mapping[str, Array]
    result: samovar.Result
    seconds: float


class Pantry:
    """Rows to work on: samples and latents of the models, or else random numbers within bounds."""

    def __init__(self, client: samovar.Client, models: Sequence[samovar.Model], rows: int) -> None:
        self._rows = rows
        self._chance = np.random.default_rng(SEED)
        self._samples: dict[object, Array] = {}
        for model in models:
            if "sample" in model.operations:
                drawn = client.sample(model.name, rows, seed=SEED, version=model.version).value
                self._samples.setdefault(_likeness(model.value.tensor), drawn)

    def give(self, model: samovar.Model, spec: samovar.TensorSpec) -> Array:
        """Rows for an input of a model, [rows, *shape]."""
        if spec.shape == model.value.tensor.shape and spec.maximum == model.value.tensor.maximum:
            stored = self._samples.get(_likeness(spec))
            if stored is not None:
                return stored
        return self._random(spec)

    def _random(self, spec: samovar.TensorSpec) -> Array:
        shape = (self._rows, *spec.shape)
        if spec.dtype.kind == "f":
            return self._chance.standard_normal(shape).clip(spec.minimum, spec.maximum).astype(spec.dtype)
        low = 0 if spec.minimum is None else int(spec.minimum)
        high = low + 1 if spec.maximum is None else int(spec.maximum)
        return self._chance.integers(low, high + 1, shape).astype(spec.dtype)


def _likeness(spec: samovar.TensorSpec) -> tuple[object, ...]:
    return spec.dtype, spec.shape, spec.minimum, spec.maximum


def cells(model: samovar.Model) -> Iterator[Cell]:
    """Every operation plainly, with its optional inputs, and with every other choice of its settings."""
    for operation in model.operations.values():
        required = tuple(each for each in operation.inputs if not each.optional)
        yield Cell(model, operation, inputs=required)
        if len(required) < len(operation.inputs):
            names = "+".join(each.tensor.name for each in operation.inputs if each.optional)
            yield Cell(model, operation, f"with {names}", inputs=operation.inputs)
        for parameter in operation.parameters:
            for choice in parameter.choices:
                if choice != parameter.default:
                    setting = {parameter.name: choice}
                    yield Cell(model, operation, f"{parameter.name}={choice}", setting, required)


def ask(client: samovar.Client, cell: Cell, inputs: Mapping[str, Array], rows: range) -> Answer:
    """Ask for some of the rows, and time it."""
    name, _, method = cell.operation.name.partition(":")
    given = {key: array[rows.start : rows.stop] for key, array in inputs.items()}
    options = samovar.messages.Options(
        version=cell.model.version,
        seed=SEED,
        first_row=rows.start,
        parameters=cell.parameters,
        method=method,
        timeout=None,
    )
    begun = time.perf_counter()
    if name == "sample":
        result = client.sample(cell.model.name, len(rows), inputs=given, **options)
    else:
        result = getattr(client, name)(cell.model.name, given, **options)
    seconds = time.perf_counter() - begun
    arrays = result.columns() if isinstance(result, samovar.Scores) else result.outputs
    return Answer(arrays, result, seconds)


def problems(cell: Cell, whole: Answer, last: Answer, rows: int) -> Iterator[str]:
    """What is wrong with an answer, also beside that for the last row alone."""
    for spec in cell.operation.outputs:
        array = whole.arrays.get(spec.name)
        if array is not None:
            yield from _misfits(spec, array, rows)
    is_bitwise = whole.result.run.determinism is samovar.Determinism.BITWISE
    for name, array in whole.arrays.items():
        if is_bitwise and array[-1:].tobytes() != last.arrays[name].tobytes():
            yield f"{name}: the last row is another when asked for alone"


def _misfits(spec: samovar.TensorSpec, array: Array, rows: int) -> Iterator[str]:
    if (array.shape, array.dtype) != ((rows, *spec.shape), spec.dtype):
        yield f"{spec.name}: expected {spec} for {rows} rows, got {array.dtype}{list(array.shape)}"
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        yield f"{spec.name}: not finite"
    elif spec.minimum is not None and array.min() < spec.minimum:
        yield f"{spec.name}: expected at least {spec.minimum:g}, got {array.min():g}"
    elif spec.maximum is not None and array.max() > spec.maximum:
        yield f"{spec.name}: expected at most {spec.maximum:g}, got {array.max():g}"


def exercise(client: samovar.Client, cell: Cell, pantry: Pantry, rows: int) -> bool:
    """Ask for a cell, print its line; whether the answer was right."""
    inputs = {each.tensor.name: pantry.give(cell.model, each.tensor) for each in cell.inputs}
    try:
        whole = ask(client, cell, inputs, range(rows))
        last = ask(client, cell, inputs, range(rows - 1, rows))
    except samovar.SamovarError as error:
        _print(cell, rows, "", "", "", "", f"FAILED: {error}")
        return False
    wrong = list(problems(cell, whole, last, rows))
    run, main = whole.result.run, whole.result.value
    kind = whole.result.kind if isinstance(whole.result, samovar.Scores) else ""
    verdict = f"FAILED: {'; '.join(wrong)}" if wrong else run.determinism
    _print(cell, rows, run.steps or "", kind, list(main.shape), f"{1000 * whole.seconds:.0f}", verdict)
    return not wrong


def _print(cell: Cell, rows: int, *columns: object) -> None:
    steps, kind, shape, milliseconds, verdict = columns
    texts = (cell.model.name, cell.operation.name, cell.what, rows, steps, kind, shape, milliseconds, verdict)
    print(LINE.format(*map(str, texts)), flush=True)


def refuse(stub: InferenceStub, model: samovar.Model, operation: str) -> bool:
    """Ask for what the model lacks, print the refusal; whether it was refused, and as it should be.

    Past the client, which would refuse by itself what it knows the model to lack.
    """
    selector = inference_pb2.ModelSelector(name=model.name, version=model.version)
    try:
        if operation == "sample":
            list(stub.Sample(inference_pb2.SampleRequest(model=selector, rows=1, seed=SEED)))
        else:
            getattr(stub, operation.capitalize())(inference_pb2.TransformRequest(model=selector, seed=SEED))
    except grpc.RpcError as error:
        refusal = from_rpc(error)
        expected = isinstance(refusal, samovar.UnsupportedOperation)
        said = f"{error.code().name} {refusal.reason}: {refusal}"
        print(f"{model.name:<17}{operation:<18}{'refused' if expected else 'FAILED'}, {said}", flush=True)
        return expected
    print(f"{model.name:<17}{operation:<18}FAILED: answered, though {model.name} has no {operation}")
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    with (
        samovar.Client(options.address, timeout=None) as client,
        grpc.insecure_channel(options.address) as channel,
    ):
        stub = InferenceStub(channel)
        models = [each for each in client.models() if not options.models or each.name in options.models]
        pantry = Pantry(client, models, options.rows)
        print(LINE.format("MODEL", "OPERATION", "", "ROWS", "STEPS", "SCORE", "SHAPE", "MS", "SAME ROWS"))
        done = [exercise(client, cell, pantry, options.rows) for model in models for cell in cells(model)]
        print("\nWhat the models lack")
        lacking = [(model, name) for model in models for name in OPERATIONS if name not in model.operations]
        refused = [refuse(stub, model, name) for model, name in lacking]
    counts = f"{sum(done)} of {len(done)} answers right, {sum(refused)} of {len(refused)} refusals"
    print(f"\n{counts}, {len(models)} models")
    return 0 if models and all(done) and all(refused) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these models (default: all)")
    parser.add_argument(
        "--address", default="127.0.0.1:8001", metavar="HOST:PORT", help="the server (%(default)s)"
    )
    parser.add_argument("--rows", type=int, default=4, help="how many to ask for at a time (%(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
