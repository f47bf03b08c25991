"""The GAN: each side descends its own loss, what D judges is what is served, and latents mean one thing."""

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
    """A network whose discriminator tells classes apart, as a trained one does."""
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


def play(
    interpreter: Interpreter,
    operation: str,
    seed: int = 0,
    truncation: float = 1,
    **inputs: np.ndarray,
) -> np.ndarray:
    """As many images as the inputs have rows."""
    program, count = interpreter.program(operation), len(next(iter(inputs.values())))
    rows = make_rows(program, seed, range(count), {"truncation": truncation}, inputs)
    return interpreter.run(operation, rows)["image"]


def test_the_losses_are_those_computed_by_hand() -> None:
    """With D(x) = 2 and D(G(z)) = 0: log(1 + e^-2) for the one who is winning, 2 more for the other."""
    real, made = torch.tensor([2.0]), torch.tensor([0.0])
    assert discriminator_loss(real, made).item() == pytest.approx(0.126928, abs=1e-6)
    assert generator_loss(real, made).item() == pytest.approx(2.126928, abs=1e-6)


def test_the_generator_raises_the_logit_of_what_it_makes_and_the_discriminator_lowers_it() -> None:
    """Not the misprint by which the generator maximises E[log(1 - D(G(z)))] and helps its opponent."""
    real, made = torch.tensor([0.3]), torch.tensor([-0.2], requires_grad=True)
    (of_generator,) = torch.autograd.grad(generator_loss(real, made).sum(), made)
    (of_discriminator,) = torch.autograd.grad(discriminator_loss(real, made).sum(), made)
    assert of_generator.item() == pytest.approx(-1 / (1 + math.exp(-0.5)))
    assert of_discriminator.item() == pytest.approx(1 / (1 + math.exp(0.5)))


def test_the_gradient_penalty_of_a_known_function() -> None:
    """Of x'Ax / 2 the gradient is Ax, and the penalty x'AAx has by A the gradient Axx' + xx'A."""
    torch.manual_seed(1)
    a = torch.randn(3, 3).double()
    a = (a + a.T).requires_grad_()
    x = torch.randn(5, 3).double().requires_grad_()
    penalty = gradient_penalty(0.5 * torch.einsum("bi,ij,bj->b", x, a, x), x)
    torch.testing.assert_close(penalty, (x @ a).square().sum(1))
    (by_a,) = torch.autograd.grad(penalty.sum(), a)
    outer = x.T @ x
    torch.testing.assert_close(by_a, a @ outer + outer @ a)


def test_the_discriminator_descends_the_relativistic_loss_with_both_penalties(
    network: GAN, digits: loading.Dataset
) -> None:
    """Row by row, with the penalty's gradient by central differences."""
    rows, labels = torch.tensor(digits.train.rows[:3]), torch.tensor(digits.train.labels[:3])
    torch.manual_seed(2)
    objective = next(network.objectives(rows, labels))
    torch.manual_seed(2)
    judge = network.discriminator.double()
    with torch.no_grad():
        real, made = network.generator.scale(rows).double(), network.generator.sample(labels).double()
        lengths = [squared_slope(judge, row, labels) for row in (real, made)]
        ahead = judge(real, labels) - judge(made, labels)
    network.float()
    expected = functional.softplus(-ahead) + network.penalty_weight / 2 * (lengths[0] + lengths[1])
    torch.testing.assert_close(objective.loss.double(), expected, rtol=1e-4, atol=1e-5)


def squared_slope(judge: nn.Module, rows: Tensor, labels: Tensor, by: float = 1e-6) -> Tensor:
    """Squared length of the gradient of each row's logit [B], pixel by pixel."""
    moves = by * torch.eye(rows[0].numel()).double().reshape(-1, *rows.shape[1:])
    slopes = [(judge(rows + move, labels) - judge(rows - move, labels)) / (2 * by) for move in moves]
    return torch.stack(slopes).square().sum(0)


def test_each_side_moves_by_its_own_objective(network: GAN, digits: loading.Dataset) -> None:
    batch = torch.tensor(digits.train.rows[:3]), torch.tensor(digits.train.labels[:3])
    first, second = network.objectives(*batch)
    assert {*first.parameters} == {*network.discriminator.parameters()}
    assert {*second.parameters} == {*network.generator.parameters()}
    gradients = torch.autograd.grad(second.loss.sum(), second.parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


class Pursuit(Network):
    """A point that is drawn to another, which would like to be drawn too."""

    def __init__(self) -> None:
        super().__init__()
        self.hunter, self.hunted = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))

    def loss(self, rows: Tensor, labels: Tensor) -> Tensor:
        return (self.hunter - self.hunted).square().expand(len(rows))

    def objectives(self, rows: Tensor, labels: Tensor) -> Iterator[Objective]:
        yield Objective(self.loss(rows, labels), (self.hunter,))


def test_training_moves_only_the_parameters_of_an_objective(digits: loading.Dataset) -> None:
    pursuit = Pursuit()
    fit(pursuit, digits, Settings(steps=300, learning_rate=0.05, weight_decay=0, ema_decay=0.5))
    assert pursuit.hunted.item() == 1
    assert pursuit.hunter.item() == pytest.approx(1, abs=1e-3)


def test_images_are_at_their_levels_and_pass_the_gradient_of_what_was_rounded(network: GAN) -> None:
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


