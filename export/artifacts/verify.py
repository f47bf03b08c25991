"""Verification of an artifact: checksums, purity of graphs, golden rows and independence of rows.

Verification reads only the directory, as a server does, and checks every format. Each program runs its
golden rows as one batch, the first row alone, and all rows mixed into a batch of unrelated rows. This covers
at least three batch sizes.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.artifacts import golden, reader
from export.artifacts.interpreter import Interpreter, Rows, concatenate_rows
from export.graphs.graph import GraphError, summarize_error
from samovar.operations import program_name
from samovar.v1 import manifest_pb2

_FILLER_ROWS = 5
_ALONE, _BATCHED, _INDEPENDENCE = "golden rows", "golden rows in a mixed batch", "independence"
_EXPLANATIONS = {
    _ALONE: "the file does not compute the recorded results; export it again",
    _BATCHED: "the file computes other results when unrelated rows share the batch; "
    "make every output row a function of its own input row",
    _INDEPENDENCE: "a row depends on the other rows of its batch; "
    "do not sum, average, sort or normalize over axis 0",
}


@dataclass(frozen=True)
class CheckResult:
    """The result of one comparison: the largest absolute difference, and the tolerance."""

    program: str
    format: str
    check: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the difference is within the tolerance; False if it is NaN."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.program} ({self.format}): {self.check}: expected a difference of at most "
            f"{self.tolerance:g}, got {self.difference:g}: {_EXPLANATIONS[self.check]}"
        )


@dataclass(frozen=True)
class Report:
    """All comparisons, and one line for each problem that is not a comparison."""

    results: tuple[CheckResult, ...]
    problems: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """All problems and all comparisons that failed, one line each."""
        return [*self.problems, *(str(result) for result in self.results if not result.ok)]


def verify(directory: Path) -> Report:
    """Check the files of an artifact and replay its golden rows in every format.

    Raises:
        ArtifactError: If the manifest cannot be read.
    """
    manifest = reader.read(directory)
    problems = [*_check_files(directory, manifest), *_check_manifest(manifest)]
    if problems:
        return Report((), tuple(problems))
    results: list[CheckResult] = []
    for format in common_formats(manifest):
        try:
            interpreter = reader.load(directory, manifest, format)
        except GraphError as error:
            problems.append(str(error))
            continue
        for program in manifest.programs:
            try:
                results += _check_program(interpreter, program, format)
            except Exception as error:  # A graph from another exporter may raise any exception.
                problems.append(f"{_name(program)} ({format}): execution failed: {summarize_error(error)}")
    return Report(tuple(results), tuple(problems))


def common_formats(manifest: manifest_pb2.Manifest) -> list[str]:
    """Return the formats that every graph has, in the order of the first graph's files."""
    formats = [[file.format for file in graph.files] for graph in manifest.graphs]
    return [format for format in formats[0] if all(format in names for names in formats)] if formats else []


