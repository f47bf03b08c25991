"""Prove that an artifact computes what was recorded: files, pure graphs, golden rows, independence of rows.

Works from the directory alone, like a server would, in every format. A program runs
its golden rows by themselves, the first of them alone, and all of them among strangers,
so in three batch sizes at least. Knows no family.
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
from export.graphs.graph import GraphError
from export.graphs.program import program_name
from samovar.v1 import manifest_pb2

_STRANGERS = 5
_ALONE, _BATCHED, _INDEPENDENCE = "golden rows", "golden rows in company", "independence"
_MEANING = {
    _ALONE: "the file does not compute what was recorded",
    _BATCHED: "the file computes something else when other rows share the batch; "
    "every output row must be a function of its own input row",
    _INDEPENDENCE: "a row depends on the other rows of its batch; "
    "nothing may be summed, averaged, sorted or normalised over axis 0",
}


@dataclass(frozen=True)
class CheckResult:
    """One comparison: the largest absolute difference, and the largest that is allowed."""

    program: str
    format: str
    check: str
    difference: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """False also for a difference that is not a number."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.program} ({self.format}): {self.check}: expected a difference of at most "
            f"{self.tolerance:g}, got {self.difference:g}: {_MEANING[self.check]}"
        )


@dataclass(frozen=True)
class Report:
    """What was compared, and one line for everything that is wrong."""

    results: tuple[CheckResult, ...]
    problems: tuple[str, ...]

    @property
    def failures(self) -> list[str]:
        """Every problem and every comparison that failed."""
        return [*self.problems, *(str(finding) for finding in self.results if not finding.ok)]


def verify(directory: Path) -> Report:
    """Check an artifact's files, replay its golden rows in every format; ArtifactError without a manifest."""
    manifest = reader.read(directory)
    problems = [*_file_problems(directory, manifest), *_manifest_problems(manifest)]
    if problems:
        return Report((), tuple(problems))
    findings: list[CheckResult] = []
    for format in common_formats(manifest):
        try:
            interpreter = reader.load(directory, manifest, format)
        except GraphError as error:
            problems.append(str(error))
            continue
        for program in manifest.programs:
            try:
                findings += _program_findings(interpreter, program, format)
            except Exception as error:  # a graph that was made elsewhere may raise anything
                reason = str(error).strip().partition("\n")[0]
                problems.append(f"{_name(program)} ({format}): cannot be run: {reason}")
    return Report(tuple(findings), tuple(problems))


def common_formats(manifest: manifest_pb2.Manifest) -> list[str]:
    """The formats that every graph has, in the order of the first graph's files."""
    offered = [[file.format for file in graph.files] for graph in manifest.graphs]
    return [format for format in offered[0] if all(format in names for names in offered)] if offered else []