def test_rectifiers_leak_a_fifth(network: GAN) -> None:
    """Not PyTorch's 0.01, nor Keras's 0.3."""
    rectifiers = [module for module in network.modules() if isinstance(module, torch.nn.LeakyReLU)]
    assert rectifiers
    for module in rectifiers:
        torch.testing.assert_close(module(torch.tensor([-1.0, 1.0])), torch.tensor([-0.2, 1.0]))


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3), (15, 9)])
def test_images_of_other_sizes_fit(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (20, *shape), np.uint8)
    part = loading.Split(rows, np.arange(20) % 3)
    value = DataSpec("image", TensorSpec("image", "uint8", shape, 0, 255), 256, class_labels=("a", "b", "c"))
    gan = FAMILY.build_network(loading.Dataset("noise", value, part, part, part, ""), TINY)
    objectives = gan.objectives(torch.tensor(rows), torch.tensor(part.labels))
    assert [len(objective.loss) for objective in objectives] == [20, 20]
    assert gan.generator.to_rows(gan.generator.sample(torch.arange(3))).shape == (3, *shape)


def test_squared_mmd_is_the_sum_over_pairs_of_one_label() -> None:
    torch.manual_seed(3)
    a, b, labels, scale = torch.randn(6, 2), torch.randn(6, 2), torch.arange(6) % 2, torch.tensor(1.5)

    def kernel(x: Tensor, y: Tensor) -> float:
        squared = (x - y).square().sum().item()
        return float(np.mean([math.exp(-squared / (2 * (1.5 * share) ** 2)) for share in BANDWIDTHS]))

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


def test_squared_mmd_is_nothing_between_equals_and_notices_labels_that_are_swapped() -> None:
    torch.manual_seed(4)
    labels = torch.arange(200) % 2
    shift, scale = 3 * labels.unsqueeze(1), torch.tensor(2.0)
    draws = [torch.randn(200, 2) + shift for _ in range(20)]
    equal = [squared_mmd(a, b, labels, scale).mean() for a, b in zip(draws[::2], draws[1::2], strict=True)]
    assert abs(torch.stack(equal).mean().item()) < 2e-3
    assert squared_mmd(draws[0], draws[1].roll(1, 0), labels, scale).mean() > 0.1


def test_a_seed_draws_the_documented_latents_and_decode_makes_the_same_of_them(
    interpreter: Interpreter,
) -> None:
    rows = np.arange(4)
    drawn = noise.normal(np.full(4, 9, np.uint64), rows, np.zeros(4, np.int64), 0, (DIMENSIONS,))
    sampled = play(interpreter, "sample", seed=9, label=rows)
    np.testing.assert_array_equal(sampled, play(interpreter, "decode", seed=1, label=rows, latent=drawn))
    assert len(np.unique(sampled, axis=0)) == 4


def test_decode_makes_what_sample_makes_of_the_same_latent(interpreter: Interpreter) -> None:
    """Whatever the class: without a label both draw the same one."""
    decoded = play(interpreter, "decode", seed=3, latent=LATENTS)
    np.testing.assert_array_equal(decoded, play(interpreter, "sample", seed=3, latent=LATENTS))


def test_elements_of_a_latent_that_are_left_out_are_drawn(interpreter: Interpreter) -> None:
    labels, holes = np.zeros(4, np.int64), LATENTS.copy()
    holes[:, ::2] = UNSET
    some = [play(interpreter, "sample", seed=seed, label=labels, latent=holes) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(some[0], some[1])
    assert (some[0] != some[2]).any()
    nothing = np.full_like(LATENTS, UNSET)
    np.testing.assert_array_equal(
        play(interpreter, "sample", seed=1, label=labels, latent=nothing),
        play(interpreter, "sample", seed=1, label=labels),
    )


def test_truncation_shrinks_latents_towards_zero(interpreter: Interpreter) -> None:
    labels = np.zeros(4, np.int64)
    half = play(interpreter, "sample", label=labels, latent=LATENTS, truncation=0.5)
    np.testing.assert_array_equal(half, play(interpreter, "decode", label=labels, latent=LATENTS / 2))
    none = play(interpreter, "sample", seed=3, label=labels, truncation=0)
    np.testing.assert_array_equal(
        none, play(interpreter, "decode", label=labels, latent=np.zeros_like(LATENTS))
    )


def test_the_label_changes_what_a_latent_becomes(interpreter: Interpreter) -> None:
    latents = np.repeat(LATENTS[:1], 10, axis=0)
    made = play(interpreter, "decode", label=np.arange(10), latent=latents)
    assert len(np.unique(made, axis=0)) == 10


def test_a_class_that_is_not_asked_for_is_drawn_by_frequency(digits: loading.Dataset) -> None:
    """By inversion of a uniform number, on a data set of which nine tenths are of class 3."""
    labels = np.where(np.arange(len(digits.train)) % 10 == 0, 7, 3)
    skewed = dataclasses.replace(digits, train=loading.Split(digits.train.rows, labels))
    interpreter = eager_interpreter(digits.spec, FAMILY.build_programs(untrained(skewed), skewed))
    latents = np.repeat(LATENTS[:1], 200, axis=0)
    drawn = play(interpreter, "decode", seed=4, latent=latents)
    uniform = noise.uniform(np.full(200, 4, np.uint64), np.arange(200), np.zeros(200, np.int64), 1, ())
    expected = np.where(uniform < (labels == 3).mean(), 3, 7)
    np.testing.assert_array_equal(drawn, play(interpreter, "decode", label=expected, latent=latents))
    assert 10 <= (expected == 7).sum() <= 30


def test_points_are_numbers_and_have_classes() -> None:
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


def test_what_a_gan_cannot_have_is_refused_with_the_reason() -> None:
    assert "no likelihood" in FAMILY.unsupported_operations["score"]
    assert not set(FAMILY.unsupported_operations) & set(FAMILY.operations)
