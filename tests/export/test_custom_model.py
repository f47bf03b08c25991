"""Custom models: defaults that come from the file, and errors that name the line."""

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

VALID = '''\
"""Doubling.

At length.
"""
from torch import Tensor, nn
from export.custom_model import DataSpec, Input, Model, Parameter, Program, TensorSpec, module

X, Y = TensorSpec("x", shape=(2,)), TensorSpec("y", shape=(2,))
FACTOR = Parameter("factor", "float", 2, 0, 10)

@module
def double(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor.unsqueeze(1)

DOUBLING = Program("encode", double, (Y,), "Doubles.", inputs=(Input(X),), parameters=(FACTOR,))
MODEL = Model(DataSpec("vector", X), (DOUBLING,))
'''
BODY = "    return x * factor.unsqueeze(1)"


def save(directory: Path, text: str, name: str = "My Model_2.py") -> Path:
    path = directory / name
    path.write_text(text)
    return path


def error_of(path: Path, models: Path) -> str:
    """The error text of an export that must fail and leave no files."""
    with pytest.raises((custom_model.CustomModelError, graph.GraphError, reader.ArtifactError)) as caught:
        custom_model.write(path, models, formats=("torchscript",))
    assert not models.exists() or list(models.iterdir()) == []
    return str(caught.value)


def test_write_takes_name_description_golden_rows_and_provenance_from_file(tmp_path: Path) -> None:
    path = save(tmp_path, VALID)
    manifest = reader.read(custom_model.write(path, tmp_path / "models", formats=("torchscript",)))
    assert (manifest.name, manifest.family, manifest.description) == ("my-model-2", "custom", "Doubling.")
    assert manifest.provenance.settings["file_sha256"] == reader.sha256(path.read_bytes())
    assert [dict(entry.parameters) for entry in manifest.golden_rows] == [{}, {"factor": 1.0}]


