"""Models, scores and servers as text for a terminal."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from samovar.model import Input, Model, Operation, Parameter, ParameterType, Quality, ScoreKind, TensorSpec
from samovar.result import Result, Scores, ServerInfo
from samovar.tensors import Array

_SCORE_MEANINGS = {
    ScoreKind.EXACT: "exact log-density",
    ScoreKind.LOWER_BOUND: "lower bound on the log-density",
    ScoreKind.ESTIMATE: "estimate of the log-density, neither exact nor a bound",
    ScoreKind.UNNORMALIZED: "log-density up to an unknown constant: compare within this model only",
    ScoreKind.UNSPECIFIED: "score with an unspecified relation to the log-density",
}


def format_columns(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table with left-aligned columns, two spaces apart."""
    table = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table
    )
    return "\n".join(line.rstrip() for line in padded)


def format_models(models: Sequence[Model]) -> str:
    """Return one line per model and version; a star marks the default version."""
    header = ("MODEL", "VERSION", "FORMATS", "FAMILY", "OPERATIONS", "SCORE", "QUALITY")
    return format_columns(header, map(_model_line, models))


def format_model(model: Model) -> str:
    """Return the full description of a model."""
    return "\n".join(_model_lines(model))


def format_scores(scores: Scores, first_row: int) -> str:
    """Return the kind of the scores, their mean, and one line per row."""
    return f"{format_score_summary(scores)}\n\n{format_columns(*_score_table(scores, first_row))}"


def format_score_summary(scores: Scores) -> str:
    """Return the kind, the unit, the number of draws, and the mean ± its standard error over rows."""
    draws = f", {scores.draws} draws per row" if scores.draws else ""
    space = f"{scores.dimensions} dimensions, {scores.coordinate_space}"
    meaning = f"{_SCORE_MEANINGS[scores.kind]} in nats{draws}; {space}"
    summary = f"mean of {len(scores.nats)} rows: {format_mean(scores.nats)} nats"
    if (bits := _bits_per_dimension(scores)) is not None:
        summary += f", {format_mean(bits)} bits/dim"
    return f"{meaning}\n{summary}"


def format_result(result: Result, first_row: int, class_labels: Sequence[str]) -> str:
    """Return one line per row: the most probable class, or the number itself if there is one per row."""
    values = result.value
    if values.ndim == 2 and values.shape[1] > 1:
        classes = [
            class_labels[index] if index < len(class_labels) else str(index)
            for index in values.argmax(axis=1).tolist()
        ]
        probabilities = [f"{probability:.4f}" for probability in values.max(axis=1)]
        cells = list(zip(classes, probabilities, strict=True))
        return format_columns(("row", "class", "probability"), _numbered(cells, first_row))
    name = next(iter(result.outputs))
    return format_columns(
        ("row", name), _numbered([(f"{number:.4f}",) for number in values.ravel()], first_row)
    )


def format_run(result: Result) -> str:
    """Return what is needed to repeat a call, and its times."""
    run, times = result.run, result.timings
    return (
        f"version {run.version} ({run.format}), seed {run.seed}, {run.steps} steps, {run.determinism};"
        f" {times.queue:.2f} s queued, {times.run:.2f} s running"
    )


def format_server(info: ServerInfo) -> str:
    """Return the software and the limits of a server."""
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(info.library_versions.items()))
    fields = {
        "version": info.version,
        "device": info.device,
        "libraries": libraries,
        "formats": ", ".join(info.formats),
        "CUDA graphs": "on" if info.cuda_graphs else "off",
        "intra-op threads": f"{info.intra_op_threads}",
        "gRPC workers": str(info.grpc_workers or "none (gRPC runs in the engine's process)"),
        "message size limit": f"{info.max_message_bytes / 2**20:g} MiB",
        "request rows limit": f"{info.max_rows_per_request:,}",
        "queued rows limit": f"{info.max_queued_rows:,}",
        "batch rows limit": f"{info.max_batch_rows:,}",
        "DRR quantum": f"{info.drr_quantum_rows:,} rows per request and round",
        "buffered data limit": f"{info.max_buffered_bytes / 2**20:g} MiB",
        "concurrent calls limit": f"{info.max_concurrent_calls:,}",
        "drain timeout": f"{info.drain_timeout_seconds:g} s",
    }
    return "\n".join(_field_lines(fields))


def format_mean(values: Array) -> str:
    """Return the mean ± its standard error; one value has no standard error."""
    numbers = np.asarray(values, np.float64)
    if len(numbers) < 2:
        return f"{numbers.mean():.4f}"
    return f"{numbers.mean():.4f} ± {numbers.std(ddof=1) / np.sqrt(len(numbers)):.4f}"


