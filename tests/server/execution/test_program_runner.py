"""Program runner: rows at different steps share calls, end when they should, and never mix."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from samovar import noise
from server.core.request import Admission, Request
from server.core.spec import GraphSpec, StepSchedule, TensorSpec
from server.execution.device_operations import CpuOperations
from server.execution.program_runner import ProgramRunner
from server.execution.readout import Readout
from server.runtime import Device, OnnxGraph
from tests.support import programs
from tests.support.device_operations import OPERATIONS
from tests.support.programs import admit, new_runner, request


@pytest.fixture(params=list(OPERATIONS.values()), ids=list(OPERATIONS))
def operations(request: pytest.FixtureRequest) -> CpuOperations:
    """Operations of a CPU, and of a device that works asynchronously."""
    created: CpuOperations = request.param()
    return created


def run(runner: ProgramRunner) -> list[Readout]:
    """Advance until no row is left, and return the readouts of finished rows."""
    readouts: list[Readout] = []
    while runner.num_active:
        readouts += runner.advance().wait()
    return [readout for readout in readouts if readout.is_finished]


def expected_walk(queued: Request, index: int) -> np.ndarray:
    """Return the result of a row's walk, from the noise of the seed contract."""
    total = np.zeros(2, np.float32)
    for step in range(queued.steps):
        seed = np.array([queued.seed], np.uint64)
        drawn = noise.normal(seed, np.array([index]), np.array([step]), programs.NOISE.stream, (2,))[0]
        total = total + np.float32(queued.parameters["scale"]) * drawn + np.float32(step)
    return total


def test_rows_of_different_lengths_and_parameters_share_calls_without_mixing(
    operations: CpuOperations,
) -> None:
    runner = new_runner(operations=operations)
    queued = [
        request(rows=2, steps=steps, seed=steps, first_row=10 * steps, parameters={"scale": steps / 2})
        for steps in (5, 1, 3)
    ]
    admit(runner, *queued)
    finished = run(runner)
    assert [readout.request for readout in finished] == [queued[1], queued[2], queued[0]]
    for readout in finished:
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, expected_walk(readout.request, index), atol=1e-5)


def test_turn_takes_several_steps_until_a_row_ends(operations: CpuOperations) -> None:
    runner = new_runner(operations=operations)
    short, long = request(steps=3, seed=1), request(steps=9, seed=2)
    admit(runner, short, long)
    results = []
    while runner.num_active:
        result = runner.advance(max_steps=4)
        results.append((result.steps, result.wait()))
    assert [steps for steps, _ in results] == [3, 4, 2]
    for readout in (readout for _, readouts in results for readout in readouts):
        assert np.allclose(readout.rows.outputs["value"][0], expected_walk(readout.request, 0), atol=1e-5)


def test_turn_with_previews_takes_one_step(operations: CpuOperations) -> None:
    runner = new_runner(operations=operations)
    admit(runner, request(steps=3, preview_every=2))
    assert runner.advance(max_steps=4).steps == 1


def test_row_that_joins_late_starts_at_step_zero(operations: CpuOperations) -> None:
    runner = new_runner(operations=operations)
    early, late = request(steps=4, seed=1), request(steps=4, seed=2)
    admit(runner, early)
    runner.advance()
    admit(runner, late)
    for readout in run(runner):
        assert np.allclose(readout.rows.outputs["value"][0], expected_walk(readout.request, 0), atol=1e-5)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_drop_leaves_other_requests_unchanged(dropped: int, operations: CpuOperations) -> None:
    runner = new_runner(operations=operations)
    queued = [request(rows=2, steps=4, seed=seed) for seed in range(3)]
    admit(runner, *queued)
    runner.advance()
    assert runner.drop(queued[dropped]) == 2
    finished = run(runner)
    assert {readout.request for readout in finished} == set(queued) - {queued[dropped]}
    for readout in finished:
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, expected_walk(readout.request, index), atol=1e-5)


