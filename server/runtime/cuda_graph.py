"""CUDA graphs: the kernels of a call, captured once and launched together."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from server.runtime.base import Tensors, is_device_lost, is_out_of_memory, summarize_error

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
        graph = record(call, _pool.handle())
    except RuntimeError as error:
        _pool.replace()
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


def record(call: Callable[[], object], pool: Any = None) -> torch.cuda.CUDAGraph:
    """Record the kernels that a call launches on the current stream, which is not the default one.

    Args:
        call: was called before, so that runtimes have chosen their kernels.
        pool: memory pool of the graph (default: one of its own).

    Raises:
        RuntimeError: the call does something that a CUDA graph cannot hold.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.current_stream().synchronize()
    with _no_garbage_collection():
        # Other threads may allocate and pin memory meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            call()
        except BaseException:
            with suppress(RuntimeError):  # the stream leaves its capture in any case
                graph.capture_end()
            raise
        graph.capture_end()
    return graph


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep objects that call CUDA when they are freed: a capture would fail."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Pool:
    """One memory pool for all captured graphs, which are never replayed at the same time.

    PyTorch cannot use a pool again after its last graph is gone, or after a failed capture. So a graph of one
    kernel stays in the pool, and a failed capture replaces it.
    """

    def __init__(self) -> None:
        self._handle: Any = None
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def handle(self) -> Any:
        """Return the pool, on the current GPU and stream."""
        if self._handle is None:
            handle, scratch = torch.cuda.graph_pool_handle(), torch.zeros(1, device="cuda")
            self._graphs.append(record(scratch.zero_, handle))
            self._handle = handle
        return self._handle

    def replace(self) -> None:
        """Use a new pool from now on; graphs in the old one still work."""
        self._handle = None


_pool = _Pool()


def _has_same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return bool(torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8)))