def _model_line(model: Model) -> tuple[str, ...]:
    score = next((operation.score for operation in model.operations.values() if operation.score), None)
    return (
        model.name,
        f"{model.version}{'*' if model.is_default else ''}",
        ",".join(model.formats),
        model.family,
        ",".join(model.operations),
        score.kind if score else "-",
        _format_quality(model.quality[0]) if model.quality else "-",
    )


def _format_quality(quality: Quality) -> str:
    error = "" if quality.standard_error is None else f" ± {quality.standard_error:.2g}"
    reference = quality.reference_value
    suffix = "" if reference is None else f" (between two sets of real samples: {reference:.4g})"
    return f"{quality.name} {quality.value:.4g}{error} {quality.unit}".rstrip() + suffix


def _model_lines(model: Model) -> Iterator[str]:
    provenance = model.provenance
    training = f"{provenance.training_seconds:.0f} s on {provenance.device}"
    yield f"{model.name} {model.version}{' (default)' if model.is_default else ''}: {model.description}"
    yield from _field_lines(
        {
            "family": model.family,
            "formats": ", ".join(model.formats),
            "artifact": model.artifact_sha256,
            "row": f"{model.data_spec.kind}, {model.data_spec.tensor}{_bounds(model.data_spec.tensor)}",
            "classes": ", ".join(model.data_spec.class_labels),
            "dataset": provenance.dataset,
            "trained": f"{provenance.created:%Y-%m-%d}, {training}",
        }
    )
    for operation in model.operations.values():
        yield ""
        yield from _operation_lines(operation)
    if model.unsupported_operations:
        yield "\nunsupported operations"
        yield from _field_lines(model.unsupported_operations)
    if model.quality:
        yield "\nquality, on held-out data"
        yield from (f"  {_format_quality(quality)}  {quality.doc}".rstrip() for quality in model.quality)


def _field_lines(fields: Mapping[str, str]) -> Iterator[str]:
    """Return one line per field that is not empty."""
    present = {name: text for name, text in fields.items() if text}
    width = max(map(len, present))
    yield from (f"  {name.ljust(width)}  {text}" for name, text in present.items())


def _operation_lines(operation: Operation) -> Iterator[str]:
    yield f"{operation.name}: {operation.doc}".rstrip(": ")
    yield f"  steps       {operation.steps}{', with previews' if operation.previewable else ''}"
    if operation.score:
        yield f"  score       {_SCORE_MEANINGS[operation.score.kind]}; {operation.score.coordinate_space}"
    yield from (f"  parameter   {_format_parameter(parameter)}" for parameter in operation.parameters)
    yield from (f"  input       {_format_input(declared)}" for declared in operation.inputs)
    yield from (
        f"  output      {output.name}: {output}  {output.doc}".rstrip() for output in operation.outputs
    )


def _format_parameter(parameter: Parameter) -> str:
    is_numeric = parameter.type in (ParameterType.FLOAT, ParameterType.INTEGER)
    bounds = f"{parameter.minimum:g}..{parameter.maximum:g}" if is_numeric else " | ".join(parameter.choices)
    domain = f"{parameter.type} {bounds}".rstrip()
    return f"{parameter.name}={parameter.default}  ({domain})  {parameter.doc}".rstrip()


def _format_input(declared: Input) -> str:
    spec = declared.tensor
    need = f"optional, {declared.default:g} by default" if declared.optional else "required"
    return f"{spec.name}: {spec}{_bounds(spec)}, {need}  {spec.doc}".rstrip()


def _bounds(spec: TensorSpec) -> str:
    if spec.minimum is None and spec.maximum is None:
        return ""
    low = "" if spec.minimum is None else f"{spec.minimum:g}"
    high = "" if spec.maximum is None else f"{spec.maximum:g}"
    return f" in {low}..{high}"


def _score_table(scores: Scores, first_row: int) -> tuple[Sequence[str], Iterable[Sequence[str]]]:
    columns = {"nats": _nats_with_error(scores)}
    if (bits := _bits_per_dimension(scores)) is not None:
        columns["bits/dim"] = [f"{value:.4f}" for value in bits]
    return ("row", *columns), _numbered(list(zip(*columns.values(), strict=True)), first_row)


def _bits_per_dimension(scores: Scores) -> Array | None:
    """Return None for unnormalized scores: the unknown constant makes bits per dimension meaningless."""
    return None if scores.kind is ScoreKind.UNNORMALIZED else scores.bits_per_dimension


def _nats_with_error(scores: Scores) -> list[str]:
    if scores.standard_error is None:
        return [f"{nats:.4f}" for nats in scores.nats]
    pairs = zip(scores.nats, scores.standard_error, strict=True)
    return [f"{nats:.4f} ± {error:.4f}" for nats, error in pairs]


def _numbered(cells: Sequence[Sequence[str]], first_row: int) -> list[tuple[str, ...]]:
    return [(str(first_row + index), *line) for index, line in enumerate(cells)]
