"""Verification refuses what would lie: randomness, training mode, rows that feel each other."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import json_format
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional

from export.artifacts import reader, verify, writer
from export.artifacts.golden import Example
from export.artifacts.writer import Model
from export.graphs import graph, purity
from export.graphs.formats import FORMATS
from export.graphs.program import DataSpec, DType, Input, Program, TensorSpec

X = TensorSpec("x", shape=(4,))
Y = TensorSpec("y", shape=(4,))
ROWS = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)


class AlwaysDrops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(self.linear(x), 0.5, training=True)


class AlwaysMeasures(nn.Module):
    """Batch norm in training mode, whatever eval() says."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(x, None, None, training=True)


class Draws(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape)


class Picks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.multinomial(x.softmax(1), 1)


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 1, 2, 2)
        return functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1).flatten(1)


class Head(nn.Module):
    """A module inside of another."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.head(x)
        return 2 * inner


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Channels(nn.Module):
    """Instance norm measures each row by itself: for torch it is batch norm of one row."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.norm(x.reshape(-1, 2, 2))
        return normal.flatten(1)


def trained_norm() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.GroupNorm(2, 4))
    module(torch.randn(64, 4))
    return module.eval()


IMPURE = [
    (AlwaysDrops, "draws random numbers"),
    (AlwaysMeasures, "normalises by the batch"),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), "normalises by the batch"),
    (Draws, "draws random numbers"),
    (Picks, "draws random numbers"),
]


def model_of(module: nn.Module, rows: int = 3) -> Model:
    program = Program("decode", Head(module).eval(), (Y,), "Test.", inputs=(Input(X),))
    example = Example("decode", rows=rows, inputs={"x": ROWS[:rows]})
    return Model("pair", "none", "A test.", DataSpec("vector", X), (program,), (example,))


def written(directory: Path, format: str) -> Path:
    return writer.write(model_of(nn.Linear(4, 4)), directory, formats=(format,))


def replace_graph(directory: Path, content: bytes) -> None:
    """What somebody else's exporter might have sealed."""
    manifest = reader.read(directory)
    file = manifest.graphs[0].files[0]
    (directory / file.path).write_bytes(content)
    file.sha256 = reader.sha256(content)
    reader.write_manifest(json_format.MessageToJson(manifest), directory)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("make", "reason"), IMPURE)
def test_what_is_random_or_in_training_is_not_exported(
    make: Callable[[], nn.Module], reason: str, format: str, tmp_path: Path
) -> None:
    with pytest.raises(graph.GraphError, match=f"graph decode: .*{reason}"):
        writer.write(model_of(make()), tmp_path, formats=(format,))
    assert list(tmp_path.iterdir()) == []


def test_the_message_names_the_graph_the_module_and_the_operator_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(graph.GraphError) as caught:
        writer.write(model_of(AlwaysDrops()), tmp_path)
    assert str(caught.value) == (
        "graph decode: Head.head: aten.bernoulli_.float draws random numbers: take them as a noise argument, "
        "or call eval() if it is dropout"
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [trained_norm, Channels])
def test_frozen_norms_and_sleeping_dropout_pass(
    make: Callable[[], nn.Module], format: str, tmp_path: Path
) -> None:
    directory = writer.write(model_of(make()), tmp_path, formats=(format,))
    assert verify.verify(directory).failures == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_that_sees_the_batch_mean_is_refused(format: str, rows: int, tmp_path: Path) -> None:
    with pytest.raises(
        reader.ArtifactError, match=r"independence: .* depends on the other rows of its batch"
    ):
        writer.write(model_of(Centre(), rows), tmp_path, formats=(format,))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (AlwaysDrops, r"aten::dropout \(.*test_verify.py.*\) draws random numbers"),
        (AlwaysMeasures, r"aten::batch_norm \(.*\) normalises by the batch"),
        (Draws, "aten::randn .*draws random numbers"),
        (Picks, "aten::multinomial .*draws random numbers"),
        (Attends, "aten::scaled_dot_product_attention .*draws random numbers"),
    ],
)
def test_an_impure_torchscript_file_made_elsewhere_is_found(
    make: Callable[[], nn.Module], found: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, "torchscript")
    replace_graph(directory, script_bytes(traced(make().eval(), 4)))
    (failure,) = verify.verify(directory).failures
    assert failure.startswith("decode.pt: expected a pure function, but ")
    assert_matches(found, failure)


