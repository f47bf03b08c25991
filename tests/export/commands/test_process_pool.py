"""Parallel commands: failures do not stop other commands, and an interrupt leaves no process behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from export.commands.process_pool import run_commands


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_run_commands_returns_results_in_given_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_commands(
        {
            "slow": python("import time; time.sleep(0.3)"),
            "bad": python("import sys; print('progress'); sys.exit('wrong')"),
            "good": python("print('fine')"),
        },
        2,
        tmp_path,
    )
    assert [(result.name, result.status) for result in results] == [("slow", 0), ("bad", 1), ("good", 0)]
    assert results[1].last_lines == ["progress", "wrong"]
    output = capsys.readouterr().err
    assert "[1/3] slow: started" in output
    assert "[3/3] good: started" in output
    assert (
        f"bad: FAILED with exit status 1 after 0 s; log: {tmp_path / 'bad.log'}\n  progress\n  wrong"
        in output
    )
    assert "good: finished in 0 s" in output


def test_result_shows_last_state_of_progress_bar(tmp_path: Path) -> None:
    (result,) = run_commands({"one": python("print('10%\\r20%\\rdone\\r')")}, 1, tmp_path)
    assert result.last_lines == ["done"]
    assert result.log.read_bytes() == b"10%\r20%\rdone\r\n"


_SAVES_ON_SIGTERM = """
import os, signal, sys, time
def stop(*_):
    open({path!r}, "w").write("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print(os.getpid(), flush=True)
time.sleep(60)
"""

_POOL = """
import json, pathlib, sys
from export.commands.process_pool import run_commands

try:
    run_commands(json.loads(sys.argv[1]), 2, pathlib.Path(sys.argv[2]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def wait_for_output(log: Path) -> str:
    while not (log.is_file() and log.read_text().endswith("\n")):
        time.sleep(0.02)
    return log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_commands_interrupted_stops_and_awaits_all_processes(number: int, tmp_path: Path) -> None:
    saved = [tmp_path / "first", tmp_path / "second"]
    first, second = (python(_SAVES_ON_SIGTERM.format(path=str(path))) for path in saved)
    commands = json.dumps({"first": first, "second": second, "third": python("")})
    logs = tmp_path / "logs"
    # The pool runs in its own process, so that the signal does not reach the test runner.
    with subprocess.Popen([*python(_POOL), commands, str(logs)], stderr=subprocess.PIPE, text=True) as pool:
        process_ids = [int(wait_for_output(logs / f"{name}.log")) for name in ("first", "second")]
        pool.send_signal(number)
        assert pool.stderr is not None
        output = pool.stderr.read()
        assert pool.wait(500) == 130
    assert "third" not in output
    assert not (logs / "third.log").exists()
    assert [path.read_text() for path in saved] == ["saved", "saved"]
    for process_id in process_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)


def test_run_commands_gives_one_thread_and_no_input(tmp_path: Path) -> None:
    script = "import os, sys; print(os.environ['OMP_NUM_THREADS'], repr(sys.stdin.read()))"
    (result,) = run_commands({"one": python(script)}, 1, tmp_path)
    assert result.last_lines == ["1 ''"]


def test_run_commands_starts_each_command_in_own_process_group(tmp_path: Path) -> None:
    """Ctrl-C in a terminal reaches the parent process only."""
    (result,) = run_commands({"one": python("import os; print(os.getpgid(0) == os.getpid())")}, 1, tmp_path)
    assert result.last_lines == ["True"]