@pytest.mark.parametrize("command", ["export", "write"])
def test_export_command_writes_artifact_and_prints_next_steps(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, models = save(tmp_path, VALID), tmp_path / "models"
    arguments = [command, str(path), "--models", str(models), "--name", "pair", "--format", "torchscript"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert f"Wrote {models}/pair/1, verified in torchscript: encode" in output
    assert f"python -m server --models {models}" in output


def test_export_command_reports_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "none.py"), "--models", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("CustomModelError: ")


def test_write_puts_modules_in_evaluation_mode(tmp_path: Path) -> None:
    text = VALID.replace("double, (Y,)", "Normalized(), (Y,)").replace(
        "@module\ndef double(x: Tensor, factor: Tensor) -> Tensor:\n" + BODY,
        "class Normalized(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))\n"
        "    def forward(self, x, factor):\n"
        "        return self.layers(x) * factor.unsqueeze(1)",
    )
    assert custom_model.write(save(tmp_path, text), tmp_path / "models", formats=("torchscript",)).is_dir()


def test_write_lets_file_import_modules_from_its_directory(tmp_path: Path) -> None:
    save(tmp_path, "WEIGHT = 3.0\n", "neighbor_module.py")
    text = VALID.replace("X, Y =", "from neighbor_module import WEIGHT\nX, Y =").replace(
        "x * f", "WEIGHT * x * f"
    )
    assert custom_model.write(save(tmp_path, text), tmp_path / "models", formats=("torchscript",)).is_dir()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("MODEL = Model", "OTHER = Model", "expected MODEL, an export.custom_model.Model, found none"),
        ("MODEL = Model(", "MODEL = dict(a=", "keyword argument"),
        ("MODEL = Model", "MODEL = 3\nOTHER = Model",
         "expected MODEL, an export.custom_model.Model, got a int"),
        ("X, Y =", "X, Y = 1 / 0,", ":8: ZeroDivisionError: division by zero\n    line 8: X, Y = 1 / 0,"),
        ("X, Y =", "X Y =", ":8: SyntaxError: invalid syntax\n    X Y ="),
        ("@module\n", "", "no attribute 'forward'; use @module to make a module of a function"),
        ('(Y,), "D', '(X, Y), "D',
         "double: for 3 rows, expected float32[3, 2], float32[3, 2] as x, y, got float32[3, 2]; "),
        ("(x: Tensor, ", "(z: Tensor, ",
         "ProgramError: program 'encode': unknown argument 'z' of readout double; expected one of: x, "),
        (BODY, "    return x * factor", "RuntimeError: The size of tensor a (2) must match"),
        (BODY, BODY + " + 0 * x.new_empty(x.shape).normal_()", "double: aten.normal_.default draws random"),
        (BODY, BODY + " - x.mean(0)", "depends on the other rows of its batch"),
        (BODY, BODY + " / 0", "expected golden rows of finite numbers"),
        ("DataSpec(\"vector\", X)", "X", "MODEL: data_spec: expected a DataSpec, got a TensorSpec"),
        ("(DOUBLING,)", "[DOUBLING]", "programs: expected a tuple of programs, got [Program("),
        ("(DOUBLING,)", "(DOUBLING, 0)", "programs: expected only Program objects, got a int"),
        ("(DOUBLING,)", "DOUBLING", "programs: expected a tuple of programs, got Program("),
    ],
)  # fmt: skip
def test_write_rejects_invalid_file_with_location_and_reason(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    assert VALID.count(old) == 1
    error = error_of(save(tmp_path, VALID.replace(old, new)), tmp_path / "models")
    assert message in error
    assert "Traceback" not in error


def test_write_keeps_whole_explanation_of_torch(tmp_path: Path) -> None:
    """torch.export explains a batch axis that is not dynamic after the first line of its message."""
    path = save(tmp_path, VALID.replace(BODY, "    return x.expand(3, 2) * factor.unsqueeze(1)"))
    with pytest.raises(graph.GraphError) as caught:
        custom_model.write(path, tmp_path / "models", formats=("torch_export",))
    assert "Constraints violated (batch)! " in str(caught.value)
    assert "specialized it to be a constant (3)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_write_locates_error_of_file_with_relative_path(tmp_path: Path) -> None:
    save(tmp_path, VALID.replace(BODY, "    return x * factor"), "mine.py")
    with chdir(tmp_path):
        error = error_of(Path("mine.py"), Path("models"))
    assert error.startswith("mine.py:13: RuntimeError: ")
    assert error.endswith("line 13: return x * factor")


@pytest.mark.parametrize("name", ["none.py", "text.txt", ""])
def test_write_rejects_path_that_is_no_python_file(name: str, tmp_path: Path) -> None:
    save(tmp_path, VALID, "text.txt")
    assert "expected a Python file (*.py) that defines MODEL, found none" in error_of(
        tmp_path / name, tmp_path / "models"
    )


def test_random_inputs_are_within_their_bounds() -> None:
    tokens = TensorSpec("tokens", "int64", (50,))
    data_spec = DataSpec("tokens", tokens, vocabulary=("a", "b", "c"))
    fraction = TensorSpec("fraction", shape=(50,), minimum=0, maximum=1)
    label = TensorSpec("label", "int64", (50,), 0, 9)
    positive = TensorSpec("positive", shape=(50,), minimum=0)
    inputs = custom_model._random_inputs([tokens, fraction, label, positive], data_spec, seed=0)
    assert set(np.unique(inputs["tokens"])) == {0, 1, 2}
    assert set(np.unique(inputs["label"])) == set(range(10))
    assert 0 <= inputs["fraction"].min() < inputs["fraction"].max() <= 1
    assert inputs["positive"].min() == 0
    assert inputs["positive"].dtype == np.float32


def test_module_wraps_function_with_several_results() -> None:
    @custom_model.module
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1

    up, down = parts(torch.zeros(3))
    assert (up - down).tolist() == [2.0] * 3