def traced(module: nn.Module, width: int) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, torch.zeros(3, width), check_trace=False)  # type: ignore[no-any-return, no-untyped-call]


def script_bytes(module: torch.jit.ScriptModule) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


class Branching(nn.Module):
    """Scripted, so that the draw lies in a block inside of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x + torch.rand_like(x)
        return x


def test_randomness_in_an_inner_block_is_found(tmp_path: Path) -> None:
    directory = written(tmp_path, "torchscript")
    replace_graph(directory, script_bytes(torch.jit.script(Branching())))
    assert "aten::rand_like" in verify.verify(directory).failures[0]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (AlwaysDrops, r"aten.dropout.default draws random numbers"),
        (AlwaysMeasures, r"aten.batch_norm.default .*normalises by the batch"),
        (Draws, "aten.randn.default draws random numbers"),
        (Picks, "aten.multinomial.default draws random numbers"),
    ],
)
def test_an_impure_exported_program_made_elsewhere_is_found(
    make: Callable[[], nn.Module], found: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, "torch_export")
    replace_graph(directory, exported_bytes(make().eval()))
    (failure,) = verify.verify(directory).failures
    assert failure.startswith("decode.pt2: expected a pure function, but ")
    assert_matches(found, failure)


def exported_bytes(module: nn.Module) -> bytes:
    buffer = io.BytesIO()
    rows = {0: torch.export.Dim("batch", min=1, max=64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(module, (torch.zeros(3, 4),), dynamic_shapes=(rows,)), buffer)
    return buffer.getvalue()


def onnx_model(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = ()) -> onnx.ModelProto:
    """x -> y [B, 4] by some nodes."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "elsewhere", ends[:1], ends[1:], initializers)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=9)


def dropout(is_training: bool) -> onnx.ModelProto:
    rate = helper.make_tensor("rate", TensorProto.FLOAT, [], [0.5])
    mode = helper.make_tensor("mode", TensorProto.BOOL, [], [is_training])
    return onnx_model(helper.make_node("Dropout", ["x", "rate", "mode"], ["y"]), initializers=(rate, mode))


def batch_norm(is_training: bool) -> onnx.ModelProto:
    statistics = ("scale", "bias", "mean", "variance")
    outputs = ["y", "new_mean", "new_variance"] if is_training else ["y"]
    node = helper.make_node("BatchNormalization", ["x", *statistics], outputs, training_mode=int(is_training))
    tensors = tuple(helper.make_tensor(name, TensorProto.FLOAT, [4], [1.0] * 4) for name in statistics)
    return onnx_model(node, initializers=tensors)


def in_a_branch() -> onnx.ModelProto:
    """The draw lies in a subgraph."""
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["x"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])],
        )
        for operator, name in (("RandomNormalLike", "drawn"), ("Identity", "kept"))
    ]
    always = helper.make_tensor("always", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["always"], ["y"], then_branch=branches[0], else_branch=branches[1])
    return onnx_model(node, initializers=(always,))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: dropout(True), "Dropout '' draws random numbers"),
        (lambda: batch_norm(True), "BatchNormalization '' normalises by the batch"),
        (lambda: onnx_model(helper.make_node("Bernoulli", ["x"], ["y"])), "Bernoulli"),
        (lambda: onnx_model(helper.make_node("RandomUniformLike", ["x"], ["y"])), "RandomUniformLike"),
        (in_a_branch, "RandomNormalLike"),
    ],
)
def test_an_impure_onnx_file_made_elsewhere_is_found(
    make: Callable[[], onnx.ModelProto], found: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, "onnx")
    replace_graph(directory, make().SerializeToString())
    (failure,) = verify.verify(directory).failures
    assert failure.startswith(f"decode.onnx: expected a pure function, but {found}")


@pytest.mark.parametrize("model", [dropout(False), batch_norm(False)])
def test_nodes_that_only_look_impure_pass(model: onnx.ModelProto) -> None:
    assert list(purity.onnx_impurities(model)) == []


