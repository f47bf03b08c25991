"""Triton kernel of samovar.noise: one launch draws the numbers of one step of many rows on a GPU.

Words and uniform numbers have the same bits as on the host. Normal numbers are rounded from float64 as well,
but a GPU's logarithm and cosine may differ from NumPy's in the last bit of float64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl

from server.core.spec import NoiseSpec

# Blocks of four words that one program instance draws.
_BLOCKS = 128


@triton.jit
def _uniform(word):
    return ((word >> 9).to(tl.float64) + 0.5) * 1.1920928955078125e-07  # 2 ** -23


@triton.jit
def _normal_pair(first, second):
    # Every constant but the last is a power of two or a half, which is exact in any precision.
    unit = (first.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2 ** -32
    radius = tl.sqrt(-2.0 * tl.log(unit))
    angle = (second.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    angle = angle * tl.full(angle.shape, 6.283185307179586, tl.float64)
    return radius * tl.cos(angle), radius * tl.sin(angle)


# One compilation serves all programs and all slots.
@triton.jit(
    do_not_specialize=["stream", "count"],
    do_not_specialize_on_alignment=["out", "seeds", "rows", "steps"],
)
def _draw(out, seeds, rows, steps, stream, count, IS_NORMAL: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: PLR0913
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    zeros = tl.zeros([BLOCKS], tl.int32)
    index = zeros + tl.load(rows + row).to(tl.int32)
    step = zeros + tl.load(steps + row).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seeds + row), block, step, index, zeros + stream)
    if IS_NORMAL:
        n0, n1 = _normal_pair(w0, w1)
        n2, n3 = _normal_pair(w2, w3)
    else:
        n0, n1, n2, n3 = _uniform(w0), _uniform(w1), _uniform(w2), _uniform(w3)
    first = 4 * block
    start = out + row * count
    tl.store(start + first, n0.to(tl.float32), first < count)
    tl.store(start + first + 1, n1.to(tl.float32), first + 1 < count)
    tl.store(start + first + 2, n2.to(tl.float32), first + 2 < count)
    tl.store(start + first + 3, n3.to(tl.float32), first + 3 < count)


def draw(
    spec: NoiseSpec, seeds: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, out: torch.Tensor
) -> None:
    """Draw the numbers of one step of each row.

    Args:
        spec: distribution and stream of the numbers.
        seeds: seeds of the requests, the bits of uint64 as int64 [B].
        rows: row indices, int64 [B].
        steps: step indices, int64 [B].
        out: takes the numbers, contiguous float32 [B, *shape].
    """
    batch, count = len(out), out[0].numel()
    grid = (batch, triton.cdiv(count, 4 * _BLOCKS))
    _draw[grid](out, seeds, rows, steps, spec.stream, count, spec.distribution == "normal", _BLOCKS)
