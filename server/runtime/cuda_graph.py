"""CUDA graphs: the kernels of a call, captured once and launched together."""

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import torch

from server.runtime.base import Tensors, is_device_lost, is_out_of_memory, summarize_error

log = logging.getLogger(__name__)

# Runtimes choose and compile their kernels in the first calls with new shapes.
WARM_UP_CALLS = 3


class NotCapturable(Exception):
    """A call has no CUDA graph; the message says why."""


def capture(call: Callable[[], None], outputs: Tensors) -> Callable[[], None]:
    """Return the replay of a call as a CUDA graph.

    Args:
        call: launches kernels on the current stream, which read and write the same memory in each call. It
            may be repeated: its result depends on nothing that it changes.
        outputs: the tensors that it writes.

    Raises:
        NotCapturable: the call does something that a CUDA graph cannot hold, or a replay computes other bits.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    expected = [output.clone() for output in outputs]
    try:
        graph = _capture(call)
    except RuntimeError as error:
        if is_out_of_memory(error) or is_device_lost(error):
            raise
        raise NotCapturable(summarize_error(error)) from error
    for output in outputs:
        output.zero_()
    graph.replay()
    if not all(map(_has_same_bits, outputs, expected)):
        raise NotCapturable("a replay computes other bits than the kernels one by one")
    replay: Callable[[], None] = graph.replay
    return replay


def _capture(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    # Other threads may allocate and pin memory meanwhile.
    graph.capture_begin(pool=_pool(), capture_error_mode="thread_local")
    try:
        call()
    except BaseException:
        with suppress(RuntimeError):  # the stream leaves its capture in any case
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


@cache
def _pool() -> Any:
    """Return one memory pool for all captured graphs, which are never replayed at the same time."""
    return torch.cuda.graph_pool_handle()


def _has_same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)))