def test_batch_norm_that_an_exporter_took_apart_is_found_by_its_rows(tmp_path: Path) -> None:
    """The mean over axis 0 is no training-mode node any more."""
    directory = written(tmp_path, "onnx")
    mean = helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=1)
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    model = onnx_model(mean, helper.make_node("Sub", ["x", "mean"], ["y"]), initializers=(axis,))
    replace_graph(directory, model.SerializeToString())
    assert any("depends on the other rows of its batch" in line for line in verify.verify(directory).failures)


def test_weights_outside_of_the_sealed_file_are_refused(tmp_path: Path) -> None:
    directory = written(tmp_path, "onnx")
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "weight")
    model = onnx_model(helper.make_node("Mul", ["x", "weight"], ["y"]), initializers=(weight,))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.bin")
    replace_graph(directory, model.SerializeToString())
    assert verify.verify(directory).failures == [
        "decode.onnx: expected its weights inside, because only its own bytes are sealed"
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_graph_is_refused_in_a_line(format: str, tmp_path: Path) -> None:
    directory = written(tmp_path, format)
    replace_graph(directory, b"not a graph")
    (failure,) = verify.verify(directory).failures
    assert f"expected a graph in {format}" in failure
    assert "\n" not in failure


def test_a_graph_of_other_tensors_is_refused_in_a_line(tmp_path: Path) -> None:
    directory = written(tmp_path, "torchscript")
    replace_graph(directory, script_bytes(traced(nn.Linear(7, 4), 7)))
    (failure,) = verify.verify(directory).failures
    assert failure.startswith("decode (torchscript): cannot be run: ")


class Signs(nn.Module):
    """1 where an element is above zero, of any type; a wrong one says the opposite, or too much."""

    def __init__(self, dtype: torch.dtype, opposite: bool = False, more: int = 0) -> None:
        super().__init__()
        self.dtype, self.opposite, self.more = dtype, opposite, more

    def forward(self, x: Tensor) -> Tensor:
        signs = x <= 0 if self.opposite else x > 0
        return (signs.to(torch.int64) + self.more).to(self.dtype)


PICTURE = TensorSpec("picture", "uint8", (4,))
GREY, BLACK_AND_WHITE = (DataSpec("image", PICTURE, num_levels=levels) for levels in (3, 2))
TOKENS = DataSpec("tokens", PICTURE, num_levels=3, vocabulary=("", "a", "b"))


def signs(name: str, dtype: DType, value: DataSpec, directory: Path) -> Path:
    """An artifact with one output, of some name."""
    module, output = Signs(getattr(torch, dtype)).eval(), TensorSpec(name, dtype, (4,))
    program = Program("decode", module, (output,), "Test.", inputs=(Input(X),))
    example = Example("decode", inputs={"x": ROWS})
    model = Model("pair", "none", "A test.", value, (program,), (example,))
    return writer.write(model, directory, formats=("torchscript",))


@pytest.mark.parametrize(
    ("name", "dtype", "value"),
    [
        ("picture", "uint8", BLACK_AND_WHITE),
        ("picture", "uint8", TOKENS),
        ("label", "int64", GREY),
        ("length", "int32", TOKENS),
        ("is_done", "bool", GREY),
    ],
)
def test_the_opposite_picture_other_tokens_labels_and_lengths_are_refused(
    name: str, dtype: DType, value: DataSpec, tmp_path: Path
) -> None:
    directory = signs(name, dtype, value, tmp_path)
    replace_graph(directory, script_bytes(traced(Signs(getattr(torch, dtype), opposite=True), 4)))
    assert "golden rows: expected a difference of at most 0, got 1" in verify.verify(directory).failures[0]


@pytest.mark.parametrize(("more", "is_passed"), [(1, True), (2, False)])
def test_a_pixel_of_many_levels_may_be_off_by_one(more: int, is_passed: bool, tmp_path: Path) -> None:
    directory = signs("picture", "uint8", GREY, tmp_path)
    replace_graph(directory, script_bytes(traced(Signs(torch.uint8, more=more), 4)))
    assert (verify.verify(directory).failures == []) == is_passed


class Undefined(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.inf


def test_golden_rows_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="decode: expected golden rows of finite numbers"):
        writer.write(model_of(Undefined()), tmp_path, formats=("torchscript",))
