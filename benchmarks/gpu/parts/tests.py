"""The contract, fault and memory tests of the project, with servers on the device."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu.base import Check, Finding, Note, Verdict
from benchmarks.report import Table

ROOT = Path(__file__).parents[3]
# In order of their value, with the seconds that each may take.
SUITES = {"tests/gpu": 60.0, "tests/server/test_faults.py": 30.0, "tests/test_family_contract.py": 80.0}
# The other data sets need more artifacts than the bundle carries.
CONTRACT_MODELS = "digits or text"
REHEARSED_MODELS = "digits-gan or text-lstm"
WORKERS = 4
_LOG_CHARACTERS = 1500


def run(check: Check) -> Iterator[Finding]:
    """Run each suite; yield a verdict, and the failures with their last lines."""
    rows = []
    for suite, seconds in SUITES.items():
        report = check.directory / f"{Path(suite).stem}.xml"
        report.unlink(missing_ok=True)
        outcome = _run_pytest(check, suite, seconds, report)
        if not report.exists():
            yield Verdict(f"{suite} passes on {check.device}", False, outcome[-_LOG_CHARACTERS:])
            continue
        counts, failures = _read(report)
        rows.append((suite, *(str(counts[kind]) for kind in ("passed", "failed", "skipped"))))
        summary = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        yield Verdict(f"{suite} passes on {check.device}", not failures, summary)
        for name, text in failures:
            yield Note(f"{name} failed: {text[-_LOG_CHARACTERS:]}")
    yield Table("gpu-tests", f"tests on {check.device}", ("tests", "passed", "failed", "skipped"), rows)


def _run_pytest(check: Check, suite: str, seconds: float, report: Path) -> str:
    """Run a suite; return the end of what it printed, or why it was stopped."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", suite, f"--junit-xml={report}"]
    command += ["--device", check.device, "--tb=short"]
    if suite.endswith("contract.py"):
        command += ["-k", REHEARSED_MODELS if check.is_rehearsal else CONTRACT_MODELS]
        if importlib.util.find_spec("xdist") and not check.is_rehearsal:
            command += ["-n", str(WORKERS)]
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return finished.stdout + finished.stderr


def _read(report: Path) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Return the number of tests by outcome, and each failure with its text."""
    counts, failures = Counter[str](), []
    for case in ElementTree.parse(report).iter("testcase"):
        broken = [child for child in case if child.tag in ("failure", "error")]
        is_skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if broken else "skipped" if is_skipped else "passed"] += 1
        failures += [(case.get("name", ""), child.text or child.get("message") or "") for child in broken]
    return counts, failures
