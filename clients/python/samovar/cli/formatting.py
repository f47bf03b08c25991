"""Models, scores and servers as text for a terminal. Knows no calls."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from samovar.model import Input, Model, Operation, Parameter, ParameterType, Quality, ScoreKind, TensorSpec
from samovar.result import Result, Scores, ServerInfo
from samovar.tensors import Array

_MEANINGS = {
    ScoreKind.EXACT: "exact log-density",
    ScoreKind.LOWER_BOUND: "lower bound on the log-density",
    ScoreKind.ESTIMATE: "estimate of the log-density, neither exact nor a bound",
    ScoreKind.UNNORMALIZED: "log-density up to an unknown constant: compare within this model only",
    ScoreKind.UNSPECIFIED: "number whose relation to the log-density is not stated",
}


def columns(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two blanks apart."""
    table = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    rows = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(row.rstrip() for row in rows)


def models(models: Sequence[Model]) -> str:
    """One line a model and version; a star marks the version that answers by default."""
    header = ("MODEL", "VERSION", "FORMATS", "FAMILY", "OPERATIONS", "SCORE", "QUALITY")
    return columns(header, map(_model_line, models))


def model(model: Model) -> str:
    """Everything that there is to know about a model."""
    return "\n".join(_model_paragraphs(model))


def scores(scores: Scores, first_row: int) -> str:
    """What the numbers are, their mean, and one line a row."""
    return f"{score_headline(scores)}\n\n{columns(*_score_table(scores, first_row))}"


def score_headline(scores: Scores) -> str:
    """Kind, unit, draws, and the mean with its standard error over rows."""
    draws = f", {scores.draws} draws a row" if scores.draws else ""
    lines = [f"{_MEANINGS[scores.kind]} in nats{draws}; {scores.dimensions} dimensions, {scores.space}"]
    lines.append(f"mean of {len(scores.nats)} rows: {mean(scores.nats)} nats")
    if (bits := _bits(scores)) is not None:
        lines[-1] += f", {mean(bits)} bits/dim"
    return "\n".join(lines)


def results(result: Result, first_row: int, labels: Sequence[str]) -> str:
    """One line a row: the likeliest class of probabilities, or the number itself."""
    main = result.value
    if main.ndim == 2 and main.shape[1] > 1:
        best = main.argmax(axis=1)
        named = (labels[index] if index < len(labels) else str(index) for index in best)
        cells = list(zip(named, (f"{probability:.4f}" for probability in main.max(axis=1)), strict=True))
        return columns(("row", "class", "probability"), _numbered(cells, first_row))
    name = next(iter(result.outputs))
    return columns(("row", name), _numbered([(f"{number:.4f}",) for number in main.ravel()], first_row))


def summary(result: Result) -> str:
    """What ran, so that it can be run again."""
    run, times = result.run, result.timings
    return (
        f"version {run.version} ({run.format}), seed {run.seed}, {run.steps} steps, {run.determinism};"
        f" {times.queue:.2f} s queued, {times.run:.2f} s running"
    )


def server(info: ServerInfo) -> str:
    """What serves, and within which limits."""
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(info.library_versions.items()))
    facts = {
        "version": info.version,
        "device": info.device,
        "libraries": libraries,
        "largest message": f"{info.max_message_bytes / 2**20:g} MiB",
        "rows per request": f"{info.max_rows_per_request:,}",
        "rows waiting": f"{info.max_queued_rows:,}",
        "rows per batch": f"{info.max_batch_rows:,}",
        "rows per turn": f"{info.drr_quantum_rows:,} of each request while others wait",
        "held by requests": f"{info.max_buffered_bytes / 2**20:g} MiB",
        "calls in flight": f"{info.max_concurrent_calls:,}",
        "threads": f"{info.intra_op_threads} for each graph call",
        "formats": ", ".join(info.formats),
        "CUDA graphs": "on" if info.cuda_graphs else "off",
        "front ends": str(info.grpc_workers or "none beside the engine's process"),
        "stopping": f"calls in flight have {info.drain_timeout_seconds:g} s",
    }
    return "\n".join(_facts(facts))


