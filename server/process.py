"""Settings of a server process: interpreter, memory allocator and logging."""

import ctypes
import logging
import sys

# Longest time that the device thread waits for the GIL; CPython's default of 5 ms is longer than most steps.
SWITCH_SECONDS = 0.0005

# mallopt parameter numbers of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20
LARGEST_KEPT = 32 << 20


def configure(log_level: str) -> None:
    """Configure this process to serve: GIL switch interval, memory allocator and logging."""
    sys.setswitchinterval(SWITCH_SECONDS)
    configure_malloc()
    configure_logging(log_level)


def configure_malloc() -> bool:
    """Let freed memory be reused instead of returning it to the system and asking for fresh pages.

    Copies of large responses cost several times more with fresh pages than with reused ones. Returns
    False where the C library has no `mallopt`.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def configure_logging(level: str) -> None:
    """Log to standard error at this level and above."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(message)s",
        stream=sys.stderr,
    )
    # gRPC logs only clients that disconnect; the servicer's instrumentation logs failed calls.
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
