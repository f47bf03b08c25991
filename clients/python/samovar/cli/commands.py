"""Commands of the command line. Each one calls the server and prints or writes the result."""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping

import numpy as np

from samovar import tokens
from samovar._inputs import named_arrays, num_rows, slice_rows
from samovar._messages import CallOptions
from samovar.cli import arguments, files, formatting
from samovar.cli.arguments import UsageError
from samovar.cli.progress import ProgressBar
from samovar.client import Client
from samovar.model import Model, Operation
from samovar.result import Event, Preview, Result, RowCollector, Rows, Scores, merge, merge_scores
from samovar.tensors import Array
from samovar.text import PROMPT, STOP, stream_tokens

# Previews of each row that a progress bar requests.
_PREVIEWS_PER_ROW = 20


def _models(client: Client, args: Namespace) -> None:
    print(formatting.format_models(client.models()))


def _model(client: Client, args: Namespace) -> None:
    print(formatting.format_model(client.model(args.model, args.version, args.format)))


def _server(client: Client, args: Namespace) -> None:
    print(formatting.format_server(client.server_info()))


def _sample(client: Client, args: Namespace) -> None:
    model, operation = _select_operation(client, args)
    if args.output is None and not model.data_spec.vocabulary:
        raise UsageError("missing output: use -o FILE.npy, FILE.npz, or FILE.png for images")
    result = _stream_samples(client, args, model, operation)
    if args.output is None:
        print("\n".join(tokens.decode(result.value, model.data_spec)))
        return
    files.write(args.output, result.outputs, model.data_spec)
    print(f"{args.rows} rows in {args.output}; {formatting.format_run(result)}")


def _stream_samples(client: Client, args: Namespace, model: Model, operation: Operation) -> Result:
    """Draw samples; update the progress bar, and the output file with --preview-every."""
    options = arguments.call_options(args, operation)
    inputs = arguments.sample_inputs(args, model, operation)
    collector, progress = RowCollector(args.rows, args.first_row), np.zeros(args.rows)
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
            collector.place(event)
            progress[event.indices - args.first_row] = _finished_fraction(event, stream.run.steps)
            bar.update(progress.sum())
            if args.preview_every and args.output and isinstance(event, Preview):
                files.write(args.output, collector.outputs, model.data_spec)
        return Result(collector.complete(), stream.run, stream.timings)


def _complete(client: Client, args: Namespace) -> None:
    model = client.model(args.model, args.version, args.format)
    operation = model.operation("sample", args.variant)
    prompt = tokens.tokenize(args.prompt, model.data_spec, PROMPT)
    if args.output:
        files.check_suffix(args.output, model.data_spec, operation.outputs[0])
    parameters = arguments.parameters(args.param, operation)
    if args.tokens is not None:
        parameters |= arguments.parameters([f"tokens={args.tokens}"], operation)
    if args.stop is not None:
        parameters[STOP] = args.stop
    options = CallOptions(
        version=args.version, format=args.format, variant=args.variant, seed=arguments.seed(args)
    )
    text = args.prompt
    print(text, end="", flush=True)
    for piece in stream_tokens(client, model, prompt, options=options, **parameters):
        print(piece, end="", flush=True)
        text += piece
    print()
    if args.output:
        files.write(args.output, {"text": tokens.encode([text], model.data_spec)}, model.data_spec)
    print(f"seed {options['seed']}", file=sys.stderr)


def _finished_fraction(event: Event, steps: int) -> Array | float:
    return 1.0 if isinstance(event, Rows) else event.steps_done / max(steps, 1)


def _preview_interval(operation: Operation, options: CallOptions) -> int:
    """Return the number of steps between previews for a progress bar; 0 if the program has no previews."""
    if not operation.previewable:
        return 0
    defaults = {parameter.name: parameter.default for parameter in operation.parameters}
    return max(1, operation.steps.num_steps({**defaults, **options["parameters"]}) // _PREVIEWS_PER_ROW)


def _reconstruct(client: Client, args: Namespace) -> None:
    model, arrays, parts = _call_transform(client, args)
    result = merge(parts)
    if args.output.suffix == ".png":
        files.write_pairs(args.output, next(iter(arrays.values())), result.value, model.data_spec)
    else:
        files.write(args.output, result.outputs, model.data_spec)
    print(f"{len(result.value)} rows in {args.output}; {formatting.format_run(result)}")


def _transform(client: Client, args: Namespace) -> None:
    model, _, parts = _call_transform(client, args)
    result = merge(parts)
    if args.output is None:
        print(formatting.format_result(result, args.first_row, model.data_spec.class_labels))
        return
    files.write(args.output, result.outputs, model.data_spec)
    print(f"{len(result.value)} rows in {args.output}; {formatting.format_run(result)}")


def _score(client: Client, args: Namespace) -> None:
    model, _, parts = _call_transform(client, args)
    scores = merge_scores([part for part in parts if isinstance(part, Scores)])
    if args.output is None:
        print(formatting.format_scores(scores, args.first_row))
        return
    files.write(args.output, scores.columns(), model.data_spec)
    print(formatting.format_score_summary(scores))
    print(f"{len(scores.nats)} rows in {args.output}; {formatting.format_run(scores)}")


def _call_transform(client: Client, args: Namespace) -> tuple[Model, dict[str, Array], list[Result]]:
    """Return the model, the inputs and the results of a transform, one result per call.

    Each call has at most one batch of rows, so that the progress bar advances.
    """
    model, operation = _select_operation(client, args)
    if not args.input:
        raise UsageError("missing input: use --input FILE.npy")
    options = arguments.call_options(args, operation)
    arrays = named_arrays(arguments.inputs(args), operation)
    rows, size = num_rows(arrays), max(1, client.server_info().max_batch_rows)
    parts: list[Result] = []
    with ProgressBar(rows, sys.stderr) as bar:
        for start in range(0, max(rows, 1), size):
            options["first_row"] = args.first_row + start
            parts.append(
                getattr(client, args.command)(args.model, slice_rows(arrays, start, size), **options)
            )
            bar.update(min(start + size, rows))
    return model, arrays, parts


def _select_operation(client: Client, args: Namespace) -> tuple[Model, Operation]:
    """Return the model and its operation, after a check that the output file can hold the result."""
    model = client.model(args.model, args.version, args.format)
    operation = model.operation(args.command, args.variant)
    if args.output:
        files.check_suffix(args.output, model.data_spec, operation.outputs[0])
    return model, operation


COMMANDS: Mapping[str, Callable[[Client, Namespace], None]] = {
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