def test_inputs_apply_to_their_own_row_or_to_all_rows(operations: CpuOperations) -> None:
    starts = np.arange(6, dtype=np.float32).reshape(3, 2)
    runner = new_runner(operations=operations)
    own = request(rows=3, steps=1, parameters={"scale": 0.0}, inputs={"start": starts})
    shared = request(rows=3, steps=1, parameters={"scale": 0.0}, inputs={"start": starts[1:2]})
    runner.admit([Admission(own, 0, 2)])
    runner.admit([Admission(own, 2, 1)])
    runner.admit([Admission(shared, 0, 3)])
    values = {readout.request: readout.rows.outputs["value"] for readout in run(runner)}
    assert np.array_equal(values[own], starts)
    assert np.array_equal(values[shared], np.repeat(starts[1:2], 3, 0))


def test_slot_keeps_no_state_of_its_last_row(operations: CpuOperations) -> None:
    runner = new_runner(dataclasses.replace(programs.WALK, init=None), operations=operations)
    first, second = request(steps=2, seed=1), request(steps=2, seed=1)
    admit(runner, first)
    before = run(runner)[0].rows.outputs["value"]
    admit(runner, second)
    assert np.array_equal(run(runner)[0].rows.outputs["value"], before)


def test_program_without_steps_is_read_out_at_once(operations: CpuOperations) -> None:
    runner = new_runner(programs.ECHO, operations=operations)
    starts = np.ones((2, 2), np.float32)
    admit(runner, request(rows=2, steps=0, inputs={"start": starts}))
    (readout,) = runner.advance().wait()
    assert np.array_equal(readout.rows.outputs["value"], starts)
    assert runner.num_active == 0


