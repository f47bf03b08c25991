"""Tests of the classifiers: folded batch norm, augmentation, calibration and ranked labels."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

from export.artifacts import reader
from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families import cnn, mlp
from export.families.base import Preset
from export.families.classifier import Block, Classifier, ClassifierFamily
from export.families.classifier.network import SHIFT_DIVISOR, augment
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings, fit

FAMILY: dict[str, mlp.Family | cnn.Family] = {"mlp": mlp.FAMILY, "cnn": cnn.FAMILY}


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest) -> mlp.Family | cnn.Family:
    return FAMILY[request.param]


@pytest.fixture
def network(family: mlp.Family | cnn.Family, digits: loading.Dataset) -> Classifier:
    """Return an untrained classifier whose running statistics are those of training rows."""
    torch.manual_seed(0)
    classifier = family.build_network(digits, family.presets["tiny"])
    for _ in range(20):
        classifier.loss(
            torch.from_numpy(digits.train.rows[:256]), torch.from_numpy(digits.train.labels[:256])
        )
    return classifier


@pytest.fixture
def interpreter(family: ClassifierFamily, network: Classifier, digits: loading.Dataset) -> Interpreter:
    return eager_interpreter(digits.spec, family.build_programs(network, digits))


@pytest.fixture
def classify(interpreter: Interpreter, digits: loading.Dataset) -> Callable[..., Tensors]:
    """Return a function that runs classify on test rows; keywords are parameters."""

    def run(rows: slice = slice(20), **parameters: float) -> Tensors:
        images = digits.test.rows[rows]
        program = interpreter.program("classify")
        request = make_rows(program, 0, range(len(images)), parameters, {"image": images})
        return interpreter.run("classify", request)

    return run


@pytest.mark.parametrize("linear", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3, padding=1)])
def test_fold_batch_norm_gives_the_formula_of_the_paper(linear: nn.Linear | nn.Conv2d) -> None:
    """The variance is so small that division by std + epsilon would be wrong by 5 %."""
    block = Block(linear)
    norm = block.norm
    assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
    with torch.no_grad():
        for tensor, low, high in (
            (norm.weight, 1, 2),
            (norm.bias, -1, 1),
            (norm.running_mean, -1, 1),
            (norm.running_var, 1e-4, 2e-4),
        ):
            assert tensor is not None
            tensor.uniform_(low, high)
        x = torch.rand(5, 3) if isinstance(linear, nn.Linear) else torch.rand(5, 3, 6, 6)
        gamma, beta, mean, variance = (
            values.reshape(-1, *(1 for _ in x.shape[2:]))
            for values in norm.state_dict().values()
            if values.dim()
        )
        expected = gamma * (linear(x) - mean) / torch.sqrt(variance + 1e-5) + beta
        block.eval().fold_batch_norm()
        torch.testing.assert_close(block(x), expected.relu(), rtol=1e-3, atol=1e-2)
    assert not any(isinstance(module, type(norm)) for module in block.modules())


@pytest.mark.parametrize("linear", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3, padding=1)])
def test_block_in_training_normalizes_by_biased_variance_and_stores_unbiased_variance(
    linear: nn.Linear | nn.Conv2d,
) -> None:
    """With four numbers in each channel the two variances differ clearly."""
    block = Block(linear).train()
    x = torch.rand(4, 3) if isinstance(linear, nn.Linear) else torch.rand(1, 3, 2, 2)
    before = linear(x).detach()
    axes = [0, *range(2, before.dim())]
    shape = (1, -1, *(1 for _ in before.shape[2:]))
    mean, biased, unbiased = (
        before.mean(axes),
        before.var(axes, correction=0),
        before.var(axes, correction=1),
    )
    normal = (before - mean.reshape(shape)) / torch.sqrt(biased.reshape(shape) + 1e-5)
    torch.testing.assert_close(block(x).detach(), normal.relu())
    running = block.norm.state_dict()
    torch.testing.assert_close(running["running_mean"], 0.1 * mean)
    torch.testing.assert_close(running["running_var"], 0.9 * torch.ones(4) + 0.1 * unbiased)


@pytest.mark.parametrize("preset", cnn.FAMILY.presets)
def test_cnn_has_3x3_kernels_and_stride_2_in_each_stage_after_the_first(
    preset: str, digits: loading.Dataset
) -> None:
    network = cnn.FAMILY.build_network(digits, cnn.FAMILY.presets[preset])
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {(convolution.kernel_size, convolution.padding) for convolution in convolutions} == {
        ((3, 3), (1, 1))
    }
    stages = [
        convolution for convolution in convolutions if convolution.in_channels != convolution.out_channels
    ]
    assert [convolution.stride for convolution in stages] == [(1, 1)] + [(2, 2)] * (len(stages) - 1)


def test_block_applies_relu_without_negative_slope() -> None:
    block = Block(nn.Linear(1, 1)).eval()
    with torch.no_grad():
        block.linear.weight.fill_(1)
        block.linear.bias.fill_(0)  # type: ignore[union-attr]
    assert block(torch.tensor([[-2.0]])).item() == 0
    assert block(torch.tensor([[2.0]])).item() == pytest.approx(2, rel=1e-4)


def test_block_in_training_scales_features_kept_by_dropout() -> None:
    torch.manual_seed(0)
    block = Block(nn.Linear(3, 200), dropout=0.25)
    block.norm.eval()
    x = torch.rand(50, 3)
    dropped = block(x).detach()
    block.eval()
    complete = block(x).detach()
    kept = dropped[complete > 0] / complete[complete > 0]
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.75))
    assert kept.mean() == pytest.approx(1, abs=0.05)


def test_inference_copy_equals_network_in_eval_mode(network: Classifier, digits: loading.Dataset) -> None:
    rows = torch.from_numpy(digits.test.rows[:50])
    served = network.inference_copy()
    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout)
    assert not any(isinstance(module, layers) for module in served.modules())
    assert any(isinstance(module, layers) for module in network.modules())
    assert network.training
    torch.testing.assert_close(served.logits(rows), network.eval().logits(rows), rtol=1e-4, atol=1e-4)


def test_classify_of_one_row_equals_that_row_in_a_batch(
    network: Classifier, classify: Callable[..., Tensors]
) -> None:
    """Up to rounding: torch rounds by batch size. ONNX is bitwise equal (test_families.py)."""
    batch, alone = classify(), classify(slice(1))
    for name, array in alone.items():
        np.testing.assert_allclose(array, batch[name][:1], rtol=1e-5, atol=1e-6)


def test_classifier_in_training_mode_depends_on_other_rows_of_the_batch(
    network: Classifier, digits: loading.Dataset
) -> None:
    """This is why graphs are exported in eval mode."""
    rows = torch.from_numpy(digits.test.rows[:20])
    with torch.no_grad():
        first, second = (network.logits(rows[chosen])[0] for chosen in (slice(0, 10), [0, *range(11, 20)]))
    assert (first - second).abs().max() > 0.05


@pytest.mark.parametrize("name", FAMILY)
def test_exported_graphs_contain_no_batch_norm_and_no_dropout(name: str, artifacts: dict[str, Path]) -> None:
    for graph in reader.read(artifacts[name]).graphs:
        paths = {file.format: artifacts[name] / file.path for file in graph.files}
        kinds = {node.op_type for node in onnx.load(paths["onnx"]).graph.node}
        script = torch.jit.load(str(paths["torchscript"]))  # type: ignore[no-untyped-call]
        kinds |= {node.kind() for node in script.inlined_graph.nodes()}
        assert {"Gemm", "aten::linear"} & kinds
        assert not [kind for kind in kinds if "dropout" in kind.lower() or "norm" in kind.lower()]


def test_classify_divides_logits_by_the_temperature(classify: Callable[..., Tensors]) -> None:
    outputs = classify(temperature=2.5)
    expected = torch.from_numpy(outputs["logits"] / 2.5).softmax(1).numpy()
    np.testing.assert_allclose(outputs["probabilities"], expected, rtol=1e-5)
    np.testing.assert_allclose(outputs["probabilities"].sum(1), 1, rtol=1e-6)


def test_classify_temperature_does_not_change_the_ranking(classify: Callable[..., Tensors]) -> None:
    cold, hot = classify(temperature=0.05), classify(temperature=20)
    np.testing.assert_array_equal(cold["ranked_labels"], hot["ranked_labels"])
    assert (cold["probabilities"].max(1) > hot["probabilities"].max(1)).all()


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_classify_ranks_top_k_labels(top_k: int, classify: Callable[..., Tensors]) -> None:
    outputs = classify(top_k=top_k)
    order = (-outputs["probabilities"]).argsort(1)[:, :top_k]
    np.testing.assert_array_equal(outputs["top_label"], order[:, 0])
    np.testing.assert_array_equal(outputs["ranked_labels"][:, :top_k], order)
    np.testing.assert_array_equal(
        outputs["ranked_probabilities"][:, :top_k], np.take_along_axis(outputs["probabilities"], order, 1)
    )
    assert (outputs["ranked_labels"][:, top_k:] == -1).all()
    assert (outputs["ranked_probabilities"][:, top_k:] == 0).all()


def test_encode_features_determine_the_logits(
    network: Classifier,
    interpreter: Interpreter,
    classify: Callable[..., Tensors],
    digits: loading.Dataset,
) -> None:
    request = make_rows(interpreter.program("encode"), 0, range(20), {}, {"image": digits.test.rows[:20]})
    features = torch.from_numpy(interpreter.run("encode", request)["features"])
    assert features.shape == (20, network.num_features)
    torch.testing.assert_close(
        network.head(features).detach(), torch.from_numpy(classify()["logits"]), rtol=1e-4, atol=1e-5
    )


def test_default_temperature_is_fitted_on_validation_rows_only(
    family: ClassifierFamily, network: Classifier, digits: loading.Dataset
) -> None:
    def default_temperature(dataset: loading.Dataset) -> float:
        return family.build_programs(network, dataset)[0].parameters[0].default

    rows = digits.validation.rows
    predicted = loading.Split(rows, network.inference_copy().logits(torch.from_numpy(rows)).argmax(1).numpy())
    assert default_temperature(replace(digits, test=digits.train, train=digits.test)) == default_temperature(
        digits
    )
    assert default_temperature(replace(digits, validation=predicted)) < default_temperature(digits)


def test_loss_in_eval_mode_has_no_augmentation_and_no_label_smoothing(
    network: Classifier, digits: loading.Dataset
) -> None:
    rows, labels = torch.from_numpy(digits.test.rows), torch.from_numpy(digits.test.labels)
    network.eval()
    expected = functional.cross_entropy(network.logits(rows), labels, reduction="none")
    torch.testing.assert_close(network.loss(rows, labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "mirrors"), [((8, 8), 1), ((16, 16, 3), 2)])
def test_augment_gives_all_shifts_and_mirrors_color_images(shape: tuple[int, ...], mirrors: int) -> None:
    torch.manual_seed(0)
    margin = shape[0] // SHIFT_DIVISOR
    row = torch.randint(1, 256, shape, dtype=torch.uint8)
    padded = functional.pad(row, (0, 0) * (len(shape) - 2) + (margin,) * 4)
    expected = {
        image.numpy().tobytes()
        for down in range(2 * margin + 1)
        for right in range(2 * margin + 1)
        for image in [padded[down : down + shape[0], right : right + shape[1]]]
        for image in [image, image.flip(1)][:mirrors]
    }
    augmented = augment(row.expand(1500, *shape))
    assert {image.numpy().tobytes() for image in augmented} == expected


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (9, 7)])
def test_network_accepts_images_of_any_shape(
    shape: tuple[int, ...], family: mlp.Family | cnn.Family, digits: loading.Dataset
) -> None:
    images = TensorSpec("image", "uint8", shape, 0, 255)
    dataset = replace(digits, spec=DataSpec("image", images, 256, class_labels=("cat", "dog")))
    network = family.build_network(dataset, family.presets["tiny"])
    assert network.logits(torch.zeros((2, *shape), dtype=torch.uint8)).shape == (2, 2)


def test_training_raises_accuracy_and_standard_error_is_binomial(
    family: mlp.Family | cnn.Family, digits: loading.Dataset
) -> None:
    """80 steps give less than the starter's accuracy, but much more than chance."""
    settings = Settings(steps=80, learning_rate=1e-2, ema_decay=0.8, evaluations=2)
    preset = Preset(width=16, depth=1, training=settings, evaluation_rows=300)
    torch.manual_seed(0)
    classifier = family.build_network(digits, preset)
    fit(classifier, digits, settings)
    interpreter = eager_interpreter(digits.spec, family.build_programs(classifier, digits))
    accuracy, cross_entropy, unscaled, fitted = family.measure_quality(interpreter, digits, preset)
    assert accuracy.value > 0.6
    expected = np.sqrt(accuracy.value * (1 - accuracy.value) / 300)
    assert accuracy.standard_error == pytest.approx(expected, rel=0.01)
    assert cross_entropy.value < np.log(10) / 2
    assert unscaled.name == "calibration error, temperature 1"
    assert fitted.value < unscaled.value
    assert "300 test rows" in fitted.doc
