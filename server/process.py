"""How a process of the server keeps memory that it has used."""

import ctypes

# glibc's names for what mallopt sets.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 256 << 20
LARGEST_KEPT = 32 << 20


def keep() -> bool:
    """Let freed memory be used again, instead of giving it back and asking for fresh pages.

    Answers of a MiB are copied a few times on their way out, and the system's work for the fresh pages of
    each copy is several times the copying. False where the C library is none that can be told so.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))
