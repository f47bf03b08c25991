"""Tests of the GAN: both objectives, rounding to levels, the MMD, and the meaning of latents and labels."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from export.artifacts.interpreter import Interpreter, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.gan import FAMILY, GAN, LATENT_DIMENSIONS
from export.families.gan.losses import (
    BANDWIDTHS,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    squared_mmd,
)
from export.families.gan.programs import UNSET
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Network, Objective, Settings, fit
from samovar import noise

TINY = Preset(width=16, depth=1, training=Settings(steps=1))
DIMENSIONS = LATENT_DIMENSIONS["image"]
LATENTS = torch.randn(4, DIMENSIONS, generator=torch.Generator().manual_seed(5)).numpy()


def untrained(dataset: loading.Dataset) -> GAN:
    """Return an untrained network whose discriminator depends on the class, as a trained one does."""
    torch.manual_seed(0)
    gan = FAMILY.build_network(dataset, TINY)
    nn.init.normal_(gan.discriminator.label_embedding.weight)
    return gan


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> GAN:
    return untrained(digits)


@pytest.fixture(scope="module")
def interpreter(network: GAN, digits: loading.Dataset) -> Interpreter:
    return eager_interpreter(digits.spec, FAMILY.build_programs(network, digits))


def run(
    interpreter: Interpreter,
    operation: str,
    seed: int = 0,
    truncation: float = 1,
    **inputs: np.ndarray,
) -> np.ndarray:
    """Run a request with one row for each input row, and return its images."""
    program, count = interpreter.program(operation), len(next(iter(inputs.values())))
    rows = make_rows(program, seed, range(count), {"truncation": truncation}, inputs)
    return interpreter.run(operation, rows)["image"]


def test_losses_equal_values_computed_by_hand() -> None:
    """With D(x) = 2 and D(G(z)) = 0, D's loss is log(1 + e^-2), and G's loss is 2 more."""
    real, generated = torch.tensor([2.0]), torch.tensor([0.0])
    assert discriminator_loss(real, generated).item() == pytest.approx(0.126928, abs=1e-6)
    assert generator_loss(real, generated).item() == pytest.approx(2.126928, abs=1e-6)


def test_losses_move_the_generated_logit_in_opposite_directions() -> None:
    """G increases the logit of its rows and D decreases it."""
    real, generated = torch.tensor([0.3]), torch.tensor([-0.2], requires_grad=True)
    (by_generator,) = torch.autograd.grad(generator_loss(real, generated).sum(), generated)
    (by_discriminator,) = torch.autograd.grad(discriminator_loss(real, generated).sum(), generated)
    assert by_generator.item() == pytest.approx(-1 / (1 + math.exp(-0.5)))
    assert by_discriminator.item() == pytest.approx(1 / (1 + math.exp(0.5)))


def test_gradient_penalty_of_a_quadratic_form_is_exact() -> None:
    """x'Ax / 2 has the gradient Ax, so the penalty is x'AAx, whose gradient by A is Axx' + xx'A."""
    torch.manual_seed(1)
    a = torch.randn(3, 3).double()
    a = (a + a.T).requires_grad_()
    x = torch.randn(5, 3).double().requires_grad_()
    penalty = gradient_penalty(0.5 * torch.einsum("bi,ij,bj->b", x, a, x), x)
    torch.testing.assert_close(penalty, (x @ a).square().sum(1))
    (by_a,) = torch.autograd.grad(penalty.sum(), a)
    outer = x.T @ x
    torch.testing.assert_close(by_a, a @ outer + outer @ a)


def test_discriminator_objective_is_the_relativistic_loss_with_both_penalties(
    network: GAN, digits: loading.Dataset
) -> None:
    """The expected penalty of each row uses central differences."""
    rows, labels = torch.tensor(digits.train.rows[:3]), torch.tensor(digits.train.labels[:3])
    torch.manual_seed(2)
    objective = next(network.objectives(rows, labels))
    torch.manual_seed(2)
    discriminator = network.discriminator.double()
    with torch.no_grad():
        real, generated = network.generator.scale(rows).double(), network.generator.sample(labels).double()
        penalties = [squared_slope(discriminator, row, labels) for row in (real, generated)]
        difference = discriminator(real, labels) - discriminator(generated, labels)
    network.float()
    expected = functional.softplus(-difference) + network.penalty_weight / 2 * (penalties[0] + penalties[1])
    torch.testing.assert_close(objective.loss.double(), expected, rtol=1e-4, atol=1e-5)


def squared_slope(discriminator: nn.Module, rows: Tensor, labels: Tensor, delta: float = 1e-6) -> Tensor:
    """Return the squared norm [B] of the gradient of each row's logit, by central differences."""
    moves = delta * torch.eye(rows[0].numel()).double().reshape(-1, *rows.shape[1:])
    slopes = [
        (discriminator(rows + move, labels) - discriminator(rows - move, labels)) / (2 * delta)
        for move in moves
    ]
    return torch.stack(slopes).square().sum(0)


