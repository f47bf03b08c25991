"""Plugin of pytest that appends each outcome to a file at once, so that a run that is stopped keeps them.

The environment variable SAMOVAR_TEST_OUTCOMES names the file. Each line is a JSON object with the keys test,
outcome and text.
"""

import json
import os
from pathlib import Path

import pytest


@pytest.hookimpl
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the outcome of a test, or of a setup that failed; the main process of pytest-xdist has all."""
    is_outcome = report.when == "call" or report.outcome != "passed"
    if not is_outcome or "PYTEST_XDIST_WORKER" in os.environ:
        return
    text = report.longreprtext if report.failed else ""
    with Path(os.environ["SAMOVAR_TEST_OUTCOMES"]).open("a") as file:
        print(json.dumps({"test": report.nodeid, "outcome": report.outcome, "text": text}), file=file)
