"""A progress bar for whoever watches a terminal; silent where nobody does."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self, TextIO

_WIDTH = 30


class ProgressBar:
    """Rows done, their rate and the time left, on one line that is drawn over."""

    def __init__(self, total: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.visible = stream.isatty()
        self._total = total
        self._stream = stream
        self._clock = clock

    def __enter__(self) -> Self:
        self._start = self._clock()
        self.show(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.visible:
            self._stream.write("\n")

    def show(self, done: float) -> None:
        """Redraw for so many rows; a row on the way counts by its share."""
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
        left = (self._total - done) / rate
        return f"[{bar}] {int(done)}/{self._total} rows, {rate:.3g} rows/s, {left:.0f} s left"
