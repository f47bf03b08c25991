"""The replay: which numbers a row draws, how many steps it takes, when it ends."""

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
    """Adds the noise of each step; ends after `limit` steps, whatever was asked for."""

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


def play(rows: Rows) -> Tensors:
    return INTERPRETER.run("sample", rows)


INTERPRETER = eager_interpreter(DataSpec("vector", TOTAL), (PROGRAM,))
MESSAGE = INTERPRETER.program("sample")


def drawn(seed: int, row: int, steps: int) -> np.float32:
    """What a row of so many steps adds up: push at step 0, a kick each step, catch at the steps done."""
    draws = [(2, 0), *((3, step) for step in range(steps)), (4, steps)]
    where = np.array([seed], np.uint64), np.array([row])
    return np.float32(sum(noise.normal(*where, np.array([step]), stream, ())[0] for stream, step in draws))


def test_each_call_draws_at_its_own_step() -> None:
    """Step 0 in init, step_index in step, the steps done in readout."""
    answer = play(make_rows(MESSAGE, 5, [7]))
    np.testing.assert_allclose(answer["sum"], drawn(5, 7, 3), rtol=1e-6)


def test_steps_are_units_rounded_up() -> None:
    rows = concatenate_rows([make_rows(MESSAGE, 0, [0], {"draws": draws}) for draws in (1, 10, 11, 30, 31)])
    assert play(rows)["planned"].tolist() == [1, 1, 2, 3, 4]


def test_a_row_ends_when_it_says_so() -> None:
    answer = play(make_rows(MESSAGE, 5, [7], {"limit": 2}))
    assert (answer["done"].tolist(), answer["planned"].tolist()) == ([2], [3])
    np.testing.assert_allclose(answer["sum"], drawn(5, 7, 2), rtol=1e-6)


def test_rows_of_all_lengths_share_a_batch() -> None:
    parts = [make_rows(MESSAGE, seed, [seed], {"draws": 7 * seed}) for seed in range(1, 9)]
    together = play(concatenate_rows(parts))["sum"]
    np.testing.assert_array_equal(together, np.concatenate([play(part)["sum"] for part in parts]))


def test_without_init_the_state_starts_as_zeros() -> None:
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
    answer = interpreter.run("sample", make_rows(interpreter.program("sample"), 0, range(2)))
    assert answer["count"].tolist() == [[3, 3], [3, 3]]
