"""The classifiers: frozen as the papers say, alone as in company, and ranked as asked."""

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
from export.families.classifier import SHIFT, Classifier, ClassifierFamily, Unit, disturbed
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings, fit

FAMILY: dict[str, mlp.Family | cnn.Family] = {"mlp": mlp.FAMILY, "cnn": cnn.FAMILY}


@pytest.fixture(params=FAMILY)
def family(request: pytest.FixtureRequest) -> mlp.Family | cnn.Family:
    return FAMILY[request.param]


@pytest.fixture
def network(family: mlp.Family | cnn.Family, digits: loading.Dataset) -> Classifier:
    """Untrained, but with running statistics that have seen rows."""
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
def answer(interpreter: Interpreter, digits: loading.Dataset) -> Callable[..., Tensors]:
    """The answer of classify on the first test rows, given parameters."""

    def classify(rows: slice = slice(20), **parameters: float) -> Tensors:
        images = digits.test.rows[rows]
        program = interpreter.program("classify")
        request = make_rows(program, 0, range(len(images)), parameters, {"image": images})
        return interpreter.run("classify", request)

    return classify


@pytest.mark.parametrize("linear", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3, padding=1)])
def test_frozen_batch_norm_is_the_formula_of_the_paper(linear: nn.Linear | nn.Conv2d) -> None:
    """With so small a variance, dividing by std + epsilon instead would be off by 5 %."""
    unit = Unit(linear)
    norm = unit.norm
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
        unit.eval().freeze()
        torch.testing.assert_close(unit(x), expected.relu(), rtol=1e-3, atol=1e-2)
    assert not any(isinstance(module, type(norm)) for module in unit.modules())


@pytest.mark.parametrize("linear", [nn.Linear(3, 4), nn.Conv2d(3, 4, 3, padding=1)])
def test_training_divides_by_the_biased_variance_and_remembers_the_unbiased_one(
    linear: nn.Linear | nn.Conv2d,
) -> None:
    """Of so few numbers the one is far from the other."""
    unit = Unit(linear).train()
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
    torch.testing.assert_close(unit(x).detach(), normal.relu())
    remembered = unit.norm.state_dict()
    torch.testing.assert_close(remembered["running_mean"], 0.1 * mean)
    torch.testing.assert_close(remembered["running_var"], 0.9 * torch.ones(4) + 0.1 * unbiased)


@pytest.mark.parametrize("preset", cnn.FAMILY.presets)
def test_kernels_are_3x3_and_strides_halve_every_stage_after_the_first(
    preset: str, digits: loading.Dataset
) -> None:
    network = cnn.FAMILY.build_network(digits, cnn.FAMILY.presets[preset])
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    assert {(each.kernel_size, each.padding) for each in convolutions} == {((3, 3), (1, 1))}
    stages = [each for each in convolutions if each.in_channels != each.out_channels]
    assert [each.stride for each in stages] == [(1, 1)] + [(2, 2)] * (len(stages) - 1)


def test_units_are_rectified_without_a_leak() -> None:
    """No unit here has the leaky rectifiers of which the book's network is made."""
    unit = Unit(nn.Linear(1, 1)).eval()
    with torch.no_grad():
        unit.linear.weight.fill_(1)
        unit.linear.bias.fill_(0)  # type: ignore[union-attr]
    assert unit(torch.tensor([[-2.0]])).item() == 0
    assert unit(torch.tensor([[2.0]])).item() == pytest.approx(2, rel=1e-4)


def test_dropout_scales_what_survives() -> None:
    torch.manual_seed(0)
    unit = Unit(nn.Linear(3, 200), dropout=0.25)
    unit.norm.eval()
    x = torch.rand(50, 3)
    survivors = unit(x).detach()
    unit.eval()
    whole = unit(x).detach()
    kept = survivors[whole > 0] / whole[whole > 0]
    torch.testing.assert_close(kept[kept > 0], torch.full_like(kept[kept > 0], 1 / 0.75))
    assert kept.mean() == pytest.approx(1, abs=0.05)


def test_what_is_served_is_the_evaluated_network(network: Classifier, digits: loading.Dataset) -> None:
    rows = torch.from_numpy(digits.test.rows[:50])
    served = network.frozen()
    layers = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout)
    assert not any(isinstance(module, layers) for module in served.modules())
    assert any(isinstance(module, layers) for module in network.modules())
    assert network.training
    torch.testing.assert_close(served.logits(rows), network.eval().logits(rows), rtol=1e-4, atol=1e-4)


def test_a_row_alone_is_the_row_in_company(network: Classifier, answer: Callable[..., Tensors]) -> None:
    """To the last bits, which torch rounds by the batch size; ONNX keeps them too (test_families.py)."""
    together, alone = answer(), answer(slice(1))
    for name, array in alone.items():
        np.testing.assert_allclose(array, together[name][:1], rtol=1e-5, atol=1e-6)


def test_training_mode_lets_neighbours_in(network: Classifier, digits: loading.Dataset) -> None:
    """Why graphs are frozen: the same row, in two companies."""
    rows = torch.from_numpy(digits.test.rows[:20])
    with torch.no_grad():
        first, second = (network.logits(rows[company])[0] for company in (slice(0, 10), [0, *range(11, 20)]))
    assert (first - second).abs().max() > 0.05


@pytest.mark.parametrize("name", FAMILY)
def test_no_batch_norm_and_no_dropout_in_any_file(name: str, artifacts: dict[str, Path]) -> None:
    for graph in reader.read(artifacts[name]).graphs:
        paths = {file.format: artifacts[name] / file.path for file in graph.files}
        kinds = {node.op_type for node in onnx.load(paths["onnx"]).graph.node}
        script = torch.jit.load(str(paths["torchscript"]))  # type: ignore[no-untyped-call]
        kinds |= {node.kind() for node in script.inlined_graph.nodes()}
        assert {"Gemm", "aten::linear"} & kinds
        assert not [kind for kind in kinds if "dropout" in kind.lower() or "norm" in kind.lower()]