def format_report(report: Report) -> str:
    """Return the comparisons as a table for a terminal."""
    header = ("program", "format", "check", "max difference", "tolerance", "")
    lines = [header] + [
        (
            result.program,
            result.format,
            result.check,
            f"{result.difference:.2g}",
            f"{result.tolerance:.2g}",
            "ok" if result.ok else "FAILED",
        )
        for result in report.results
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _check_files(directory: Path, manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not reader.checksum_matches(directory):
        yield (
            f"{reader.MANIFEST}: its SHA-256 does not match {reader.CHECKSUM}: "
            "the manifest was changed after export; export it again"
        )
    for graph in manifest.graphs:
        for file in graph.files:
            path = directory / file.path
            if Path(file.path).name != file.path:
                yield f"{file.path}: expected the name of a file inside the artifact directory"
            elif not path.is_file():
                yield f"{file.path}: the manifest lists this file, but it is missing; export it again"
            elif reader.sha256(path.read_bytes()) != file.sha256:
                yield f"{file.path}: its SHA-256 does not match the manifest; export it again"


def _check_manifest(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not common_formats(manifest):
        yield "graphs: expected at least one graph, and a format that all graphs have"
    for program in manifest.programs:
        name, outputs = _name(program), {spec.name for spec in program.outputs}
        golden_outputs = [entry.outputs for entry in manifest.golden_rows if _name(entry) == name]
        if not golden_outputs:
            yield f"{name}: expected golden rows, found none"
        for tensors in golden_outputs:
            if set(tensors) != outputs:
                yield (
                    f"{name}: expected golden rows with the outputs {', '.join(sorted(outputs))}, "
                    f"got {', '.join(sorted(tensors)) or 'none'}"
                )
        nonfinite = {
            output for tensors in golden_outputs for output in tensors if not _is_finite(tensors[output])
        }
        for output in sorted(nonfinite):
            yield f"{name}: expected golden rows of finite numbers, got NaN or infinity in {output!r}"


def _is_finite(tensor: manifest_pb2.GoldenTensor) -> bool:
    array = golden.to_array(tensor)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _name(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.variant)


@dataclass(frozen=True)
class _GoldenCase:
    """Golden rows of one program: the request, the recorded outputs and their tolerances."""

    rows: Rows
    outputs: Mapping[str, NDArray[Any]]
    tolerance: Mapping[str, float]


def _check_program(
    interpreter: Interpreter, program: manifest_pb2.Program, format: str
) -> Iterator[CheckResult]:
    name = _name(program)
    cases = [
        _GoldenCase(
            golden.to_rows(program, entry),
            {output: golden.to_array(tensor) for output, tensor in entry.outputs.items()},
            entry.tolerance,
        )
        for entry in interpreter.manifest.golden_rows
        if _name(entry) == name
    ]
    alone = [interpreter.run(name, case.rows) for case in cases]
    first_rows = [interpreter.run(name, case.rows[:1]) for case in cases]
    mixed, mixed_differently = (_run_mixed(interpreter, name, cases, seed) for seed in (1, 2))
    recorded = [(case.outputs, case.tolerance) for case in cases]
    reference = [
        (outputs, _independence_tolerance(case, format)) for outputs, case in zip(mixed, cases, strict=True)
    ]
    for check, outputs, expected in (
        (_ALONE, alone, recorded),
        (_BATCHED, mixed, recorded),
        (_INDEPENDENCE, [*mixed_differently, *first_rows], [*reference, *reference]),
    ):
        pairs = [
            pair
            for tensors, (expected_tensors, tolerance) in zip(outputs, expected, strict=True)
            for pair in _compare(tensors, expected_tensors, tolerance)
        ]
        difference, allowed = max(pairs, key=_severity)
        yield CheckResult(name, format, check, difference, allowed)


def _independence_tolerance(case: _GoldenCase, format: str) -> Mapping[str, float]:
    """Return the tolerances between batches: 0 for ONNX Runtime, whose CPU kernels are batch-invariant.

    The kernels of torch are not batch-invariant in small batches.
    """
    return dict.fromkeys(case.tolerance, 0.0) if format == "onnx" else case.tolerance


def _run_mixed(
    interpreter: Interpreter, name: str, cases: list[_GoldenCase], seed: int
) -> list[dict[str, NDArray[Any]]]:
    """Run all cases in one batch that starts with filler rows; return the outputs of each case."""
    batch = concatenate_rows([_filler_rows(cases[0].rows, seed), *(case.rows for case in cases)])
    outputs = interpreter.run(name, batch)
    bounds = np.cumsum([_FILLER_ROWS, *(len(case.rows) for case in cases)])
    return [
        {output: array[start:stop] for output, array in outputs.items()} for start, stop in pairwise(bounds)
    ]


def _filler_rows(rows: Rows, seed: int) -> Rows:
    """Return rows with other seeds, and inputs whose elements are rotated, which keeps them in bounds."""
    filler = rows[np.arange(_FILLER_ROWS) * seed % len(rows)]
    return replace(
        filler,
        seeds=filler.seeds + np.uint64(seed),
        inputs={name: _rotate(array, seed) for name, array in filler.inputs.items()},
    )


def _rotate(array: NDArray[Any], places: int) -> NDArray[Any]:
    return np.roll(array.reshape(len(array), -1), places, axis=1).reshape(array.shape)


def _compare(
    outputs: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], tolerance: Mapping[str, float]
) -> list[tuple[float, float]]:
    """Return difference and tolerance of each output, over the rows of `outputs`."""
    return [
        (_difference(outputs[name], array[: len(outputs[name])]), tolerance.get(name, 0.0))
        for name, array in expected.items()
    ]


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _severity(pair: tuple[float, float]) -> tuple[bool, float]:
    difference, tolerance = pair
    return not difference <= tolerance, difference / max(tolerance, 1e-30)