def test_row_with_done_flag_ends_early(operations: CpuOperations) -> None:
    done = TensorSpec("done", "bool")
    walk = GraphSpec(
        "until", (*programs.WALK.step.inputs, done) if programs.WALK.step else (), (programs.TOTAL, done)
    )
    begin = GraphSpec("begin", (programs.START.tensor,), (programs.TOTAL, done))
    spec = dataclasses.replace(
        programs.WALK,
        init=begin,
        step=walk,
        state=(programs.TOTAL, done),
        steps=StepSchedule(parameter="steps", done_flag="done"),
    )

    def start(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [inputs[0].clone(), torch.zeros(len(inputs[0]), dtype=torch.bool)]

    def until_far(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs[:4])
        return [total, total.abs().amax(1) > 4]

    runner = new_runner(spec, {**programs.GRAPHS, "begin": start, "until": until_far}, operations=operations)
    admit(runner, request(rows=8, steps=100, parameters={"scale": 2.0}))
    finished = run(runner)
    lengths = [steps for readout in finished for steps in readout.steps_done]
    assert len(lengths) == 8
    assert len(set(lengths)) > 1
    assert max(lengths) < 100
    assert all(np.abs(readout.rows.outputs["value"]).max(1).min() > 4 for readout in finished)


def test_calls_are_padded_to_the_smallest_sufficient_bucket() -> None:
    sizes = []

    def watched(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes.append(len(inputs[0]))
        return programs.walk(inputs)

    runner = new_runner(graphs={**programs.GRAPHS, "walk": watched}, buckets=(2, 8))
    for rows in (1, 2, 3, 8):
        admit(runner, request(rows=rows, steps=1))
        run(runner)
    assert sizes == [2, 2, 8, 8]


def test_preview_reads_out_due_rows_and_changes_no_state(operations: CpuOperations) -> None:
    sizes = []

    def watched(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes.append(len(inputs[0]))
        return programs.identity(inputs)

    runner = new_runner(graphs={**programs.GRAPHS, "end": watched}, operations=operations)
    seen = request(rows=2, steps=5, seed=1, preview_every=2)
    others = [request(rows=2, steps=steps, seed=seed) for seed, steps in ((2, 6), (3, 3), (4, 6))]
    for one in (others[0], seen, *others[1:]):
        admit(runner, one)
    readouts = [readout for _ in range(6) for readout in runner.advance().wait()]
    previews = [readout for readout in readouts if not readout.is_finished]
    assert [(readout.request, readout.steps_done) for readout in previews] == [(seen, [2, 2]), (seen, [4, 4])]
    assert sizes == [2, 2, 2, 2, 4]
    for readout in readouts:
        so_far = dataclasses.replace(readout.request, steps=readout.steps_done[0])
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, expected_walk(so_far, index), atol=1e-5)


def test_padding_rows_are_never_read_out(operations: CpuOperations) -> None:
    def nan_in_padding(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        total[3:] = torch.nan
        return [total]

    runner = new_runner(
        graphs={**programs.GRAPHS, "walk": nan_in_padding}, buckets=(8,), operations=operations
    )
    admit(runner, request(rows=3, steps=4))
    assert all(readout.is_finite for readout in run(runner))
    admit(runner, request(rows=1, steps=1))
    assert all(readout.is_finite for readout in run(runner))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_nonfinite_state_is_detected_behind_integer_outputs(number: float, operations: CpuOperations) -> None:
    def level(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [inputs[0].nan_to_num().clamp(-9, 9).to(torch.int64)]

    end = dataclasses.replace(programs.WALK.readout, outputs=(TensorSpec("value", "int64", (2,)),))
    runner = new_runner(
        dataclasses.replace(programs.WALK, readout=end),
        {**programs.GRAPHS, "end": level},
        operations=operations,
    )
    fine, broken = (
        request(
            steps=2,
            parameters={"scale": 1.0},
            inputs={"start": np.array([[0, start]], np.float32)},
        )
        for start in (0.0, number)
    )
    admit(runner, fine)
    admit(runner, broken)
    assert {readout.request: readout.is_finite for readout in run(runner)} == {fine: True, broken: False}


def test_admit_of_more_rows_than_slots_is_a_bug() -> None:
    runner = new_runner(buckets=(4,))
    with pytest.raises(AssertionError, match="This is a bug"):
        admit(runner, request(rows=5))


def memory_hungry_graph(path: Path, spec: GraphSpec) -> OnnxGraph:
    """Return an identity graph that needs rows ** 23 floats of memory."""
    total = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["rows", 2]) for name in "xy"]
    nodes = [
        onnx.helper.make_node("Shape", ["x"], ["shape"], end=1),
        onnx.helper.make_node("Pow", ["shape", "power"], ["size"]),
        onnx.helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        onnx.helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        onnx.helper.make_node("Add", ["x", "zero"], ["y"]),
    ]
    power = onnx.helper.make_tensor("power", onnx.TensorProto.INT64, [1], [23])
    graph = onnx.helper.make_graph(nodes, "greedy", total[:1], total[1:], [power])
    opset = onnx.helper.make_opsetid("", 17)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), path)
    return OnnxGraph(path, spec, Device())


def test_batch_that_onnx_runtime_cannot_allocate_is_halved(tmp_path: Path) -> None:
    x = dataclasses.replace(programs.TOTAL, name="x")
    grow = GraphSpec("grow", (x,), (x,))
    start = GraphSpec("begin", (programs.START.tensor,), (x,))
    end = GraphSpec("end", (x,), programs.WALK.readout.outputs)
    spec = dataclasses.replace(programs.WALK, init=start, step=grow, readout=end, state=(x,), noise=())
    runner = new_runner(
        spec, {**programs.GRAPHS, "grow": memory_hungry_graph(tmp_path / "grow.onnx", grow)}, (1, 2, 3, 4)
    )
    starts = np.arange(8, dtype=np.float32).reshape(4, 2)
    admit(runner, request(rows=4, steps=2, inputs={"start": starts}))
    result = runner.advance()
    assert result.num_oom == 1
    (finished,) = run(runner)
    assert np.array_equal(finished.rows.outputs["value"], starts)
