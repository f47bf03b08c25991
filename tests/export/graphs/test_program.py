"""Programs: arguments are bound by name, and inconsistent definitions are rejected with a reason."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor, nn

from export.graphs import graph
from export.graphs.program import (
    Input,
    Noise,
    Parameter,
    Program,
    ProgramError,
    Score,
    Steps,
    TensorSpec,
    argument_names,
)


class Walk(nn.Module):
    def forward(self, position: Tensor, kick: Tensor, scale: Tensor, step_index: Tensor) -> Tensor:
        return position + kick * scale + step_index


class Read(nn.Module):
    def forward(self, position: Tensor) -> Tensor:
        return position * 1


class Jump(nn.Module):
    def forward(self, kick: Tensor) -> Tensor:
        return kick * 1


class VariableArguments(nn.Module):
    def forward(self, *position: Tensor) -> Tensor:
        return position[0]


POSITION = TensorSpec("position")
PROGRAM = Program(
    operation="sample",
    step=Walk(),
    readout=Read(),
    outputs=(TensorSpec("place"),),
    doc="A random walk.",
    state=(POSITION,),
    steps=Steps(parameter="length"),
    parameters=(
        Parameter("length", "integer", 4, 1, 9),
        Parameter("scale", "float", 1, 0, 2),
    ),
    noise=(Noise("kick", "normal", (), 0),),
)


def test_argument_names_are_those_of_forward() -> None:
    assert argument_names(Walk()) == ("position", "kick", "scale", "step_index")


def test_scope_has_typed_scalar_for_each_parameter() -> None:
    assert PROGRAM.scope["length"].dtype == "int64"
    assert PROGRAM.scope["scale"].dtype == "float32"
    assert PROGRAM.scope["num_steps"] == TensorSpec("num_steps", "int64")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: replace(PROGRAM, init=Jump()), "'kick' is read by 2 modules"),
        (
            lambda: replace(PROGRAM, noise=()),
            "unknown argument 'kick' of step Walk; expected one of: position, ",
        ),
        (lambda: replace(PROGRAM, inputs=(Input(POSITION),)), "'position' is used twice"),
        (lambda: replace(PROGRAM, outputs=PROGRAM.outputs * 2), "'place' is used twice"),
        (lambda: replace(PROGRAM, noise=(*PROGRAM.noise, Noise("b", "uniform", (), 0))), "share stream 0"),
        (lambda: replace(PROGRAM, operation="dream"), "unknown operation 'dream'; expected one of: sample, "),
        (lambda: replace(PROGRAM, variant="No"), "variant: expected a lower-case letter .*, got 'No'"),
        (lambda: replace(PROGRAM, outputs=()), "at least one output"),
        (lambda: replace(PROGRAM, steps=None), "expected both step and steps"),
        (
            lambda: replace(PROGRAM, steps=Steps(parameter="scale")),
            "expected an integer parameter, got 'scale'; the integer parameters are: length",
        ),
        (lambda: replace(PROGRAM, steps=Steps(fixed=3, parameter="length")), "either fixed or a parameter"),
        (
            lambda: replace(PROGRAM, steps=Steps(fixed=3, done_flag="position")),
            "expected a boolean scalar of the state, got 'position'",
        ),
        (lambda: replace(PROGRAM, operation="score"), "score: expected a Score .*, got None for score"),
        (lambda: replace(PROGRAM, readout=VariableArguments()), "named positional arguments only"),
        (
            lambda: replace(PROGRAM, operation="score", score=Score("exact", 1, "real numbers", "nats")),
            "score: unknown output 'nats'; expected one of: place",
        ),
        (
            lambda: replace(
                PROGRAM,
                operation="score",
                score=Score("exact", 1, "real numbers", "place", draws_parameter="draws"),
            ),
            "unknown parameter 'draws'; expected one of: length, scale",
        ),
    ],
)
def test_program_rejects_inconsistent_definition(change: Callable[[], Program], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        change()


def test_parameter_rejects_default_outside_bounds() -> None:
    with pytest.raises(ProgramError, match="'scale': expected a default between 0 and 1, got 2"):
        Parameter("scale", "float", 2, 0, 1)


def test_collect_returns_one_graph_for_module_of_two_programs() -> None:
    read = Read()
    decode = Program("decode", read, (TensorSpec("place"),), "Read.", inputs=(Input(POSITION),))
    graphs = graph.collect([decode, replace(PROGRAM, readout=read)])
    assert [entry.name for entry in graphs] == ["decode", "sample_step"]


def test_collect_rejects_module_used_with_different_tensors() -> None:
    read = Read()
    wide = TensorSpec("position", shape=(2,))
    decode = Program("decode", read, (TensorSpec("place"),), "Read.", inputs=(Input(wide),))
    with pytest.raises(ProgramError, match="different tensors"):
        graph.collect([decode, replace(PROGRAM, readout=read)])