def test_objectives_train_only_their_own_network(network: GAN, digits: loading.Dataset) -> None:
    batch = torch.tensor(digits.train.rows[:3]), torch.tensor(digits.train.labels[:3])
    first, second = network.objectives(*batch)
    assert {*first.parameters} == {*network.discriminator.parameters()}
    assert {*second.parameters} == {*network.generator.parameters()}
    gradients = torch.autograd.grad(second.loss.sum(), second.parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


class Pursuit(Network):
    """Two parameters whose squared difference is the loss. The objective trains only `hunter`."""

    def __init__(self) -> None:
        super().__init__()
        self.hunter, self.hunted = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return (self.hunter - self.hunted).square().expand(len(rows))

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator[Objective]:
        yield Objective(self.loss(rows, labels), (self.hunter,))


def test_fit_moves_only_the_parameters_of_an_objective(digits: loading.Dataset) -> None:
    pursuit = Pursuit()
    fit(pursuit, digits, Settings(steps=300, learning_rate=0.05, weight_decay=0, ema_decay=0.5))
    assert pursuit.hunted.item() == 1
    assert pursuit.hunter.item() == pytest.approx(1, abs=1e-3)


def test_generator_rounds_images_to_levels_and_passes_the_gradient_through(network: GAN) -> None:
    generator = network.generator
    latent, label = torch.tensor(LATENTS).requires_grad_(), torch.arange(4)
    scaled = generator(latent, label)
    torch.testing.assert_close(scaled, generator.scale(generator.to_rows(scaled)), rtol=0, atol=1e-6)
    unrounded = generator.layers(torch.cat([latent, generator.label_embedding(label)], 1)).squeeze(1).tanh()
    assert (scaled - unrounded).abs().max() <= 1 / 16 + 1e-6
    weights = torch.randn_like(scaled)
    gradients = [
        torch.autograd.grad((weights * image).sum(), latent, retain_graph=True)[0]
        for image in (scaled, unrounded)
    ]
    torch.testing.assert_close(*gradients)


def test_rectifiers_have_the_slope_of_the_paper(network: GAN) -> None:
    """The slope is 0.2; the defaults of PyTorch and Keras are 0.01 and 0.3."""
    rectifiers = [module for module in network.modules() if isinstance(module, torch.nn.LeakyReLU)]
    assert rectifiers
    for module in rectifiers:
        torch.testing.assert_close(module(torch.tensor([-1.0, 1.0])), torch.tensor([-0.2, 1.0]))


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (15, 9)])
def test_network_accepts_images_of_other_sizes(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    split = loading.Split(rows, np.arange(20) % 3)
    data_spec = DataSpec(
        "image", TensorSpec("image", "uint8", shape, 0, 255), 256, class_labels=("a", "b", "c")
    )
    gan = FAMILY.build_network(loading.Dataset("noise", data_spec, split, split, split, ""), TINY)
    objectives = gan.objectives(torch.tensor(rows), torch.tensor(split.labels))
    assert [len(objective.loss) for objective in objectives] == [20, 20]
    assert gan.generator.to_rows(gan.generator.sample(torch.arange(3))).shape == (3, *shape)


def test_squared_mmd_is_the_sum_over_pairs_with_equal_labels() -> None:
    torch.manual_seed(3)
    a, b, labels, scale = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6) % 2, torch.tensor(1.5)

    def kernel(x: Tensor, y: Tensor) -> float:
        squared = (x - y).square().sum().item()
        return float(np.mean([math.exp(-squared / (2 * (1.5 * width) ** 2)) for width in BANDWIDTHS]))

    expected = [
        sum(
            kernel(a[i], a[j]) + kernel(b[i], b[j]) - kernel(a[i], b[j]) - kernel(b[i], a[j])
            for j in range(6)
            if j != i and labels[i] == labels[j]
        )
        / 5
        for i in range(6)
    ]
    torch.testing.assert_close(squared_mmd(a, b, labels, scale), torch.tensor(expected), rtol=1e-4, atol=1e-6)