def test_probabilities_are_those_of_the_temperature(answer: Callable[..., Tensors]) -> None:
    found = answer(temperature=2.5)
    expected = torch.from_numpy(found["logits"] / 2.5).softmax(1).numpy()
    np.testing.assert_allclose(found["probabilities"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, rtol=1e-6)


def test_a_temperature_changes_no_decision(answer: Callable[..., Tensors]) -> None:
    cold, hot = answer(temperature=0.05), answer(temperature=20)
    np.testing.assert_array_equal(cold["ranked_labels"], hot["ranked_labels"])
    assert (cold["probabilities"].max(1) > hot["probabilities"].max(1)).all()


@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_so_many_labels_are_ranked(top_k: int, answer: Callable[..., Tensors]) -> None:
    found = answer(top_k=top_k)
    order = (-found["probabilities"]).argsort(1)[:, :top_k]
    np.testing.assert_array_equal(found["top_label"], order[:, 0])
    np.testing.assert_array_equal(found["ranked_labels"][:, :top_k], order)
    np.testing.assert_array_equal(
        found["ranked_probabilities"][:, :top_k], np.take_along_axis(found["probabilities"], order, 1)
    )
    assert (found["ranked_labels"][:, top_k:] == -1).all()
    assert (found["ranked_probabilities"][:, top_k:] == 0).all()


def test_the_features_decide(
    network: Classifier,
    interpreter: Interpreter,
    answer: Callable[..., Tensors],
    digits: loading.Dataset,
) -> None:
    request = make_rows(interpreter.program("encode"), 0, range(20), {}, {"image": digits.test.rows[:20]})
    features = torch.from_numpy(interpreter.run("encode", request)["features"])
    assert features.shape == (20, network.features)
    torch.testing.assert_close(
        network.head(features).detach(), torch.from_numpy(answer()["logits"]), rtol=1e-4, atol=1e-5
    )


def test_the_default_temperature_is_fitted_on_validation_rows_only(
    family: ClassifierFamily, network: Classifier, digits: loading.Dataset
) -> None:
    def fitted(dataset: loading.Dataset) -> float:
        return family.build_programs(network, dataset)[0].parameters[0].default

    rows = digits.validation.rows
    believed = loading.Split(rows, network.frozen().logits(torch.from_numpy(rows)).argmax(1).numpy())
    assert fitted(replace(digits, test=digits.train, train=digits.test)) == fitted(digits)
    assert fitted(replace(digits, validation=believed)) < fitted(digits)


def test_losses_of_validation_rows_are_neither_disturbed_nor_smoothed(
    network: Classifier, digits: loading.Dataset
) -> None:
    rows, labels = torch.from_numpy(digits.test.rows), torch.from_numpy(digits.test.labels)
    network.eval()
    expected = functional.cross_entropy(network.logits(rows), labels, reduction="none")
    torch.testing.assert_close(network.loss(rows, labels), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("shape", "mirrors"), [((8, 8), 1), ((16, 16, 3), 2)])
def test_disturbed_rows_are_shifted_and_mirrored_ones(shape: tuple[int, ...], mirrors: int) -> None:
    torch.manual_seed(0)
    margin = shape[0] // SHIFT
    row = torch.randint(1, 256, shape, dtype=torch.uint8)
    padded = functional.pad(row, (0, 0) * (len(shape) - 2) + (margin,) * 4)
    expected = {
        image.numpy().tobytes()
        for down in range(2 * margin + 1)
        for right in range(2 * margin + 1)
        for image in [padded[down : down + shape[0], right : right + shape[1]]]
        for image in [image, image.flip(1)][:mirrors]
    }
    found = disturbed(row.expand(1500, *shape))
    assert {image.numpy().tobytes() for image in found} == expected


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (9, 7)])
def test_images_of_any_size_are_classified(
    shape: tuple[int, ...], family: mlp.Family | cnn.Family, digits: loading.Dataset
) -> None:
    images = TensorSpec("image", "uint8", shape, 0, 255)
    dataset = replace(digits, spec=DataSpec("image", images, 256, class_labels=("cat", "dog")))
    network = family.build_network(dataset, family.presets["tiny"])
    assert network.logits(torch.zeros((2, *shape), dtype=torch.uint8)).shape == (2, 2)


def test_accuracy_is_learned_and_its_error_binomial(
    family: mlp.Family | cnn.Family, digits: loading.Dataset
) -> None:
    """A few batches are far from the starter's accuracy, and far from a guess."""
    settings = Settings(steps=80, learning_rate=1e-2, ema_decay=0.8, evaluations=2)
    preset = Preset(width=16, depth=1, training=settings, evaluation_rows=300)
    torch.manual_seed(0)
    classifier = family.build_network(digits, preset)
    fit(classifier, digits, settings)
    interpreter = eager_interpreter(digits.spec, family.build_programs(classifier, digits))
    accuracy, cross_entropy, plain, fitted = family.measure_quality(interpreter, digits, preset)
    assert accuracy.value > 0.6
    expected = np.sqrt(accuracy.value * (1 - accuracy.value) / 300)
    assert accuracy.standard_error == pytest.approx(expected, rel=0.01)
    assert cross_entropy.value < np.log(10) / 2
    assert plain.name == "calibration error, temperature 1"
    assert fitted.value < plain.value
    assert "300 test rows" in fitted.doc
