"""A progress bar for terminals; it prints nothing on other streams."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

_WIDTH = 30


class ProgressBar:
    """Finished rows, rows per second and the remaining time, on one line that is redrawn."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.visible = stream.isatty()
        self._total = total
        self._stream = stream
        self._clock = clock

    def __enter__(self) -> Self:
        self._start = self._clock()
        self.update(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.visible:
            self._stream.write("\n")

    def update(self, done: float) -> None:
        """Redraw the line for `done` rows; an unfinished row counts by the fraction of its steps."""
        if self.visible:
            self._stream.write(f"\r{self._line(done)}\x1b[K")
            self._stream.flush()

    def _line(self, done: float) -> str:
        filled = int(_WIDTH * done / max(self._total, 1))
        bar = "#" * filled + "-" * (_WIDTH - filled)
        elapsed = self._clock() - self._start
        if not done or not elapsed:
            return f"[{bar}] {int(done)}/{self._total} rows"
        rate = done / elapsed
        remaining = (self._total - done) / rate
        return f"[{bar}] {int(done)}/{self._total} rows, {rate:.3g} rows/s, {remaining:.0f} s left"
