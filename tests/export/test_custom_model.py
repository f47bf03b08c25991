"""Files of one's own: what is derived for them, and what is said of those that are not right."""

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export import custom_model
from export.__main__ import main
from export.artifacts import reader
from export.graphs import graph
from export.graphs.program import DataSpec, TensorSpec

GOOD = '''\
"""Doubling.

At length.
"""
from torch import Tensor, nn
from export.own import Input, Model, Parameter, Program, TensorSpec, Value, module

X, Y = TensorSpec("x", shape=(2,)), TensorSpec("y", shape=(2,))
FACTOR = Parameter("factor", "float", 2, 0, 10)

@module
def double(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor.unsqueeze(1)

DOUBLING = Program("encode", double, (Y,), "Doubles.", inputs=(Input(X),), parameters=(FACTOR,))
MODEL = Model(Value("vector", X), (DOUBLING,))
'''
BODY = "    return x * factor.unsqueeze(1)"


def saved(directory: Path, text: str, name: str = "My Model_2.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def refusal(path: Path, models: Path) -> str:
    with pytest.raises((custom_model.CustomModelError, graph.GraphError, reader.ArtifactError)) as caught:
        custom_model.write(path, models, formats=("torchscript",))
    assert not models.exists() or list(models.iterdir()) == []
    return str(caught.value)


def test_name_description_golden_rows_and_provenance_come_from_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, GOOD)
    manifest = reader.read(custom_model.write(path, tmp_path / "models", formats=("torchscript",)))
    assert (manifest.name, manifest.family, manifest.description) == ("my-model-2", "own", "Doubling.")
    assert manifest.provenance.settings["file_sha256"] == reader.sha256(path.read_bytes())
    assert [dict(entry.parameters) for entry in manifest.golden_rows] == [{}, {"factor": 1.0}]


def test_the_command_writes_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, models = saved(tmp_path, GOOD), tmp_path / "models"
    arguments = ["write", str(path), "--models", str(models), "--name", "pair", "--format", "torchscript"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"Wrote {models}/pair/1, verified in torchscript: encode" in said
    assert f"python -m server --models {models}" in said


def test_the_command_reports_a_bad_file_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["write", str(tmp_path / "none.py"), "--models", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("OwnFileError: ")


def test_a_module_with_dropout_and_batch_norm_is_put_to_sleep(tmp_path: Path) -> None:
    text = GOOD.replace("double, (Y,)", "Sleepy(), (Y,)").replace(
        "@module\ndef double(x: Tensor, factor: Tensor) -> Tensor:\n" + BODY,
        "class Sleepy(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))\n"
        "    def forward(self, x, factor):\n"
        "        return self.layers(x) * factor.unsqueeze(1)",
    )
    assert custom_model.write(saved(tmp_path, text), tmp_path / "models", formats=("torchscript",)).is_dir()


def test_a_file_may_import_its_neighbour(tmp_path: Path) -> None:
    saved(tmp_path, "WEIGHT = 3.0\n", "own_neighbour.py")
    text = GOOD.replace("X, Y =", "from own_neighbour import WEIGHT\nX, Y =").replace(
        "x * f", "WEIGHT * x * f"
    )
    assert custom_model.write(saved(tmp_path, text), tmp_path / "models", formats=("torchscript",)).is_dir()


@pytest.mark.parametrize(
    ("change", "instead", "message"),
    [
        ("MODEL = Model", "OTHER = Model", "expected MODEL, an export.own.Model, found none"),
        ("MODEL = Model(", "MODEL = dict(a=", "keyword argument"),
        ("MODEL = Model", "MODEL = 3\nOTHER = Model", "expected MODEL, an export.own.Model, got a int"),
        ("X, Y =", "X, Y = 1 / 0,", ":8: ZeroDivisionError: division by zero\n    line 8: X, Y = 1 / 0,"),
        ("X, Y =", "X Y =", ":8: SyntaxError: invalid syntax\n    X Y ="),
        ("@module\n", "", "no attribute 'forward'; @module makes a module of a function"),
        ('(Y,), "D', '(X, Y), "D', "double should return float32[3, 2], float32[3, 2] for x, y of 3 rows"),
        ("(x: Tensor, ", "(z: Tensor, ", "ProgramError: program 'encode': readout double takes 'z'"),
        (BODY, "    return x * factor", "RuntimeError: The size of tensor a (2) must match"),
        (BODY, BODY + " + 0 * x.new_empty(x.shape).normal_()", "double: aten.normal_.default draws random"),
        (BODY, BODY + " - x.mean(0)", "depends on the other rows of its batch"),
        (BODY, BODY + " / 0", "expected golden rows of finite numbers"),
        ("Value(\"vector\", X)", "X", "MODEL: expected a Value as its value, got a TensorSpec"),
        ("(DOUBLING,)", "[DOUBLING]", "expected a tuple of programs, got [Program("),
        ("(DOUBLING,)", "(DOUBLING, 0)", "expected programs only, got a int"),
        ("(DOUBLING,)", "DOUBLING", "expected a tuple of programs, got Program("),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(
    change: str, instead: str, message: str, tmp_path: Path
) -> None:
    assert GOOD.count(change) == 1
    said = refusal(saved(tmp_path, GOOD.replace(change, instead)), tmp_path / "models")
    assert message in said
    assert "Traceback" not in said


def test_the_line_is_found_from_a_relative_path_too(tmp_path: Path) -> None:
    saved(tmp_path, GOOD.replace(BODY, "    return x * factor"), "mine.py")
    with chdir(tmp_path):
        said = refusal(Path("mine.py"), Path("models"))
    assert said.startswith("mine.py:13: RuntimeError: ")
    assert said.endswith("line 13: return x * factor")


@pytest.mark.parametrize("name", ["none.py", "text.txt", ""])
def test_what_is_no_python_file_is_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path, GOOD, "text.txt")
    assert "expected a Python file that names its MODEL, found none" in refusal(
        tmp_path / name, tmp_path / "models"
    )


def test_drawn_inputs_keep_their_bounds() -> None:
    tokens = TensorSpec("tokens", "int64", (50,))
    value = DataSpec("tokens", tokens, vocabulary=("a", "b", "c"))
    share, label = (
        TensorSpec("share", shape=(50,), minimum=0, maximum=1),
        TensorSpec("label", "int64", (50,), 0, 9),
    )
    positive = TensorSpec("positive", shape=(50,), minimum=0)
    drawn = custom_model._draw([tokens, share, label, positive], value, seed=0)
    assert set(np.unique(drawn["tokens"])) == {0, 1, 2}
    assert set(np.unique(drawn["label"])) == set(range(10))
    assert 0 <= drawn["share"].min() < drawn["share"].max() <= 1
    assert drawn["positive"].min() == 0
    assert drawn["positive"].dtype == np.float32


def test_a_function_of_several_results_becomes_a_module() -> None:
    @custom_model.module
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1

    up, down = parts(torch.zeros(3))
    assert (up - down).tolist() == [2.0] * 3
