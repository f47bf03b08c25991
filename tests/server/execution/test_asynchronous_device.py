"""Rows on a device that works asynchronously have the bytes that they have on a CPU."""

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.core.request import Admission, Request
from server.core.spec import GraphSpec, StepSchedule, TensorSpec
from server.execution.device_operations import CpuOperations
from server.execution.noise.device import check_kernel
from server.execution.program_runner import ProgramRunner
from server.execution.readout import StepResult
from tests.support import programs
from tests.support.device_operations import OPERATIONS, draw_on_device
from tests.support.programs import INDEX, TOTAL, new_runner, request

Tensors = Sequence[torch.Tensor]
CAPACITY = 8

DONE = TensorSpec("done", "bool")
# A walk that ends when it is far from its start. The index of its last step is in the readout.
UNTIL = dataclasses.replace(
    programs.WALK,
    init=GraphSpec("begin", (programs.START.tensor,), (TOTAL, DONE)),
    step=GraphSpec("until", (TOTAL, INDEX, programs.SCALE.tensor, programs.NOISE.tensor), (TOTAL, DONE)),
    readout=GraphSpec("end", (TOTAL, INDEX), (TensorSpec("value", "float32", (3,)),)),
    state=(TOTAL, DONE),
    steps=StepSchedule(parameter="steps", done_flag="done"),
)


def begin(inputs: Tensors) -> Tensors:
    return [inputs[0].clone(), torch.zeros(len(inputs[0]), dtype=torch.bool)]


def until_far(inputs: Tensors) -> Tensors:
    (total,) = programs.walk(inputs)
    return [total, total.abs().amax(1) > 6]


def end(inputs: Tensors) -> Tensors:
    total, index = inputs
    return [torch.cat([total, index[:, None].float()], 1)]


GRAPHS = {"begin": begin, "until": until_far, "end": end}


def run(queued: Sequence[Request], operations: CpuOperations) -> dict[tuple[int, int], bytes]:
    """Compute requests in order of their arrival, one joining at each step, with one step in flight.

    Returns the bytes of every row, by the request's position and the row's index.
    """
    runner = new_runner(UNTIL, GRAPHS, operations=operations)
    waiting, found = deque(queued), dict[tuple[int, int], bytes]()
    in_flight: deque[StepResult] = deque()
    while waiting or runner.num_active or in_flight:
        if waiting and runner.num_active + waiting[0].rows <= CAPACITY:
            joining = waiting.popleft()
            runner.admit([Admission(joining, 0, joining.rows)])
        if runner.num_active:
            in_flight.append(runner.advance())
        if in_flight and (len(in_flight) > 1 or not runner.num_active):
            found |= _rows(in_flight.popleft(), queued)
    return found


def _rows(result: StepResult, queued: Sequence[Request]) -> dict[tuple[int, int], bytes]:
    return {
        (queued.index(readout.request), index): value.tobytes()
        for readout in result.wait()
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True)
    }


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "cpu"])
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**64 - 1)), min_size=1))
def test_rows_that_end_early_have_the_same_bytes(name: str, shapes: list[tuple[int, int, int]]) -> None:
    queued = [request(rows=rows, steps=steps, seed=seed) for rows, steps, seed in shapes]
    expected = run(queued, CpuOperations())
    assert len(expected) == sum(rows for rows, _, _ in shapes)
    assert run(queued, OPERATIONS[name]()) == expected


def test_dropped_rows_do_not_end_others_early() -> None:
    """The done flags of a step arrive after other rows have taken the slots of dropped ones."""
    runner = new_runner(UNTIL, GRAPHS, operations=OPERATIONS["asynchronous"]())
    far = {"start": np.full((1, 2), 5.9, np.float32)}
    leaving = request(rows=4, steps=50, parameters={"scale": 0.0}, inputs=far)
    staying = request(rows=4, steps=3, seed=3, parameters={"scale": 0.0})
    runner.admit([Admission(leaving, 0, 4)])
    runner.advance()
    late = runner.advance()
    runner.drop(leaving)
    runner.admit([Admission(staying, 0, 4)])
    late.wait()
    assert _finish(runner) == {staying: [3] * 4}


def _finish(runner: ProgramRunner) -> dict[Request, list[int]]:
    """Advance until no row is left; return the steps that the rows of each request have taken."""
    finished: dict[Request, list[int]] = {}
    while runner.num_active:
        for readout in runner.advance().wait():
            finished.setdefault(readout.request, []).extend(readout.steps_done)
    return finished


def test_graph_that_cannot_be_captured_runs_kernel_by_kernel(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch without CUDA cannot capture anything."""
    runner, plain = new_runner(), new_runner()
    runner.use_cuda_graphs(True)
    values = []
    for each in (runner, plain):
        each.admit([Admission(request(rows=3, steps=2, seed=1), 0, 3)])
        each.advance()
        (readout,) = each.advance().wait()
        values.append(readout.rows.outputs["value"].tobytes())
    assert values[0] == values[1]
    assert not runner.uses_cuda_graphs
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "walk runs kernel by kernel, not as a CUDA graph"
    ]


def test_kernel_with_the_numbers_of_the_host_is_accepted() -> None:
    check_kernel(draw_on_device, torch.device("cpu"))


@pytest.mark.parametrize("error", [1e-6, 1.0])
def test_kernel_with_other_numbers_is_rejected(error: float) -> None:
    def draw(*arguments: torch.Tensor) -> None:
        draw_on_device(*arguments)  # type: ignore[arg-type]
        arguments[-1][2, 4] += error

    draw_other: Callable[..., None] = draw
    with pytest.raises(RuntimeError, match="uniform numbers differ from the host's by"):
        check_kernel(draw_other, torch.device("cpu"))
