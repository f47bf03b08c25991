"""The interpreter: the noise that a row draws, its number of steps, and its early exit."""

import numpy as np
import torch
from torch import Tensor, nn

from export.artifacts.interpreter import Rows, Tensors, concatenate_rows, eager_interpreter, make_rows
from export.graphs.program import DataSpec, Noise, Parameter, Program, Steps, TensorSpec
from samovar import noise


class Start(nn.Module):
    def forward(self, push: Tensor) -> tuple[Tensor, Tensor]:
        return push.clone(), torch.zeros_like(push, dtype=torch.bool)


class Sum(nn.Module):
    """Adds the noise of each step; ends early after `limit` steps."""

    def forward(
        self, total: Tensor, ended: Tensor, kick: Tensor, limit: Tensor, step_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        return total + kick, step_index + 1 >= limit


class Finish(nn.Module):
    def forward(
        self, total: Tensor, catch: Tensor, step_index: Tensor, num_steps: Tensor
    ) -> tuple[Tensor, ...]:
        return total + catch, step_index, num_steps


TOTAL = TensorSpec("total")
PROGRAM = Program(
    operation="sample",
    init=Start(),
    step=Sum(),
    readout=Finish(),
    outputs=(TensorSpec("sum"), TensorSpec("done", "int64"), TensorSpec("planned", "int64")),
    doc="Adds noise.",
    state=(TOTAL, TensorSpec("ended", "bool")),
    steps=Steps(parameter="draws", units_per_step=10, done_flag="ended"),
    parameters=(Parameter("draws", "integer", 25, 1, 99), Parameter("limit", "integer", 99, 1, 99)),
    noise=(Noise("push", "normal", (), 2), Noise("kick", "normal", (), 3), Noise("catch", "normal", (), 4)),
)
INTERPRETER = eager_interpreter(DataSpec("vector", TOTAL), (PROGRAM,))
MESSAGE = INTERPRETER.program("sample")


def run(rows: Rows) -> Tensors:
    return INTERPRETER.run("sample", rows)


def expected_sum(seed: int, row: int, steps: int) -> np.float32:
    """Sum of push at step 0, one kick at each step, and catch at the number of completed steps."""
    draws = [(2, 0), *((3, step) for step in range(steps)), (4, steps)]
    key = np.array([seed], np.uint64), np.array([row])
    return np.float32(sum(noise.normal(*key, np.array([step]), stream, ())[0] for stream, step in draws))


def test_interpreter_draws_noise_of_each_call_at_its_own_step() -> None:
    """Step 0 in init, step_index in step, the number of completed steps in readout."""
    outputs = run(make_rows(MESSAGE, 5, [7]))
    np.testing.assert_allclose(outputs["sum"], expected_sum(5, 7, 3), rtol=1e-6)


def test_num_steps_is_parameter_over_units_rounded_up() -> None:
    rows = concatenate_rows([make_rows(MESSAGE, 0, [0], {"draws": draws}) for draws in (1, 10, 11, 30, 31)])
    assert run(rows)["planned"].tolist() == [1, 1, 2, 3, 4]


def test_interpreter_ends_row_when_done_flag_is_set() -> None:
    outputs = run(make_rows(MESSAGE, 5, [7], {"limit": 2}))
    assert (outputs["done"].tolist(), outputs["planned"].tolist()) == ([2], [3])
    np.testing.assert_allclose(outputs["sum"], expected_sum(5, 7, 2), rtol=1e-6)


def test_interpreter_runs_rows_of_different_lengths_in_one_batch() -> None:
    batches = [make_rows(MESSAGE, seed, [seed], {"draws": 7 * seed}) for seed in range(1, 9)]
    together = run(concatenate_rows(batches))["sum"]
    np.testing.assert_array_equal(together, np.concatenate([run(batch)["sum"] for batch in batches]))


def test_program_without_init_starts_with_zeros() -> None:
    class Count(nn.Module):
        def forward(self, count: Tensor) -> Tensor:
            return count + 1

    class Show(nn.Module):
        def forward(self, count: Tensor) -> Tensor:
            return count * 1

    count = TensorSpec("count", "int64", (2,))
    program = Program(
        "sample", Show(), (count,), "Count.", step=Count(), state=(count,), steps=Steps(fixed=3)
    )
    interpreter = eager_interpreter(DataSpec("vector", count), (program,))
    outputs = interpreter.run("sample", make_rows(interpreter.program("sample"), 0, range(2)))
    assert outputs["count"].tolist() == [[3, 3], [3, 3]]
