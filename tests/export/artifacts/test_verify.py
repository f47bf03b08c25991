"""Verification rejects impure graphs: randomness, training mode, cross-row dependence."""

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
    """Batch norm in training mode, even after eval()."""

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
    """A module that contains another module."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.head(x)
        return 2 * inner


class Center(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Channels(nn.Module):
    """Instance norm, which torch runs as batch norm of one row."""

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
    (AlwaysMeasures, "normalizes by the current batch"),
    (lambda: nn.BatchNorm1d(4, track_running_stats=False), "normalizes by the current batch"),
    (Draws, "draws random numbers"),
    (Picks, "draws random numbers"),
]


def model_of(module: nn.Module, rows: int = 3) -> Model:
    program = Program("decode", Head(module).eval(), (Y,), "Test.", inputs=(Input(X),))
    example = Example("decode", rows=rows, inputs={"x": ROWS[:rows]})
    return Model("pair", "none", "A test.", DataSpec("vector", X), (program,), (example,))


def write(model: Model, models: Path, format: str) -> Path:
    directory = models / model.name / "1"
    writer.write(model, directory, (format,))
    return directory


def written(models: Path, format: str) -> Path:
    return write(model_of(nn.Linear(4, 4)), models, format)


def replace_graph(directory: Path, content: bytes) -> None:
    """Replace the graph file by one from another exporter, with correct checksums."""
    manifest = reader.read(directory)
    file = manifest.graphs[0].files[0]
    (directory / file.path).write_bytes(content)
    file.sha256 = reader.sha256(content)
    reader.write_manifest(json_format.MessageToJson(manifest), directory)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("make", "reason"), IMPURE)
def test_write_rejects_module_that_is_random_or_in_training_mode(
    make: Callable[[], nn.Module], reason: str, format: str, tmp_path: Path
) -> None:
    with pytest.raises(graph.GraphError, match=f"graph decode: .*{reason}"):
        write(model_of(make()), tmp_path, format)
    assert list(tmp_path.iterdir()) == []


def test_impure_module_error_names_graph_module_operator_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(graph.GraphError) as caught:
        write(model_of(AlwaysDrops()), tmp_path, "onnx")
    assert str(caught.value) == (
        "graph decode: Head.head: aten.bernoulli_.float draws random numbers: take them as a noise argument, "
        "or call eval() if it is dropout"
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("make", [trained_norm, Channels])
def test_verify_accepts_norms_and_dropout_in_evaluation_mode(
    make: Callable[[], nn.Module], format: str, tmp_path: Path
) -> None:
    directory = write(model_of(make()), tmp_path, format)
    assert verify.verify(directory).failures == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [1, 3])
def test_write_rejects_row_that_depends_on_batch_mean(format: str, rows: int, tmp_path: Path) -> None:
    with pytest.raises(
        reader.ArtifactError, match=r"independence: .* depends on the other rows of its batch"
    ):
        write(model_of(Center(), rows), tmp_path, format)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (AlwaysDrops, r"aten::dropout \(.*test_verify.py.*\) draws random numbers"),
        (AlwaysMeasures, r"aten::batch_norm \(.*\) normalizes by the current batch"),
        (Draws, "aten::randn .*draws random numbers"),
        (Picks, "aten::multinomial .*draws random numbers"),
        (Attends, "aten::scaled_dot_product_attention .*draws random numbers"),
    ],
)
def test_verify_detects_impure_torchscript_file_from_elsewhere(
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
    """A module to script: the random operator is in an inner block of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = x + torch.rand_like(x)
        return x


