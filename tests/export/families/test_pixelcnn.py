"""Tests of the PixelCNN: normalized mass, causal logits, and samples that follow the scores."""

import dataclasses
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.pixelcnn import FAMILY, PixelCNN
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings

TINY = Preset(width=8, depth=3, training=Settings(steps=1))
Images = NDArray[np.uint8]


def untrained(dataset: loading.Dataset) -> PixelCNN:
    torch.manual_seed(0)
    network = FAMILY.build_network(dataset, TINY)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.3 * torch.randn_like(weights))
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> PixelCNN:
    return untrained(digits)


@pytest.fixture(scope="module")
def interpreter(network: PixelCNN, digits: loading.Dataset) -> Interpreter:
    return eager_interpreter(digits.spec, FAMILY.build_programs(network, digits))


@pytest.fixture(scope="module")
def bits() -> loading.Dataset:
    """Binary images [3, 3] of two classes with frequencies 1/4 and 3/4."""
    split = loading.Split(np.zeros((4, 3, 3), np.uint8), np.array([0, 1, 1, 1]))
    image = TensorSpec("image", "uint8", (3, 3), 0, 1)
    data_spec = DataSpec("image", image, num_levels=2, class_labels=("a", "b"))
    return loading.Dataset("bits", data_spec, split, split, split, sha256="")


@pytest.fixture(scope="module")
def bit_interpreter(bits: loading.Dataset) -> Interpreter:
    return eager_interpreter(bits.spec, FAMILY.build_programs(untrained(bits), bits))


@pytest.fixture(scope="module")
def every_bit_image() -> Images:
    """All 512 binary images [3, 3], in the order of the binary numbers that their pixels spell."""
    return np.array(list(product((0, 1), repeat=9)), np.uint8).reshape(-1, 3, 3)


def run(
    interpreter: Interpreter, operation: str, count: int, seed: int = 0, **inputs: NDArray[np.generic]
) -> Tensors:
    return interpreter.run(
        operation, make_rows(interpreter.program(operation), seed, range(count), {}, inputs)
    )


def score(interpreter: Interpreter, images: Images, label: int | None = None) -> Tensors:
    if label is None:
        return run(interpreter, "score", len(images), image=images)
    return run(interpreter, "score", len(images), image=images, label=np.full(len(images), label))


def logits(network: PixelCNN, image: torch.Tensor) -> torch.Tensor:
    return network.logits(network.features(image, torch.tensor([3])))[0]


def test_logits_depend_on_all_earlier_pixels_in_reach_and_on_no_others(
    network: PixelCNN, digits: loading.Dataset
) -> None:
    """A changed pixel changes every later logit that the first layer reaches: there is no blind spot."""
    image = torch.tensor(digits.test.rows[:1]).long()
    for pixel in range(64):
        modified = image.clone()
        modified.view(-1)[pixel] = (image.view(-1)[pixel] + 7) % 17
        changed = (logits(network, image) != logits(network, modified)).any(1)
        row, column = divmod(pixel, 8)
        later = [(i, j) for i in range(8) for j in range(8) if (i, j) > (row, column)]
        in_reach = [(i, j) for i, j in later if i - row <= 3 and abs(j - column) <= 3]
        assert not changed[: pixel + 1].any(), f"pixel {pixel}"
        assert all(changed[8 * i + j] for i, j in in_reach), f"pixel {pixel}"


@pytest.mark.parametrize("label", [0, 1, None])
def test_score_masses_of_all_images_sum_to_one(
    label: int | None, bit_interpreter: Interpreter, every_bit_image: Images
) -> None:
    log_mass = score(bit_interpreter, every_bit_image, label)["log_mass"].astype(np.float64)
    assert np.exp(log_mass).sum() == pytest.approx(1, abs=1e-5)
    assert log_mass.std() > 0.1


def test_score_without_label_is_that_of_the_class_mixture(
    bit_interpreter: Interpreter, every_bit_image: Images
) -> None:
    a, b, mixed = (
        np.exp(score(bit_interpreter, every_bit_image, label)["log_mass"]) for label in (0, 1, None)
    )
    assert not np.allclose(a, b, rtol=0.1)
    np.testing.assert_allclose(mixed, 0.25 * a + 0.75 * b, rtol=1e-4)


@pytest.mark.parametrize("label", [1, None])
def test_score_by_pixel_is_the_conditional_mass_of_each_pixel(
    label: int | None, bit_interpreter: Interpreter, every_bit_image: Images
) -> None:
    """The expected values are quotients of sums over all images that share a prefix."""
    image = 0b101100111
    outputs = score(bit_interpreter, every_bit_image, label)
    masses = np.exp(outputs["log_mass"].astype(np.float64))
    prefix_masses = [masses[image >> left << left :][: 1 << left].sum() for left in range(9, -1, -1)]
    expected = np.log(np.array(prefix_masses[1:]) / prefix_masses[:-1])
    np.testing.assert_allclose(outputs["log_mass_by_pixel"][image].ravel(), expected, atol=1e-4)


def test_score_by_pixel_sums_to_the_score(interpreter: Interpreter, digits: loading.Dataset) -> None:
    outputs = score(interpreter, digits.test.rows[:5])
    np.testing.assert_allclose(outputs["log_mass_by_pixel"].sum((1, 2)), outputs["log_mass"], rtol=1e-5)


