"""Several commands at a time: whatever becomes of one, the others go on, and nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export.commands.process_pool import Log, ProcessPool, Result


class Recorded:
    """What a display is told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.lines: list[str] = []
        self.results: list[Result] = []

    def begin(self, name: str) -> None:
        self.begun.append(name)

    def update(self, name: str, line: str) -> None:
        self.lines.append(f"{name}: {line}")

    def end(self, result: Result) -> None:
        self.results.append(result)


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def test_results_come_in_the_order_asked_for() -> None:
    display = Recorded()
    results = ProcessPool(2, display).run(
        {
            "slow": python("import time; time.sleep(0.3)"),
            "bad": python("import sys; print('so far'); sys.exit('wrong')"),
            "good": python("print('fine')"),
        }
    )
    assert [(result.name, result.status) for result in results] == [("slow", 0), ("bad", 1), ("good", 0)]
    assert results[1].last_lines == ("so far", "wrong")
    assert sorted(result.name for result in display.results) == ["bad", "good", "slow"]


def test_what_a_progress_bar_overwrites_is_shown_but_not_kept() -> None:
    display = Recorded()
    (result,) = ProcessPool(1, display).run({"one": python("print('10%\\r20%\\rdone')")})
    assert display.lines == ["one: 10%", "one: 20%", "one: done"]
    assert result.last_lines == ("done",)


def test_a_log_tells_how_far_a_command_is_but_not_at_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in (0, 1000):
        ProcessPool(1, Log(1, seconds)).run({"one": python("print('10%\\r20%\\r', end='')")})
    often, rarely = capsys.readouterr().err.split("[1/1] one ...\n")[1:]
    assert often.splitlines()[:2] == ["one: 10%", "one: 20%"]
    assert [line.partition(" in ")[0] for line in rarely.splitlines()] == ["one: done"]


_PATIENT = """
import os, signal, sys, time
def stop(*_):
    open({path!r}, "w").write("saved")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
print("ready", os.getpid(), flush=True)
time.sleep(60)
"""

_CREW = """
import json, signal, sys
from export.workers import Crew

# Whoever is started in the background of a script is told to ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Told:
    def begin(self, name):
        self.update(name, f"begun {name}")

    def update(self, name, line):
        # At one go: workers are told of by threads of their own.
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()

    def end(self, result):
        pass

try:
    Crew(2, Told()).run(json.loads(sys.argv[1]))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_an_interrupt_stops_all_and_waits_for_them(tmp_path: Path) -> None:
    saved = [tmp_path / "first", tmp_path / "second"]
    first, second = (python(_PATIENT.format(path=str(path))) for path in saved)
    commands = json.dumps({"first": first, "second": second, "third": python("")})
    # A crew in a process of its own: in this one whoever is running would get the interrupt.
    with subprocess.Popen([*python(_CREW), commands], stdout=subprocess.PIPE, text=True) as crew:
        assert crew.stdout is not None
        lines = [crew.stdout.readline().split() for _ in range(4)]
        crew.send_signal(signal.SIGINT)
        assert crew.stdout.read() == ""
        assert crew.wait(30) == 130
    assert sorted(line[1] for line in lines if line[0] == "begun") == ["first", "second"]
    assert [path.read_text() for path in saved] == ["saved", "saved"]
    for number in (int(line[1]) for line in lines if line[0] == "ready"):
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


def test_workers_have_one_thread_and_no_input() -> None:
    display = Recorded()
    ProcessPool(1, display).run(
        {"one": python("import os, sys; print(os.environ['OMP_NUM_THREADS'], repr(sys.stdin.read()))")}
    )
    assert display.lines == ["one: 1 ''"]


def test_ctrl_c_in_a_terminal_reaches_the_parent_alone() -> None:
    """A worker is in a process group of its own."""
    display = Recorded()
    ProcessPool(1, display).run({"one": python("import os; print(os.getpgid(0) == os.getpid())")})
    assert display.lines == ["one: True"]
