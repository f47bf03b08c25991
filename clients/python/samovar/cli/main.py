"""The command `samovar`: a server's models at the keyboard."""

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

from samovar import tokens
from samovar._inputs import named_arrays, num_rows, part_of
from samovar._messages import CallOptions, draw_seed
from samovar.cli import files, formatting, parser
from samovar.cli.progress import ProgressBar
from samovar.client import Client
from samovar.errors import Overloaded, SamovarError, Unavailable
from samovar.model import Model, Operation, Parameter, ParameterType, Scalar
from samovar.result import Event, Preview, Result, RowCollector, Rows, Scores, merge, merge_scores
from samovar.tensors import Array
from samovar.text import PROMPT, STOP, pieces

_PREVIEWS_PER_ROW = 20


class UsageError(ValueError):
    """The command line asks for something that cannot be; the message says what can."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = parser.parser(version("samovar")).parse_args(argv)
    try:
        with _ending_on_interrupt(), Client(args.address, timeout=args.timeout) as client:
            _COMMANDS[args.command](client, args)
    except (UsageError, files.UnsuitableFile) as error:
        return _complain(f"{error}", code=2)
    except Unavailable as error:
        return _complain(f"{error}\nIs a server listening at {args.address}? Name another with --address.")
    except Overloaded as error:
        later = f"\nTry again in {error.retry_delay:g} s." if error.retry_delay else ""
        return _complain(f"{error}{later}")
    except (SamovarError, OSError) as error:
        return _complain(f"{error}")
    return 0


@contextmanager
def _ending_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process, and with it the connection, by which the server knows to stop."""
    previous = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    # KeyboardInterrupt may strike inside gRPC and leave its locks held: closing the
    # channel then waits for ever (grpc/grpc issue 19973).
    os.write(sys.stderr.fileno(), b"\nsamovar: cancelled\n")
    os._exit(130)


def _complain(message: str, code: int = 1) -> int:
    print(f"samovar: {message}", file=sys.stderr)
    return code


def _models(client: Client, args: Namespace) -> None:
    print(formatting.models(client.models()))


def _model(client: Client, args: Namespace) -> None:
    print(formatting.model(client.model(args.model, args.version, args.format)))


def _server(client: Client, args: Namespace) -> None:
    print(formatting.server(client.server_info()))


def _sample(client: Client, args: Namespace) -> None:
    model, operation = _chosen(client, args)
    if args.output is None and not model.data_spec.vocabulary:
        raise UsageError("say where the rows go: -o FILE.npy, FILE.npz, or FILE.png for images")
    result = _drawn(client, args, model, operation)
    if args.output is None:
        print("\n".join(tokens.decode(result.value, model.data_spec)))
        return
    files.write(args.output, result.outputs, model.data_spec)
    print(f"{args.rows} rows in {args.output}; {formatting.summary(result)}")


def _drawn(client: Client, args: Namespace, model: Model, operation: Operation) -> Result:
    options, inputs = _options(args, operation), _sample_inputs(args, model, operation)
    canvas, progress = RowCollector(args.rows, args.first_row), np.zeros(args.rows)
    with (
        ProgressBar(args.rows, sys.stderr) as bar,
        client.stream(
            args.model,
            args.rows,
            inputs=inputs,
            preview_every=args.preview_every or (_preview_interval(operation, options) if bar.visible else 0),
            **options,
        ) as stream,
    ):
        for event in stream:
            canvas.place(event)
            progress[event.indices - args.first_row] = _share(event, stream.run.steps)
            bar.show(progress.sum())
            if args.preview_every and args.output and isinstance(event, Preview):
                files.write(args.output, canvas.outputs, model.data_spec)
        return Result(canvas.complete(), stream.run, stream.timings)


def _complete(client: Client, args: Namespace) -> None:
    model = client.model(args.model, args.version, args.format)
    operation = model.operation("sample", args.variant)
    prompt = tokens.tokens_of(args.prompt, model.data_spec, PROMPT)
    if args.output:
        files.check(args.output, model.data_spec, operation.outputs[0])
    given = [*args.param, *([] if args.tokens is None else [f"tokens={args.tokens}"])]
    parameters = _parameters(given, operation) | ({} if args.stop is None else {STOP: args.stop})
    options = CallOptions(version=args.version, format=args.format, variant=args.variant, seed=_seed(args))
    written = args.prompt
    print(written, end="", flush=True)
    for piece in pieces(client, model, prompt, options=options, **parameters):
        print(piece, end="", flush=True)
        written += piece
    print()
    if args.output:
        files.write(args.output, {"text": tokens.encode([written], model.data_spec)}, model.data_spec)
    print(f"seed {options['seed']}", file=sys.stderr)


def _seed(args: Namespace) -> int:
    return draw_seed() if args.seed is None else args.seed


def _share(event: Event, steps: int) -> Array | float:
    return 1.0 if isinstance(event, Rows) else event.steps_done / max(steps, 1)


