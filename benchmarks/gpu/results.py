"""Findings on disk: one JSON file for each part, written again after each finding, and their page."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu.base import Finding, Note, Verdict
from benchmarks.report import Result, Table, plain_table

_KINDS: dict[str, type[Finding]] = {kind.__name__: kind for kind in (Verdict, Result, Table, Note)}


@dataclass
class PartResult:
    """What a part has found.

    Attributes:
        name: name of the part.
        device: name of the device, such as "NVIDIA H100 80GB HBM3".
        outcome: "running", "done", "failed", "timed out" or "skipped".
        seconds: duration.
        findings: findings in order.
        error: the end of the output of a part that failed.
    """

    name: str
    device: str
    outcome: str = "running"
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    error: str = ""

    @property
    def is_green(self) -> bool:
        """Whether the part ended and all its requirements hold."""
        verdicts = [finding for finding in self.findings if isinstance(finding, Verdict)]
        return self.outcome == "done" and all(verdict.holds for verdict in verdicts)


def save(result: PartResult, directory: Path) -> None:
    """Write a part's file; a reader never sees half of it."""
    findings = [{"kind": type(item).__name__, **_fields(item)} for item in result.findings]
    text = json.dumps({**asdict(result), "findings": findings}, indent=1, ensure_ascii=False)
    temporary = directory / f".{result.name}.json"
    temporary.write_text(text)
    temporary.replace(directory / f"{result.name}.json")


def load(name: str, directory: Path) -> PartResult | None:
    """Read a part's file; None if the part has not written one."""
    path = directory / f"{name}.json"
    if not path.exists():
        return None
    fields = json.loads(path.read_text())
    findings = [_KINDS[item.pop("kind")](**item) for item in fields.pop("findings")]
    return PartResult(findings=findings, **fields)


def plain(finding: Finding) -> str:
    """Return a finding as text for a terminal."""
    match finding:
        case Verdict(requirement, holds, detail):
            return f"{'holds' if holds else 'FAILS'}  {requirement}{f': {detail}' if detail else ''}"
        case Result(metric, measured, target):
            return f"{metric}: {measured}{f' (target {target})' if target else ''}"
        case Table():
            return plain_table(finding)
        case Note(text):
            return text


def page(results: Iterable[PartResult], purposes: dict[str, str]) -> str:
    """Return the findings of all parts in Markdown."""
    parts = []
    for result in results:
        parts.append(f"### {result.name}\n\n{purposes[result.name]}")
        parts.append(f"{result.device}; {result.outcome} after {result.seconds:.0f} s.")
        parts += [_markdown(finding) for finding in result.findings]
        if result.error:
            parts.append(f"```\n{result.error}\n```")
    return "\n\n".join(parts) + "\n"


def _markdown(finding: Finding) -> str:
    if isinstance(finding, Table):
        heading = f"{finding.title[:1].upper()}{finding.title[1:]}:"
        return f"{heading}\n\n{_rows([finding.columns, ['---'] * len(finding.columns), *finding.rows])}"
    return plain(finding) if isinstance(finding, Note) else f"* {plain(finding)}"


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _fields(finding: Finding) -> dict[str, object]:
    return finding._asdict() if isinstance(finding, Result) else asdict(finding)