def test_sample_frequencies_follow_the_masses(bit_interpreter: Interpreter, every_bit_image: Images) -> None:
    """A chi-square test of the frequencies of all 512 images in 4096 samples, at five standard deviations."""
    count = 4096
    drawn = run(bit_interpreter, "sample", count)["image"].reshape(count, -1) @ (1 << np.arange(9)[::-1])
    expected = count * np.exp(score(bit_interpreter, every_bit_image)["log_mass"])
    observed = np.bincount(drawn, minlength=512)
    common = expected > 5
    statistic = ((observed - expected)[common] ** 2 / expected[common]).sum()
    freedom = common.sum() - 1
    assert freedom > 100
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_sample_step_inverts_the_conditional_that_score_reports(
    network: PixelCNN, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    """Numbers in the interval of a pixel's level give this level; numbers above it give a higher one."""
    image = torch.tensor(digits.test.rows[4:5]).long()
    label = torch.tensor([digits.test.labels[4]])
    step = next(
        program.step for program in FAMILY.build_programs(network, digits) if program.step is not None
    )
    conditionals = np.exp(score(interpreter, digits.test.rows[4:5], int(label))["log_mass_by_pixel"].ravel())
    cumulative = logits_of(network, image, label).softmax(-1).cumsum(-1)
    for pixel in range(64):
        level = int(image.view(-1)[pixel])
        upper = float(cumulative[pixel, level])
        lower = upper - float(conditionals[pixel])
        drawn = [draw_pixel(step, image, label, pixel, u) for u in (lower + 1e-4, upper - 1e-4)]
        assert upper - lower < 3e-4 or drawn == [level, level]
        assert upper > 1 - 3e-4 or draw_pixel(step, image, label, pixel, upper + 1e-4) > level


def logits_of(network: PixelCNN, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return network.logits(network.features(image, label))[0].double()


def draw_pixel(
    step: torch.nn.Module, image: torch.Tensor, label: torch.Tensor, pixel: int, uniform: float
) -> int:
    """Return the level that a step draws at a pixel, given the pixels of the image before it."""
    canvas = torch.where(torch.arange(64).reshape(1, 8, 8) < pixel, image, torch.zeros_like(image))
    known = torch.zeros_like(image).to(torch.uint8)
    scalars = torch.tensor([uniform]), torch.ones(1), torch.tensor([pixel])
    written, _ = step(canvas, label, known, *scalars)
    others = torch.arange(64).reshape(1, 8, 8) != pixel
    assert torch.equal(written[others], canvas[others])
    return int(written.view(-1)[pixel])


@pytest.mark.parametrize("seed", [0, 1])
def test_sample_keeps_known_pixels(seed: int, interpreter: Interpreter, digits: loading.Dataset) -> None:
    images = digits.test.rows[:6]
    known = (np.random.default_rng(seed).random(images.shape) < 0.5).astype(np.uint8)
    drawn = run(interpreter, "sample", 6, seed, image=images, known=known)["image"]
    np.testing.assert_array_equal(drawn[known == 1], images[known == 1])
    assert (drawn[known == 0] != images[known == 0]).any()


def test_sample_ignores_the_image_outside_the_known_pixels(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:4]
    known = np.zeros_like(images)
    known[:, :3] = 1
    full = run(interpreter, "sample", 4, 5, image=images, known=known)["image"]
    masked = run(interpreter, "sample", 4, 5, image=images * known, known=known)["image"]
    np.testing.assert_array_equal(full, masked)


def test_sample_completions_follow_the_conditional_masses(
    bit_interpreter: Interpreter, every_bit_image: Images
) -> None:
    """Two rows of pixels are known and there is no label, so the class is drawn from its posterior."""
    count, prefix = 4096, 0b101100
    images = np.repeat(every_bit_image[[prefix << 3]], count, 0)
    known = np.ones_like(images)
    known[:, 2] = 0
    drawn = run(bit_interpreter, "sample", count, image=images, known=known)["image"][:, 2] @ np.array(
        [4, 2, 1]
    )
    masses = np.exp(score(bit_interpreter, every_bit_image[prefix << 3 :][:8])["log_mass"])
    expected = masses / masses.sum()
    spread = np.sqrt(expected * (1 - expected) / count)
    assert (np.abs(np.bincount(drawn, minlength=8) / count - expected) < 4.5 * spread).all()


def test_classify_follows_bayes_rule(bit_interpreter: Interpreter, every_bit_image: Images) -> None:
    mass_a, mass_b = (np.exp(score(bit_interpreter, every_bit_image, label)["log_mass"]) for label in (0, 1))
    joint = np.stack([0.25 * mass_a, 0.75 * mass_b], axis=1)
    probabilities = run(bit_interpreter, "classify", 512, image=every_bit_image)["probabilities"]
    np.testing.assert_allclose(probabilities, joint / joint.sum(1, keepdims=True), atol=1e-5)


def test_sample_with_temperature_zero_takes_the_most_likely_levels(
    interpreter: Interpreter, network: PixelCNN
) -> None:
    labels = {"label": np.full(3, 2)}
    rows = make_rows(interpreter.program("sample"), 1, range(3), {"temperature": 0}, labels)
    images = torch.tensor(interpreter.run("sample", rows)["image"]).long()
    assert (images == images[0]).all()
    most_likely = logits_of(network, images[:1], torch.tensor([2])).argmax(-1)
    assert torch.equal(most_likely, images[0].flatten())


def test_network_rejects_color_images(digits: loading.Dataset) -> None:
    color_spec = dataclasses.replace(digits.spec, tensor=TensorSpec("image", "uint8", (8, 8, 3)))
    with pytest.raises(loading.DataError, match=r"gray images \[height, width\], got .* \[8, 8, 3\]"):
        FAMILY.build_network(dataclasses.replace(digits, spec=color_spec), TINY)