def test_verify_detects_randomness_in_inner_block(tmp_path: Path) -> None:
    directory = written(tmp_path, "torchscript")
    replace_graph(directory, script_bytes(torch.jit.script(Branching())))
    assert "aten::rand_like" in verify.verify(directory).failures[0]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (AlwaysDrops, r"aten.dropout.default draws random numbers"),
        (AlwaysMeasures, r"aten.batch_norm.default .*normalizes by the current batch"),
        (Draws, "aten.randn.default draws random numbers"),
        (Picks, "aten.multinomial.default draws random numbers"),
    ],
)
def test_verify_detects_impure_exported_program_from_elsewhere(
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
    """A model of some nodes with input x and output y, both [B, 4]."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y"))
    onnx_graph = helper.make_graph(nodes, "elsewhere", [x], [y], initializers)
    return helper.make_model(onnx_graph, opset_imports=[helper.make_opsetid("", graph.OPSET)], ir_version=9)


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


def random_in_branch() -> onnx.ModelProto:
    """A model whose random operator is in a subgraph."""
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
        (lambda: batch_norm(True), "BatchNormalization '' normalizes by the current batch"),
        (lambda: onnx_model(helper.make_node("Bernoulli", ["x"], ["y"])), "Bernoulli"),
        (lambda: onnx_model(helper.make_node("RandomUniformLike", ["x"], ["y"])), "RandomUniformLike"),
        (random_in_branch, "RandomNormalLike"),
    ],
)
def test_verify_detects_impure_onnx_file_from_elsewhere(
    make: Callable[[], onnx.ModelProto], found: str, tmp_path: Path
) -> None:
    directory = written(tmp_path, "onnx")
    replace_graph(directory, make().SerializeToString())
    (failure,) = verify.verify(directory).failures
    assert failure.startswith(f"decode.onnx: expected a pure function, but {found}")


@pytest.mark.parametrize("model", [dropout(False), batch_norm(False)])
def test_onnx_impurities_accepts_dropout_and_batch_norm_in_inference_mode(model: onnx.ModelProto) -> None:
    assert list(purity.onnx_impurities(model)) == []


def test_verify_detects_decomposed_batch_norm_by_its_rows(tmp_path: Path) -> None:
    """An exporter can decompose batch norm, so that no node is in training mode."""
    directory = written(tmp_path, "onnx")
    mean = helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=1)
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [0])
    model = onnx_model(mean, helper.make_node("Sub", ["x", "mean"], ["y"]), initializers=(axis,))
    replace_graph(directory, model.SerializeToString())
    assert any("depends on the other rows of its batch" in line for line in verify.verify(directory).failures)


def test_verify_rejects_weights_outside_graph_file(tmp_path: Path) -> None:
    directory = written(tmp_path, "onnx")
    weight = onnx.numpy_helper.from_array(np.ones(4, np.float32), "weight")
    model = onnx_model(helper.make_node("Mul", ["x", "weight"], ["y"]), initializers=(weight,))
    onnx.external_data_helper.set_external_data(model.graph.initializer[0], "weights.bin")
    replace_graph(directory, model.SerializeToString())
    assert verify.verify(directory).failures == [
        "decode.onnx: weights are in external files, which no checksum covers; "
        "expected them inside the graph file; save it with external_data=False"
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_verify_rejects_file_that_is_no_graph_in_one_line(format: str, tmp_path: Path) -> None:
    directory = written(tmp_path, format)
    replace_graph(directory, b"not a graph")
    (failure,) = verify.verify(directory).failures
    assert f"expected a graph in {format}" in failure
    assert "\n" not in failure


def test_verify_reports_whole_error_of_graph_with_other_tensors_in_one_line(tmp_path: Path) -> None:
    directory = written(tmp_path, "torchscript")
    replace_graph(directory, script_bytes(traced(nn.Linear(7, 4), 7)))
    (failure,) = verify.verify(directory).failures
    assert failure.startswith("decode (torchscript): execution failed: RuntimeError: ")
    assert "shapes cannot be multiplied" in failure
    assert "\n" not in failure


class Signs(nn.Module):
    """Returns 1 where an element is positive, or the opposite, plus an offset."""

    def __init__(self, dtype: torch.dtype, opposite: bool = False, offset: int = 0) -> None:
        super().__init__()
        self.dtype, self.opposite, self.offset = dtype, opposite, offset

    def forward(self, x: Tensor) -> Tensor:
        signs = x <= 0 if self.opposite else x > 0
        return (signs.to(torch.int64) + self.offset).to(self.dtype)


IMAGE = TensorSpec("image", "uint8", (4,))
THREE_LEVELS, TWO_LEVELS = (DataSpec("image", IMAGE, num_levels=levels) for levels in (3, 2))
TOKENS = DataSpec("tokens", IMAGE, num_levels=3, vocabulary=("", "a", "b"))


def write_signs(output_name: str, dtype: DType, data_spec: DataSpec, models: Path) -> Path:
    """Write an artifact whose only output is the signs of the input."""
    module, output = Signs(getattr(torch, dtype)).eval(), TensorSpec(output_name, dtype, (4,))
    program = Program("decode", module, (output,), "Test.", inputs=(Input(X),))
    example = Example("decode", inputs={"x": ROWS})
    model = Model("pair", "none", "A test.", data_spec, (program,), (example,))
    return write(model, models, "torchscript")


@pytest.mark.parametrize(
    ("output_name", "dtype", "data_spec"),
    [
        ("image", "uint8", TWO_LEVELS),
        ("image", "uint8", TOKENS),
        ("label", "int64", THREE_LEVELS),
        ("length", "int32", TOKENS),
        ("is_done", "bool", THREE_LEVELS),
    ],
)
def test_verify_allows_no_difference_in_binary_images_tokens_labels_and_lengths(
    output_name: str, dtype: DType, data_spec: DataSpec, tmp_path: Path
) -> None:
    directory = write_signs(output_name, dtype, data_spec, tmp_path)
    replace_graph(directory, script_bytes(traced(Signs(getattr(torch, dtype), opposite=True), 4)))
    assert "golden rows: expected a difference of at most 0, got 1" in verify.verify(directory).failures[0]


@pytest.mark.parametrize(("offset", "is_accepted"), [(1, True), (2, False)])
def test_verify_allows_difference_of_one_level_in_images(
    offset: int, is_accepted: bool, tmp_path: Path
) -> None:
    directory = write_signs("image", "uint8", THREE_LEVELS, tmp_path)
    replace_graph(directory, script_bytes(traced(Signs(torch.uint8, offset=offset), 4)))
    assert (verify.verify(directory).failures == []) == is_accepted


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.inf


def test_write_rejects_golden_rows_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(reader.ArtifactError, match="decode: expected golden rows of finite numbers"):
        write(model_of(Infinite()), tmp_path, "torchscript")
