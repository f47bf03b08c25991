"""Programs over slots: rows of any age share calls, end when they should, and never mix."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from samovar import noise
from server.core.request import Request, RowInputs
from server.core.spec import GraphSpec, StepSchedule, TensorSpec
from server.execution.program_runner import ProgramRunner, Readout
from server.runtime import Device, OnnxGraph
from tests.support import programs
from tests.support.programs import request


def run(program: ProgramRunner) -> list[Readout]:
    """Advance until no row is left; the finished readouts."""
    readouts = []
    while program.slots.num_active:
        readouts += program.advance()
    return [readout for readout in readouts if readout.is_finished]


def walked(asked: Request, index: int) -> np.ndarray:
    """What the walk of a row must come to, from the noise that the seed contract names."""
    total = np.zeros(2, np.float32)
    for step in range(asked.steps):
        seed = np.array([asked.seed], np.uint64)
        drawn = noise.normal(seed, np.array([index]), np.array([step]), programs.NOISE.stream, (2,))[0]
        total = total + np.float32(asked.inputs.parameters["scale"]) * drawn + np.float32(step)
    return total


def test_rows_of_different_lengths_and_parameters_share_calls_and_do_not_mix() -> None:
    program = programs.program()
    asked = [
        request(rows=2, steps=steps, seed=steps, first_row=10 * steps, parameters={"scale": steps / 2})
        for steps in (5, 1, 3)
    ]
    for one in asked:
        program.slots.admit(one, 0, 2)
    finished = run(program)
    assert [readout.request for readout in finished] == [asked[1], asked[2], asked[0]]
    for readout in finished:
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, walked(readout.request, index), atol=1e-5)


def test_a_row_that_joins_late_starts_at_step_zero() -> None:
    program = programs.program()
    early, late = request(steps=4, seed=1), request(steps=4, seed=2)
    program.slots.admit(early, 0, 1)
    program.advance()
    program.slots.admit(late, 0, 1)
    for readout in run(program):
        assert np.allclose(readout.rows.outputs["value"][0], walked(readout.request, 0), atol=1e-5)


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropping_a_request_leaves_its_neighbours_alone(dropped: int) -> None:
    program = programs.program()
    asked = [request(rows=2, steps=4, seed=seed) for seed in range(3)]
    for one in asked:
        program.slots.admit(one, 0, 2)
    program.advance()
    assert program.slots.drop(asked[dropped]) == 2
    finished = run(program)
    assert {readout.request for readout in finished} == set(asked) - {asked[dropped]}
    for readout in finished:
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, walked(readout.request, index), atol=1e-5)


def test_inputs_go_to_their_own_rows_or_to_all() -> None:
    starts = np.arange(6, dtype=np.float32).reshape(3, 2)
    program = programs.program()
    own = request(rows=3, steps=1, inputs=RowInputs({"steps": 1, "scale": 0.0}, {"start": starts}))
    shared = request(rows=3, steps=1, inputs=RowInputs({"steps": 1, "scale": 0.0}, {"start": starts[1:2]}))
    program.slots.admit(own, 0, 2)
    program.slots.admit(own, 2, 1)
    program.slots.admit(shared, 0, 3)
    values = {readout.request: readout.rows.outputs["value"] for readout in run(program)}
    assert np.array_equal(values[own], starts)
    assert np.array_equal(values[shared], np.repeat(starts[1:2], 3, 0))


def test_slots_do_not_remember_their_last_row() -> None:
    program = programs.program(dataclasses.replace(programs.WALK, init=None))
    first, second = request(steps=2, seed=1), request(steps=2, seed=1)
    program.slots.admit(first, 0, 1)
    before = run(program)[0].rows.outputs["value"]
    program.slots.admit(second, 0, 1)
    assert np.array_equal(run(program)[0].rows.outputs["value"], before)


def test_a_program_without_steps_reads_out_at_once() -> None:
    program = programs.program(programs.ECHO)
    starts = np.ones((2, 2), np.float32)
    program.slots.admit(request(rows=2, steps=0, inputs=RowInputs({}, {"start": starts})), 0, 2)
    (readout,) = program.advance()
    assert np.array_equal(readout.rows.outputs["value"], starts)
    assert program.slots.num_active == 0


def test_a_row_that_says_it_is_done_ends_early() -> None:
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

    program = programs.program(spec, {**programs.GRAPHS, "begin": start, "until": until_far})
    program.slots.admit(request(rows=8, steps=100, parameters={"scale": 2.0}), 0, 8)
    finished = run(program)
    lengths = [steps for readout in finished for steps in readout.steps_done]
    assert len(lengths) == 8
    assert len(set(lengths)) > 1
    assert max(lengths) < 100
    assert all(np.abs(readout.rows.outputs["value"]).max(1).min() > 4 for readout in finished)


def test_calls_are_padded_to_the_smallest_bucket_that_holds_them() -> None:
    sizes = []

    def watched(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes.append(len(inputs[0]))
        return programs.walk(inputs)

    program = programs.program(graphs={**programs.GRAPHS, "walk": watched}, buckets=(2, 8))
    for rows in (1, 2, 3, 8):
        program.slots.admit(request(rows=rows, steps=1), 0, rows)
        run(program)
    assert sizes == [2, 2, 8, 8]


def test_a_preview_reads_out_the_rows_that_are_due_and_changes_none() -> None:
    sizes = []

    def watched(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        sizes.append(len(inputs[0]))
        return programs.identity(inputs)

    program = programs.program(graphs={**programs.GRAPHS, "end": watched})
    seen = request(rows=2, steps=5, seed=1, preview_every=2)
    others = [request(rows=2, steps=steps, seed=seed) for seed, steps in ((2, 6), (3, 3), (4, 6))]
    for one in (others[0], seen, *others[1:]):
        program.slots.admit(one, 0, 2)
    readouts = [readout for _ in range(6) for readout in program.advance()]
    previews = [readout for readout in readouts if not readout.is_finished]
    assert [(readout.request, readout.steps_done) for readout in previews] == [(seen, [2, 2]), (seen, [4, 4])]
    assert sizes == [2, 2, 2, 2, 4]
    for readout in readouts:
        so_far = dataclasses.replace(readout.request, steps=readout.steps_done[0])
        for index, value in zip(readout.rows.indices, readout.rows.outputs["value"], strict=True):
            assert np.allclose(value, walked(so_far, index), atol=1e-5)


def test_padding_never_reaches_anybody() -> None:
    def poisons_padding(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        total[3:] = torch.nan
        return [total]

    program = programs.program(graphs={**programs.GRAPHS, "walk": poisons_padding}, buckets=(8,))
    program.slots.admit(request(rows=3, steps=4), 0, 3)
    assert all(readout.is_finite for readout in run(program))
    program.slots.admit(request(rows=1, steps=1), 0, 1)
    assert all(readout.is_finite for readout in run(program))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_no_integer_hides_a_state_that_is_not_finite(number: float) -> None:
    def level(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [inputs[0].nan_to_num().clamp(-9, 9).to(torch.int64)]

    end = dataclasses.replace(programs.WALK.readout, outputs=(TensorSpec("value", "int64", (2,)),))
    program = programs.program(
        dataclasses.replace(programs.WALK, readout=end), {**programs.GRAPHS, "end": level}
    )
    fine, broken = (
        request(
            steps=2,
            inputs=RowInputs({"steps": 2, "scale": 1.0}, {"start": np.array([[0, start]], np.float32)}),
        )
        for start in (0.0, number)
    )
    program.slots.admit(fine, 0, 1)
    program.slots.admit(broken, 0, 1)
    assert {readout.request: readout.is_finite for readout in run(program)} == {fine: True, broken: False}


def test_more_rows_than_slots_is_a_bug() -> None:
    program = programs.program(buckets=(4,))
    with pytest.raises(AssertionError, match="This is a bug"):
        program.slots.admit(request(rows=5), 0, 5)


def greedy(path: Path, spec: GraphSpec) -> OnnxGraph:
    """A graph that leaves its input as it is, but needs rows ** 23 floats of memory for it."""
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


def test_the_memory_that_onnx_runtime_lacks_is_asked_for_by_halves(tmp_path: Path) -> None:
    x = dataclasses.replace(programs.TOTAL, name="x")
    grow = GraphSpec("grow", (x,), (x,))
    start = GraphSpec("begin", (programs.START.tensor,), (x,))
    end = GraphSpec("end", (x,), programs.WALK.readout.outputs)
    spec = dataclasses.replace(programs.WALK, init=start, step=grow, readout=end, state=(x,), noise=())
    program = programs.program(
        spec, {**programs.GRAPHS, "grow": greedy(tmp_path / "grow.onnx", grow)}, (1, 2, 3, 4)
    )
    starts = np.arange(8, dtype=np.float32).reshape(4, 2)
    program.slots.admit(request(rows=4, steps=2, inputs=RowInputs({"steps": 2}, {"start": starts})), 0, 4)
    (finished,) = run(program)
    assert np.array_equal(finished.rows.outputs["value"], starts)
    assert program.pop_oom_count() == 1