def format_report(report: Report) -> str:
    """The findings for a terminal."""
    header = ("program", "format", "check", "max difference", "tolerance", "")
    lines = [header] + [
        (
            f.program,
            f.format,
            f.check,
            f"{f.difference:.2g}",
            f"{f.tolerance:.2g}",
            "ok" if f.ok else "FAILED",
        )
        for f in report.results
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _file_problems(directory: Path, manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not reader.checksum_matches(directory):
        yield f"{reader.MANIFEST}: it is not what {reader.CHECKSUM} was made for: it was changed after export"
    for graph in manifest.graphs:
        for file in graph.files:
            path = directory / file.path
            if Path(file.path).name != file.path:
                yield f"{file.path}: expected a file name inside the artifact"
            elif not path.is_file():
                yield f"{file.path}: the manifest names it, but it is missing"
            elif reader.sha256(path.read_bytes()) != file.sha256:
                yield f"{file.path}: its SHA-256 is not the one in the manifest; export it again"


def _manifest_problems(manifest: manifest_pb2.Manifest) -> Iterator[str]:
    if not common_formats(manifest):
        yield "expected graphs, and a format that all of them have"
    for program in manifest.programs:
        answers = [entry.outputs for entry in manifest.golden_rows if _name(entry) == _name(program)]
        if not answers:
            yield f"{_name(program)}: expected golden rows, found none"
        if any(set(answer) != {spec.name for spec in program.outputs} for answer in answers):
            yield f"{_name(program)}: expected golden rows with an answer for every output, and no others"
        for name in sorted({name for answer in answers for name in answer if not _is_finite(answer[name])}):
            yield f"{_name(program)}: expected golden rows of finite numbers, got others in {name!r}"


def _is_finite(tensor: manifest_pb2.GoldenTensor) -> bool:
    array = golden.array(tensor)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def _name(message: manifest_pb2.Program | manifest_pb2.GoldenRows) -> str:
    return program_name(message.operation, message.variant)


@dataclass(frozen=True)
class _GoldenCase:
    """Golden rows of one program, as requested and as answered."""

    rows: Rows
    outputs: Mapping[str, NDArray[Any]]
    tolerance: Mapping[str, float]


def _program_findings(
    interpreter: Interpreter, program: manifest_pb2.Program, format: str
) -> Iterator[CheckResult]:
    proofs = [
        _GoldenCase(
            golden.request(program, entry),
            {name: golden.array(tensor) for name, tensor in entry.outputs.items()},
            entry.tolerance,
        )
        for entry in interpreter.manifest.golden_rows
        if _name(entry) == _name(program)
    ]
    alone = [interpreter.run(_name(program), proof.rows) for proof in proofs]
    first = [interpreter.run(_name(program), proof.rows[:1]) for proof in proofs]
    company, others = (_in_company(interpreter, program, proofs, seed) for seed in (1, 2))
    recorded = [(proof.outputs, proof.tolerance) for proof in proofs]
    exact = [(answer, _independence(proof, format)) for answer, proof in zip(company, proofs, strict=True)]
    for check, given, expected in (
        (_ALONE, alone, recorded),
        (_BATCHED, company, recorded),
        (_INDEPENDENCE, [*others, *first], [*exact, *exact]),
    ):
        pairs = [
            pair
            for answer, (known, tolerance) in zip(given, expected, strict=True)
            for pair in _compare(answer, known, tolerance)
        ]
        difference, allowed = max(pairs, key=_severity)
        yield CheckResult(_name(program), format, check, difference, allowed)


def _independence(proof: _GoldenCase, format: str) -> Mapping[str, float]:
    """ONNX Runtime computes a row to the bit in any company on a CPU; torch may not in small batches."""
    return dict.fromkeys(proof.tolerance, 0.0) if format == "onnx" else proof.tolerance


def _in_company(
    interpreter: Interpreter, program: manifest_pb2.Program, proofs: list[_GoldenCase], seed: int
) -> list[dict[str, NDArray[Any]]]:
    strangers = _strangers(proofs[0].rows, seed)
    answers = interpreter.run(
        _name(program), concatenate_rows([strangers, *(proof.rows for proof in proofs)])
    )
    bounds = np.cumsum([_STRANGERS, *(len(proof.rows) for proof in proofs)])
    return [{name: array[start:stop] for name, array in answers.items()} for start, stop in pairwise(bounds)]


def _strangers(rows: Rows, seed: int) -> Rows:
    """Rows with other noise and other inputs: their elements change places, which keeps them in bounds."""
    strangers = rows[np.arange(_STRANGERS) * seed % len(rows)]
    return replace(
        strangers,
        seeds=strangers.seeds + np.uint64(seed),
        inputs={name: _moved(array, seed) for name, array in strangers.inputs.items()},
    )


def _moved(array: NDArray[Any], places: int) -> NDArray[Any]:
    return np.roll(array.reshape(len(array), -1), places, axis=1).reshape(array.shape)


def _compare(
    given: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]], tolerance: Mapping[str, float]
) -> list[tuple[float, float]]:
    """Difference and tolerance by output, over the rows that `given` has."""
    return [
        (_difference(given[name], array[: len(given[name])]), tolerance.get(name, 0.0))
        for name, array in expected.items()
    ]


def _difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0))


def _severity(pair: tuple[float, float]) -> tuple[bool, float]:
    difference, tolerance = pair
    return not difference <= tolerance, difference / max(tolerance, 1e-30)