def mean(values: Array) -> str:
    """Mean ± standard error; the error needs two values."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return f"{numbers.mean():.4f}"
    return f"{numbers.mean():.4f} ± {numbers.std(ddof=1) / np.sqrt(len(numbers)):.4f}"


def _model_line(model: Model) -> tuple[str, ...]:
    score = next((each.score for each in model.operations.values() if each.score), None)
    return (
        model.name,
        f"{model.version}{'*' if model.is_default else ''}",
        ",".join(model.formats),
        model.family,
        ",".join(model.operations),
        score.kind if score else "-",
        _figure(model.quality[0]) if model.quality else "-",
    )


def _figure(quality: Quality) -> str:
    error = "" if quality.standard_error is None else f" ± {quality.standard_error:.2g}"
    floor = "" if quality.reference_value is None else f" (two real samples: {quality.reference_value:.4g})"
    return f"{quality.name} {quality.value:.4g}{error} {quality.unit}".rstrip() + floor


def _model_paragraphs(model: Model) -> Iterator[str]:
    made = model.provenance
    yield f"{model.name} {model.version}{' (default)' if model.is_default else ''}: {model.description}"
    yield from _facts(
        {
            "family": model.family,
            "formats": ", ".join(model.formats),
            "artifact": model.artifact_sha256,
            "value": f"{model.data_spec.kind}, {model.data_spec.tensor}{_bounds(model.data_spec.tensor)}",
            "classes": ", ".join(model.data_spec.class_labels),
            "trained": f"{made.created:%Y-%m-%d}, {made.training_seconds:.0f} s on {made.device}",
            "data": made.dataset,
        }
    )
    for operation in model.operations.values():
        yield ""
        yield from _operation_lines(operation)
    if model.unsupported_operations:
        yield "\nnot offered"
        yield from _facts(model.unsupported_operations)
    if model.quality:
        yield "\nquality, on held-out data"
        yield from (f"  {_figure(figure)}  {figure.doc}".rstrip() for figure in model.quality)


def _facts(facts: Mapping[str, str]) -> Iterator[str]:
    given = {name: fact for name, fact in facts.items() if fact}
    width = max(map(len, given))
    yield from (f"  {name.ljust(width)}  {fact}" for name, fact in given.items())


def _operation_lines(operation: Operation) -> Iterator[str]:
    yield f"{operation.name}: {operation.doc}".rstrip(": ")
    yield f"  steps       {operation.steps}{', with previews' if operation.previewable else ''}"
    if operation.score:
        yield f"  score       {_MEANINGS[operation.score.kind]}; {operation.score.space}"
    yield from (f"  parameter   {_parameter_line(parameter)}" for parameter in operation.parameters)
    yield from (f"  input       {_input_line(each)}" for each in operation.inputs)
    yield from (
        f"  output      {output.name}: {output}  {output.doc}".rstrip() for output in operation.outputs
    )


def _parameter_line(parameter: Parameter) -> str:
    numeric = parameter.type in (ParameterType.FLOAT, ParameterType.INTEGER)
    bounds = f"{parameter.minimum:g}..{parameter.maximum:g}" if numeric else " | ".join(parameter.choices)
    kind = f"{parameter.type} {bounds}".rstrip()
    return f"{parameter.name}={parameter.default}  ({kind})  {parameter.doc}".rstrip()


def _input_line(each: Input) -> str:
    need = f"optional, {each.default:g} by default" if each.optional else "required"
    return f"{each.tensor.name}: {each.tensor}{_bounds(each.tensor)}, {need}  {each.tensor.doc}".rstrip()


def _bounds(spec: TensorSpec) -> str:
    if spec.minimum is None and spec.maximum is None:
        return ""
    low = "" if spec.minimum is None else f"{spec.minimum:g}"
    high = "" if spec.maximum is None else f"{spec.maximum:g}"
    return f" in {low}..{high}"


def _score_table(scores: Scores, first_row: int) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
    columns = {"nats": _with_error(scores)}
    if (bits := _bits(scores)) is not None:
        columns["bits/dim"] = [f"{each:.4f}" for each in bits]
    return ("row", *columns), _numbered(list(zip(*columns.values(), strict=True)), first_row)


def _bits(scores: Scores) -> Array | None:
    """Bits per dimension, where an unknown constant does not make them meaningless."""
    return None if scores.kind is ScoreKind.UNNORMALIZED else scores.bits_per_dimension


def _with_error(scores: Scores) -> list[str]:
    if scores.standard_error is None:
        return [f"{nats:.4f}" for nats in scores.nats]
    both = zip(scores.nats, scores.standard_error, strict=True)
    return [f"{nats:.4f} ± {error:.4f}" for nats, error in both]


def _numbered(cells: Sequence[Sequence[str]], first_row: int) -> list[tuple[str, ...]]:
    return [(str(first_row + index), *cell) for index, cell in enumerate(cells)]
