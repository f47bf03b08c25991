"""Parallel execution of commands: one process and one log file per command, one progress bar for all.

On two cores, two processes with one thread each finish earlier than one process with two threads.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.training.signals import defer_signals

_POLL_SECONDS = 0.2
_NUM_LAST_LINES = 12
_BAR_FORMAT = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}"
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Result:
    """The exit status, the duration and the log file of a command."""

    name: str
    status: int
    seconds: float
    log: Path

    @property
    def last_lines(self) -> list[str]:
        """The last lines of the log; of a progress bar, only its last state."""
        lines = self.log.read_bytes().decode(errors="replace").split("\n")
        shown = [line.rstrip().rpartition("\r")[2].strip() for line in lines]
        return [line for line in shown if line][-_NUM_LAST_LINES:]

    def __str__(self) -> str:
        if not self.status:
            return f"{self.name}: finished in {self.seconds:.0f} s"
        failure = f"FAILED with exit status {self.status} after {self.seconds:.0f} s; log: {self.log}"
        return "\n  ".join([f"{self.name}: {failure}", *self.last_lines])


def run_commands(commands: Mapping[str, Sequence[str]], size: int, logs: Path) -> list[Result]:
    """Run commands, at most `size` at the same time; a failed command does not stop the others.

    Args:
        commands: The command lines by name.
        size: The number of commands that run at the same time.
        logs: The directory for the log files, <name>.log with stdout and stderr.

    Returns:
        The results in the order of `commands`.

    Raises:
        KeyboardInterrupt: On SIGINT or SIGTERM. Running commands are sent SIGTERM and awaited first.
    """
    from tqdm import tqdm

    logs.mkdir(parents=True, exist_ok=True)
    pending, running, results = deque(commands), dict[str, _Process](), dict[str, Result]()
    # disable=None hides the bar if stderr is not a terminal.
    bar = tqdm(total=len(commands), desc="finished", bar_format=_BAR_FORMAT, dynamic_ncols=True, disable=None)
    with bar, defer_signals() as stop:
        try:
            while (pending or running) and not stop.is_set:
                while pending and len(running) < size:
                    name = pending.popleft()
                    running[name] = _Process(name, commands[name], logs)
                    tqdm.write(f"[{len(results) + len(running)}/{len(commands)}] {name}: started", sys.stderr)
                bar.set_postfix_str(", ".join(running))
                time.sleep(_POLL_SECONDS)
                for result in [process.result() for process in running.values() if process.has_ended()]:
                    del running[result.name]
                    results[result.name] = result
                    tqdm.write(str(result), sys.stderr)
                    bar.set_postfix_str(", ".join(running), refresh=False)
                    bar.update()
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return [results[name] for name in commands]


class _Process:
    """A running command, without input, with its output in a log file."""

    def __init__(self, name: str, command: Sequence[str], logs: Path) -> None:
        self._name, self._log = name, logs / f"{name}.log"
        self._start = time.monotonic()
        with self._log.open("wb") as output:
            # The process has its own process group. Otherwise Ctrl-C in a terminal would reach it twice: from
            # the terminal, and as SIGTERM from `terminate`.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | _ENVIRONMENT,
                process_group=0,
            )

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> Result:
        """Return the result of a process that has ended."""
        seconds = time.monotonic() - self._start
        return Result(self._name, self._process.wait(), seconds, self._log)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        self._process.wait()
