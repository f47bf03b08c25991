"""Batch sizes at which graphs are called."""

from server.engine.program_queue import RESERVED_SHARE

MIN_BUCKET = 4


def candidate_buckets(max_rows: int) -> tuple[int, ...]:
    """Return the batch sizes to test for batch invariance, in ascending order, up to `max_rows`.

    They are the powers of two, the sizes halfway between them, and the sizes that the scheduler's slot quota
    leaves to rows of the first two levels. On a CPU a step takes as long as its rows, padding included.

    All but the largest are multiples of MIN_BUCKET: a remainder of a SIMD register takes scalar code whose
    logarithms differ once in thousands of rows, too rarely for a test at load to notice.
    """
    powers = [MIN_BUCKET << exponent for exponent in range(max_rows.bit_length())]
    quotas = (max_rows - int(level * max_rows * RESERVED_SHARE) for level in (1, 2))
    sizes = {*powers, *(3 * power for power in powers), *quotas}
    return tuple(sorted({max_rows, *(size for size in sizes if size < max_rows and size % MIN_BUCKET == 0)}))
