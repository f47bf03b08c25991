"""The contract, fault and memory tests of the project, with servers on the device."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.base import Check, Finding, Note, Verdict
from benchmarks.report import Table

ROOT = Path(__file__).parents[3]
SUITES = ("tests/gpu", "tests/server/test_faults.py", "tests/test_family_contract.py")
# The other data sets need more artifacts than the bundle carries.
CONTRACT_MODELS = "digits or text"
REHEARSED_MODELS = "digits-gan or text-lstm"
WORKERS = 8
SECONDS = 72.0
_TEXT_CHARACTERS = 1500


def run(check: Check) -> Iterator[Finding]:
    """Run all suites at once; yield a verdict on each, and the last lines of its failures."""
    end = time.monotonic() + SECONDS
    suites = [_Suite.start(check, name) for name in SUITES]
    rows = []
    try:
        for suite in suites:
            has_ended = suite.wait(end - time.monotonic())
            outcomes = suite.outcomes()
            counts = Counter(outcome["outcome"] for outcome in outcomes)
            rows.append((suite.name, *(str(counts[kind]) for kind in ("passed", "failed", "skipped"))))
            summary = ", ".join(f"{count} {kind}" for kind, count in counts.items()) or suite.output()
            holds = has_ended and suite.process.returncode == 0 and bool(outcomes)
            detail = summary if has_ended else f"stopped after {SECONDS:.0f} s: {summary}"
            yield Verdict(f"{suite.name} passes on {check.device}", holds, detail)
            for outcome in outcomes:
                if outcome["outcome"] == "failed":
                    yield Note(f"{outcome['test']} failed: {outcome['text'][-_TEXT_CHARACTERS:]}")
    finally:
        for suite in suites:
            suite.kill()
    yield Table("gpu-tests", f"tests on {check.device}", ("tests", "passed", "failed", "skipped"), rows)


@dataclass(frozen=True)
class _Suite:
    """A run of pytest, which writes outcomes and what it prints to files."""

    name: str
    process: subprocess.Popen[bytes]
    directory: Path

    @classmethod
    def start(cls, check: Check, name: str) -> "_Suite":
        directory = check.directory / Path(name).stem
        directory.mkdir(exist_ok=True)
        outcomes = directory / "outcomes.jsonl"
        outcomes.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.outcomes"]
        # A new version of a library may warn; that is no reason to learn nothing of the device.
        command += [name, "-W", "default", "--tb=short", "--device", check.device]
        if name.endswith("contract.py"):
            command += ["-k", REHEARSED_MODELS if check.is_rehearsal else CONTRACT_MODELS]
            if importlib.util.find_spec("xdist") and not check.is_rehearsal:
                command += ["-n", str(WORKERS)]
        with (directory / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "SAMOVAR_TEST_OUTCOMES": str(outcomes.resolve())},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return cls(name, process, directory)

    def wait(self, seconds: float) -> bool:
        """Return whether the run has ended within some seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, seconds))
        return self.process.returncode is not None

    def outcomes(self) -> list[dict[str, str]]:
        path = self.directory / "outcomes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self) -> str:
        return (self.directory / "output").read_text()[-_TEXT_CHARACTERS:]

    def kill(self) -> None:
        """Stop the run with its workers and servers."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
