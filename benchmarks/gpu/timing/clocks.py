"""Time of a call on a device and on the host, with its kernels launched one by one or as a CUDA graph."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from server.runtime.cuda_graph import record

Call = Callable[[], object]
Precision = Literal["float32", "TF32", "bfloat16"]

# Runtimes choose and compile their kernels in the first calls with new shapes.
WARM_UP_CALLS = 3
WARM_UP_SECONDS = 0.5
# Calls between two readings of the clock take GROUP_SECONDS together, unless they are more than MAX_GROUP.
GROUP_SECONDS, MAX_GROUP = 0.005, 200
MIN_GROUPS, MAX_GROUPS = 3, 50
# Calls of which the host's time is measured, and calls after which it waits so that no queue is full.
HOST_CALLS, HOST_GROUP = 100, 2


@dataclass(frozen=True)
class Activity:
    """What a device does in one call: the number of its kernels, and the seconds that they take."""

    kernels: float
    seconds: float


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def warm_up(device: torch.device) -> None:
    """Let a GPU work for a moment, so that it raises its clocks and creates the handles of its libraries."""
    if device.type != "cuda":
        return
    matrix = torch.randn(2048, 2048, device=device)
    end = time.monotonic() + WARM_UP_SECONDS
    while time.monotonic() < end:
        matrix = torch.nn.functional.normalize(matrix @ matrix)
        synchronize(device)


def median_seconds(call: Call, device: torch.device, seconds: float) -> float:
    """Return the median seconds of a call in a row of calls, by the clock of the device.

    Args:
        call: launches the same work each time.
        device: device that does the work.
        seconds: how long to measure, unless a few calls take longer.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    estimate = max(_group_seconds(call, device, 1), 1e-7)
    size = _clamp(int(GROUP_SECONDS / estimate), 1, MAX_GROUP)
    groups = _clamp(int(seconds / (size * estimate)), MIN_GROUPS, MAX_GROUPS)
    return statistics.median(_group_seconds(call, device, size) / size for _ in range(groups))


def _group_seconds(call: Call, device: torch.device, size: int) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(size):
            call()
        return time.perf_counter() - start
    first, last = (_event() for _ in range(2))
    first.record()
    for _ in range(size):
        call()
    last.record()
    last.synchronize()
    seconds: float = first.elapsed_time(last) / 1000
    return seconds


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def host_seconds(call: Call, device: torch.device, calls: int = HOST_CALLS) -> float:
    """Return the median seconds in which the host enqueues a call, while the queue of the device is short."""
    durations = []
    for _ in range(-(-calls // HOST_GROUP)):
        synchronize(device)
        for _ in range(min(calls, HOST_GROUP)):
            start = time.perf_counter()
            call()
            durations.append(time.perf_counter() - start)
    synchronize(device)
    return statistics.median(durations)


def capture(call: Call) -> Call:
    """Return the replay of a call as a CUDA graph.

    It captures the current stream, which must not be the default one: that of `device_context`.

    Raises:
        RuntimeError: the call does something that a CUDA graph cannot hold.
    """
    for _ in range(WARM_UP_CALLS):
        call()
    graph = record(call)
    graph.replay()
    torch.cuda.current_stream().synchronize()
    replay: Call = graph.replay
    return replay


def peak_bytes(call: Call, device: torch.device) -> int:
    """Return the bytes of GPU memory that a call takes and frees again, on top of all that is in use."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@contextmanager
def precision(name: Precision, device: torch.device) -> Iterator[None]:
    """Return a context in which matrix products and convolutions have a precision."""
    if name == "bfloat16":
        # Copies of the weights are not kept: a CUDA graph could not tell when they change.
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            yield
        return
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    _set_tf32(name == "TF32", name == "TF32")
    try:
        yield
    finally:
        _set_tf32(*before)


def _set_tf32(matmul: bool, convolutions: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolutions


def start_profiler(device: torch.device) -> None:
    """Start the library behind the profiler: it sees the kernels only of graphs that are captured later."""
    with profile(activities=[_activity(device)]):
        synchronize(device)


def profile_call(call: Call, device: torch.device, calls: int) -> Activity:
    """Return what the device does in a call; copies and fills count as kernels.

    On a CPU, the operators of torch count as kernels, and those that call others count twice.
    """
    call()
    synchronize(device)
    with profile(activities=[_activity(device)]) as profiler:
        for _ in range(calls):
            call()
        synchronize(device)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    events = [
        event
        for event in profiler.events() or ()
        if event.device_type == kind and not getattr(event, "is_user_annotation", False)
    ]
    seconds = sum(event.time_range.elapsed_us() for event in events) / 1e6
    return Activity(len(events) / calls, seconds / calls)


def _activity(device: torch.device) -> ProfilerActivity:
    return ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU


def _clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