def _preview_interval(operation: Operation, options: CallOptions) -> int:
    """How often a progress bar asks for unfinished rows; 0 for programs that cannot show them."""
    if not operation.previewable:
        return 0
    defaults = {parameter.name: parameter.default for parameter in operation.parameters}
    return max(1, operation.steps.of({**defaults, **options["parameters"]}) // _PREVIEWS_PER_ROW)


def _reconstruct(client: Client, args: Namespace) -> None:
    model, arrays, parts = _transformed(client, args)
    result = merge(parts)
    if args.output.suffix == ".png":
        files.write_pairs(args.output, next(iter(arrays.values())), result.value, model.data_spec)
    else:
        files.write(args.output, result.outputs, model.data_spec)
    print(f"{len(result.value)} rows in {args.output}; {formatting.summary(result)}")


def _transform(client: Client, args: Namespace) -> None:
    model, _, parts = _transformed(client, args)
    result = merge(parts)
    if args.output is None:
        print(formatting.results(result, args.first_row, model.data_spec.class_labels))
        return
    files.write(args.output, result.outputs, model.data_spec)
    print(f"{len(result.value)} rows in {args.output}; {formatting.summary(result)}")


def _score(client: Client, args: Namespace) -> None:
    model, _, parts = _transformed(client, args)
    scores = merge_scores([part for part in parts if isinstance(part, Scores)])
    if args.output is None:
        print(formatting.scores(scores, args.first_row))
        return
    files.write(args.output, scores.columns(), model.data_spec)
    print(formatting.score_headline(scores))
    print(f"{len(scores.nats)} rows in {args.output}; {formatting.summary(scores)}")


def _transformed(client: Client, args: Namespace) -> tuple[Model, dict[str, Array], list[Result]]:
    """Results of a transform, some rows at a time so that there is progress to show."""
    model, operation = _chosen(client, args)
    if not args.input:
        raise UsageError("say which rows: --input FILE.npy")
    options = _options(args, operation)
    arrays = named_arrays(_inputs(args), operation)
    rows, size = num_rows(arrays), max(1, client.server_info().max_batch_rows)
    parts: list[Result] = []
    with ProgressBar(rows, sys.stderr) as bar:
        for start in range(0, max(rows, 1), size):
            options["first_row"] = args.first_row + start
            parts.append(getattr(client, args.command)(args.model, part_of(arrays, start, size), **options))
            bar.show(min(start + size, rows))
    return model, arrays, parts


def _chosen(client: Client, args: Namespace) -> tuple[Model, Operation]:
    """The model and its operation, once it is sure that the file can hold what comes."""
    model = client.model(args.model, args.version, args.format)
    operation = model.operation(args.command, args.variant)
    if args.output:
        files.check(args.output, model.data_spec, operation.outputs[0])
    return model, operation


def _options(args: Namespace, operation: Operation) -> CallOptions:
    options = CallOptions(
        version=args.version,
        format=args.format,
        seed=_seed(args),
        first_row=args.first_row,
        parameters=_parameters(args.param, operation),
        variant=args.variant,
    )
    return options | CallOptions(priority=args.priority) if args.priority else options


def _parameters(texts: Sequence[str], operation: Operation) -> dict[str, Scalar]:
    declared = {parameter.name: parameter for parameter in operation.parameters}
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--param {text}: expected NAME=VALUE")
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(f"--param {text}: {operation.name} has no parameter {name!r}; it has: {known}")
        parameters[name] = _parameter(value, declared[name])
    return parameters


def _parameter(text: str, parameter: Parameter) -> Scalar:
    try:
        return _SCALARS.get(parameter.type, str)(text)
    except (ValueError, KeyError):
        raise UsageError(
            f"--param {parameter.name}={text}: expected a value of type {parameter.type}"
        ) from None


_SCALARS: Mapping[ParameterType, Callable[[str], Scalar]] = {
    ParameterType.FLOAT: float,
    ParameterType.INTEGER: int,
    ParameterType.BOOLEAN: {"true": True, "false": False}.__getitem__,
}


def _sample_inputs(args: Namespace, model: Model, operation: Operation) -> dict[str, Array]:
    arrays = named_arrays(_inputs(args), operation) if args.input else {}
    if args.label is None:
        return arrays
    names = {name: index for index, name in enumerate(model.data_spec.class_labels)}
    try:
        labels = [names[text] if text in names else int(text) for text in args.label.split(",")]
    except ValueError:
        known = ", ".join(names) or "numbers only"
        raise UsageError(f"--label {args.label}: expected classes of {model.name}: {known}") from None
    return arrays | named_arrays({"label": labels}, operation)


def _inputs(args: Namespace) -> Array | dict[str, Array]:
    """What --input names; a single one without a name goes to the only required input."""
    named: dict[str, Array] = {}
    for text in args.input:
        name, equals, value = text.partition("=")
        if not equals or Path(text).exists():
            bare = files.read(Path(text))
            if len(args.input) > 1 and not isinstance(bare, dict):
                raise UsageError(f"--input {text}: with several inputs, expected NAME=FILE")
            if not isinstance(bare, dict):
                return bare
            named |= bare
        else:
            named[name] = _array(name, value)
    return named


def _array(name: str, text: str) -> Array:
    if Path(text).suffix == ".npy":
        return np.asarray(files.read(Path(text)))
    try:
        values = np.array(json.loads(f"[{text}]"))
    except ValueError:
        raise UsageError(f"--input {name}={text}: expected numbers or FILE.npy") from None
    return values[0] if len(values) == 1 else values


_COMMANDS: Mapping[str, Callable[[Client, Namespace], None]] = {
    "models": _models,
    "model": _model,
    "server": _server,
    "sample": _sample,
    "complete": _complete,
    "reconstruct": _reconstruct,
    "score": _score,
    "energy": _transform,
    "encode": _transform,
    "decode": _transform,
    "classify": _transform,
}
