"""Ctrl-C and SIGTERM, held back until what must not be torn is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody has asked to stop."""

    is_set = False


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Within the block a first Ctrl-C or SIGTERM only sets a flag; KeyboardInterrupt follows at its end.

    A second one is raised at once. Signals reach the main thread only: elsewhere nothing is held back.
    """
    interrupt = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupt.is_set:
            raise KeyboardInterrupt
        interrupt.is_set = True

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield interrupt
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if interrupt.is_set:
        raise KeyboardInterrupt
