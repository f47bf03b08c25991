"""Several trainings at a time, each in a process of its own: the commands run, their progress shown.

Two processes with one thread each get more out of two cores than one with two. Knows
commands and what they print, nothing of what they do.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

_REMEMBERED_LINES = 12
# Between two lines of a log that tell how far a command is.
_SECONDS_BETWEEN = 20.0
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "PYTHONUNBUFFERED": "1",
    "TQDM_MININTERVAL": "0.5",
    "COLUMNS": "76",
}


@dataclass(frozen=True)
class Result:
    """How a command ended: exit status, seconds, and the last lines that it printed."""

    name: str
    status: int
    seconds: float
    last_lines: tuple[str, ...]


class Display(Protocol):
    """Where the progress of several commands is shown; called from several threads, begin and end in turn."""

    def begin(self, name: str) -> None:
        """A command has started."""

    def update(self, name: str, line: str) -> None:
        """It has printed something that stands until it prints something else."""

    def end(self, result: Result) -> None:
        """It is over."""


@dataclass
class ProcessPool:
    """Runs commands, at most `size` at a time, and stops those under way when it is interrupted."""

    size: int
    display: Display
    _running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _is_stopped: bool = False

    def run(self, commands: Mapping[str, Sequence[str]]) -> list[Result]:
        """Run every command to its end, whatever becomes of the others; results in the given order.

        On KeyboardInterrupt the commands under way are sent SIGTERM and awaited, no other is begun.
        """
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(self._run, name, command) for name, command in commands.items()]
            try:
                return [future.result() for future in futures]
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise

    def _run(self, name: str, command: Sequence[str]) -> Result:
        started, lines = time.monotonic(), deque[str](maxlen=_REMEMBERED_LINES)
        process = self._start(name, command)
        assert process.stdout is not None
        for line, is_final in _lines(process.stdout.fileno()):
            self.display.update(name, line)
            if is_final:
                lines.append(line)
        process.stdout.close()
        result = Result(name, process.wait(), time.monotonic() - started, tuple(lines))
        with self._lock:
            del self._running[name]
            self.display.end(result)
        return result

    def _start(self, name: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
        with self._lock:
            if self._is_stopped:
                raise InterruptedError(f"{name} was not begun")
            self.display.begin(name)
            # In a process group of its own, for Ctrl-C in a terminal would reach it twice: it is told below.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | _ENVIRONMENT,
                process_group=0,
            )
            self._running[name] = process
            return process

    def _stop(self) -> None:
        with self._lock:
            self._is_stopped = True
            for process in self._running.values():
                process.send_signal(signal.SIGTERM)


def _lines(file: int) -> Iterator[tuple[str, bool]]:
    """What is printed, line by line; those that a carriage return will overwrite are not final."""
    rest = ""
    while chunk := os.read(file, 65536):
        *whole, rest = re.split(r"(?<=[\r\n])", rest + chunk.decode(errors="replace"))
        for line in whole:
            if line.strip():
                yield line.strip(), line.endswith("\n")
    if rest.strip():
        yield rest.strip(), True


def display(size: int, total: int) -> Display:
    """A live table for a terminal, and plain lines, few of them, for anything else."""
    return Table(size, total) if sys.stderr.isatty() else Log(total)


class Table:
    """A line for every running command below a count of those that are done."""

    def __init__(self, size: int, total: int) -> None:
        from tqdm import tqdm

        self._write = tqdm.write
        self._count = tqdm(total=total, desc="done", unit="model", dynamic_ncols=True)
        self._lines = [tqdm(bar_format="{desc}", position=1 + row, leave=False) for row in range(size)]
        self._free = list(reversed(range(size)))
        self._rows: dict[str, int] = {}

    def begin(self, name: str) -> None:
        self._rows[name] = self._free.pop()
        self.update(name, "starting")

    def update(self, name: str, line: str) -> None:
        self._lines[self._rows[name]].set_description_str(f"{name:<18} {line}")

    def end(self, result: Result) -> None:
        row = self._rows.pop(result.name)
        self._lines[row].set_description_str("")
        self._free.append(row)
        self._write(_ending(result), file=sys.stderr)
        self._count.update()


class Log:
    """A line when a command begins, one when it ends, and every so often how far it is."""

    def __init__(self, total: int, seconds_between: float = _SECONDS_BETWEEN) -> None:
        self._total, self._begun = total, 0
        self._seconds_between = seconds_between
        self._said: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self._begun += 1
        self._said[name] = time.monotonic()
        print(f"[{self._begun}/{self._total}] {name} ...", file=sys.stderr, flush=True)

    def update(self, name: str, line: str) -> None:
        if time.monotonic() - self._said[name] >= self._seconds_between:
            self._said[name] = time.monotonic()
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    def end(self, result: Result) -> None:
        print(_ending(result), file=sys.stderr, flush=True)


def _ending(result: Result) -> str:
    if not result.status:
        return f"{result.name}: done in {result.seconds:.0f} s"
    lines = "\n  ".join(result.last_lines)
    return f"{result.name}: FAILED with status {result.status} after {result.seconds:.0f} s\n  {lines}"
