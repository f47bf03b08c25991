"""When starting again is no use any more: pure policy, to which time is an argument."""

from collections import deque


class RestartPolicy:
    """So many restarts within the period are one too many."""

    def __init__(self, most: int, period_seconds: float) -> None:
        self._period_seconds = period_seconds
        self._times = deque[float](maxlen=most)

    def is_exhausted(self, now: float) -> bool:
        """Whether one more would be too many; it counts from now on."""
        times = self._times
        is_full = len(times) == times.maxlen
        is_hopeless = is_full and now - times[0] < self._period_seconds
        times.append(now)
        return is_hopeless