def test_squared_mmd_is_zero_for_equal_distributions_and_positive_for_swapped_labels() -> None:
    torch.manual_seed(4)
    labels = torch.arange(200) % 2
    shift, scale = 3 * labels.unsqueeze(1), torch.tensor(2.0)
    draws = [torch.randn(200, 2) + shift for _ in range(20)]
    equal = [squared_mmd(a, b, labels, scale).mean() for a, b in zip(draws[::2], draws[1::2], strict=True)]
    assert abs(torch.stack(equal).mean().item()) < 2e-3
    assert squared_mmd(draws[0], draws[1].roll(1, 0), labels, scale).mean() > 0.1


def test_sample_draws_the_documented_latents_and_decode_returns_the_same_rows(
    interpreter: Interpreter,
) -> None:
    rows = np.arange(4)
    drawn = noise.normal(np.full(4, 9, np.uint64), rows, np.zeros(4, np.int64), 0, (DIMENSIONS,))
    sampled = run(interpreter, "sample", seed=9, label=rows)
    np.testing.assert_array_equal(sampled, run(interpreter, "decode", seed=1, label=rows, latent=drawn))
    assert len(np.unique(sampled, axis=0)) == 4


def test_decode_equals_sample_for_the_same_latents_and_seed(interpreter: Interpreter) -> None:
    """Without a label, both programs draw the same class."""
    decoded = run(interpreter, "decode", seed=3, latent=LATENTS)
    np.testing.assert_array_equal(decoded, run(interpreter, "sample", seed=3, latent=LATENTS))


def test_sample_draws_unset_elements_of_a_latent(interpreter: Interpreter) -> None:
    labels, partial = np.zeros(4, np.int64), LATENTS.copy()
    partial[:, ::2] = UNSET
    images = [run(interpreter, "sample", seed=seed, label=labels, latent=partial) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    unset = np.full_like(LATENTS, UNSET)
    np.testing.assert_array_equal(
        run(interpreter, "sample", seed=1, label=labels, latent=unset),
        run(interpreter, "sample", seed=1, label=labels),
    )


def test_sample_truncation_multiplies_latents(interpreter: Interpreter) -> None:
    labels = np.zeros(4, np.int64)
    half = run(interpreter, "sample", label=labels, latent=LATENTS, truncation=0.5)
    np.testing.assert_array_equal(half, run(interpreter, "decode", label=labels, latent=LATENTS / 2))
    zero = run(interpreter, "sample", seed=3, label=labels, truncation=0)
    np.testing.assert_array_equal(
        zero, run(interpreter, "decode", label=labels, latent=np.zeros_like(LATENTS))
    )


def test_decode_depends_on_the_label(interpreter: Interpreter) -> None:
    latents = np.repeat(LATENTS[:1], 10, axis=0)
    images = run(interpreter, "decode", label=np.arange(10), latent=latents)
    assert len(np.unique(images, axis=0)) == 10


def test_decode_without_label_draws_the_class_by_frequency(digits: loading.Dataset) -> None:
    """By inversion of a uniform number, on a dataset in which 90 % of the rows have class 3."""
    labels = np.where(np.arange(len(digits.train)) % 10 == 0, 7, 3)
    skewed = dataclasses.replace(digits, train=loading.Split(digits.train.rows, labels))
    interpreter = eager_interpreter(digits.spec, FAMILY.build_programs(untrained(skewed), skewed))
    latents = np.repeat(LATENTS[:1], 200, axis=0)
    drawn = run(interpreter, "decode", seed=4, latent=latents)
    uniform = noise.uniform(np.full(200, 4, np.uint64), np.arange(200), np.zeros(200, np.int64), 1, ())
    expected = np.where(uniform < (labels == 3).mean(), 3, 7)
    np.testing.assert_array_equal(drawn, run(interpreter, "decode", label=expected, latent=latents))
    assert 10 <= (expected == 7).sum() <= 30


def test_decode_of_points_returns_floats_that_depend_on_the_class() -> None:
    moons = loading.moons()
    interpreter = eager_interpreter(moons.spec, FAMILY.build_programs(untrained(moons), moons))
    rows = make_rows(
        interpreter.program("decode"),
        0,
        range(2),
        {},
        {"latent": np.ones((2, LATENT_DIMENSIONS["vector"]), np.float32), "label": np.arange(2)},
    )
    points = interpreter.run("decode", rows)["point"]
    assert points.dtype == np.float32
    assert points.shape == (2, 2)
    assert (points[0] != points[1]).all()


def test_score_is_unsupported_with_a_reason() -> None:
    assert "no likelihood" in FAMILY.unsupported_operations["score"]
    assert not set(FAMILY.unsupported_operations) & set(FAMILY.operations)
