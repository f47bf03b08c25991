"""Deferral of Ctrl-C and SIGTERM until a block of code has finished."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A flag that is set when SIGINT or SIGTERM arrives."""

    is_set = False


@contextmanager
def defer_signals() -> Iterator[StopRequest]:
    """Defer the first SIGINT or SIGTERM to the end of the block.

    The signal sets the yielded flag, and the block raises KeyboardInterrupt when it ends. A second signal
    raises KeyboardInterrupt immediately. Python delivers signals to the main thread only, so nothing is
    deferred in other threads.
    """
    stop = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    previous_handlers = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if stop.is_set:
        raise KeyboardInterrupt
