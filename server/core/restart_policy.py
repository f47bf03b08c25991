"""Limit on restarts within a period."""

from collections import deque


class RestartPolicy:
    """Allows `max_restarts` restarts within any `period_seconds`; time is an argument."""

    def __init__(self, max_restarts: int, period_seconds: float) -> None:
        self._period_seconds = period_seconds
        self._times = deque[float](maxlen=max_restarts)

    def is_exhausted(self, now: float) -> bool:
        """Record a restart at `now`, and return whether it exceeds the limit."""
        times = self._times
        is_full = len(times) == times.maxlen
        is_exhausted = is_full and now - times[0] < self._period_seconds
        times.append(now)
        return is_exhausted
