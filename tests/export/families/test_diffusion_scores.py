"""Scores of the diffusion model: on densities in closed form, the ODE is right and the bound is below."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.artifacts.interpreter import Interpreter, eager_interpreter, make_rows
from export.datasets import loading
from export.families.diffusion import FAMILY, ode_likelihood
from export.families.diffusion.denoiser import Denoiser, Perceptron
from export.families.diffusion.ode_likelihood import PROBES, StepOfImage
from export.families.diffusion.solvers import SIGMA_MAX
from export.families.diffusion.variational_bound import DecoderLikelihood, Step
from export.graphs.program import DataSpec, TensorSpec
from samovar.v1 import manifest_pb2
from tests.support import denoisers as toys

GRID = 60


def score(
    interpreter: Interpreter, name: str, rows: NDArray[np.generic], parameters: Mapping[str, float]
) -> tuple[NDArray[np.float64], ...]:
    """What a program says of rows."""
    inputs = {interpreter.manifest.data_spec.tensor.name: rows}
    asked = make_rows(interpreter.program(name), 3, range(len(rows)), parameters, inputs)
    return tuple(array.astype(np.float64) for array in interpreter.run(name, asked).values())


def plane(limit: float) -> NDArray[np.float32]:
    axis = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * limit
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def pair() -> toys.Pair:
    return toys.Pair()


@pytest.fixture(scope="module")
def interpreter(pair: toys.Pair) -> Interpreter:
    return toys.interpreter(pair)


def test_the_ode_of_an_exact_denoiser_is_the_density(pair: toys.Pair, interpreter: Interpreter) -> None:
    """Nearer with more steps, as far as there is density."""
    rows = plane(2)
    rows = rows[pair.log_density(rows) > -6]
    errors = [
        np.abs(score(interpreter, "score:ode", rows, {"steps": steps})[0] - pair.log_density(rows)).max()
        for steps in (20, 160)
    ]
    assert errors[1] < 2e-3 < errors[0]


def test_the_density_of_the_ode_integrates_to_one(interpreter: Interpreter) -> None:
    (logs,) = score(interpreter, "score:ode", plane(3), {"steps": 40})
    assert np.exp(logs).sum() * (6 / GRID) ** 2 == pytest.approx(1, abs=2e-3)


def test_the_bound_of_an_exact_denoiser_is_tight(pair: toys.Pair, interpreter: Interpreter) -> None:
    rows = np.tile(plane(1)[:: GRID + 1], (20, 1))
    bound, error = score(interpreter, "score", rows, {"draws": 50})
    gap = pair.log_density(rows) - bound
    assert abs(gap.mean()) < 3 * gap.std() / math.sqrt(len(gap))
    assert error.mean() == pytest.approx(gap.std(), rel=0.2)


def test_the_bound_of_a_wrong_denoiser_is_below_its_density() -> None:
    """A denoiser that pulls too hard is of no density; the bound is below that of the data all the same."""
    model, rows = toys.interpreter(toys.Hasty()), toys.Pair().sample(1000)
    bound, _ = score(model, "score", rows, {"draws": 30})
    gap = toys.Pair().log_density(rows) - bound
    assert gap.mean() > 0.1
    assert gap.mean() > 5 * gap.std() / math.sqrt(len(gap))


def test_what_is_left_of_a_row_has_its_divergence_in_closed_form(moons: loading.Dataset) -> None:
    """KL of N(x, SIGMA_MAX^2) from N(0, SIGMA_MAX^2 + s^2), coordinate by coordinate."""
    denoiser = FAMILY.build_network(moons, toys.PRESET)
    rows = 30 * torch.randn(20, 2)
    variance = SIGMA_MAX**2 + denoiser.data_std**2
    shares = (SIGMA_MAX**2 + rows.square()) / variance
    expected = 0.5 * (shares - 1 - math.log(SIGMA_MAX**2 / variance)).sum(1)
    torch.testing.assert_close(Step(denoiser).prior(rows), expected, rtol=1e-3, atol=1e-6)


def test_more_draws_lower_the_error_and_not_the_bound(interpreter: Interpreter) -> None:
    rows = np.zeros((500, 2), np.float32)
    few, many = (score(interpreter, "score", rows, {"draws": draws}) for draws in (4, 64))
    assert few[0].mean() == pytest.approx(many[0].mean(), abs=4 * few[0].std() / math.sqrt(500))
    assert many[0].std() < few[0].std() / 3
    assert score(interpreter, "score", rows[:1], {"draws": 1})[1] == 0


class Enumerated(torch.nn.Module):
    """F of the exact denoiser of images of two pixels, each of which has its probability."""

    def __init__(self, images: Tensor, shares: Tensor, spread: float) -> None:
        super().__init__()
        self.images, self.shares, self.spread = images, shares, spread

    def forward(self, image: Tensor, level: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * level).exp().reshape(-1, 1, 1)
        norm = torch.sqrt(sigma.square() + self.spread**2)
        x = image * norm
        squares = (x.unsqueeze(1) - self.images).square().sum((2, 3))
        weights = (self.shares.log() - squares / (2 * sigma.reshape(-1, 1).square())).softmax(1)
        denoised = (weights @ self.images.flatten(1)).reshape(x.shape)
        return (denoised - x * (self.spread / norm).square()) * norm / sigma / self.spread


def test_scores_of_integers_are_of_their_probability() -> None:
    """All nine images of two pixels with three levels: the bound is below, and sums to less than one."""
    pixels = np.array([[[a, b]] for a in range(3) for b in range(3)], np.uint8)
    shares = np.array([4, 1, 1, 1, 6, 2, 1, 1, 3]) / 20
    part = loading.Split(np.repeat(pixels, (20 * shares).astype(int), 0), np.zeros(20, np.int64))
    value = DataSpec("image", TensorSpec("image", "uint8", (1, 2), 0, 2), num_levels=3, class_labels=("any",))
    dataset = loading.Dataset("pairs", value, part, part, part, "")
    denoiser = Denoiser(dataset, toys.PRESET)
    images = denoiser.scale(torch.from_numpy(pixels))
    exact = Enumerated(images, torch.tensor(shares).float(), denoiser.data_std)
    denoiser.network = exact  # type: ignore[assignment]
    model = eager_interpreter(value, FAMILY.build_programs(denoiser.eval(), dataset))

    for name, parameters in (("score", {"draws": 100}), ("score:ode", {"steps": 100})):
        many = score(model, name, np.tile(pixels, (40, 1, 1)), parameters)[0].reshape(40, 9)
        mean, error = many.mean(0), many.std(0) / math.sqrt(40)
        assert (mean < np.log(shares) + 4 * error).all()
        assert np.exp(mean).sum() == pytest.approx(1, abs=0.1)


def test_the_ode_claims_no_standard_error_for_its_one_draw_of_noise(digits: loading.Dataset) -> None:
    """That of the divergence is an output, but it is not the score's."""
    by_ode = ode_likelihood.program(FAMILY.build_network(digits, toys.PRESET), digits.spec)
    assert by_ode.score is not None
    assert by_ode.score.standard_error_output is None
    assert [output.name for output in by_ode.outputs] == ["log_likelihood", "divergence_error"]


def test_pixels_have_one_of_their_levels(digits: loading.Dataset) -> None:
    """Given z, the probabilities of a pixel's levels sum to one, whatever the denoiser says."""
    denoiser = Denoiser(digits, toys.PRESET).eval()
    last = DecoderLikelihood(denoiser)
    denoised = torch.linspace(-3, 3, 64).reshape(1, 8, 8).expand(17, -1, -1)
    clean = torch.full((17, 8, 8), -1.0)
    clean[:, 3, 4] = denoiser.scale(torch.arange(17))
    others = clean.clone()
    others[:, 3, 4] = clean[0, 3, 4]
    relative = last(clean, denoised) - last(others, denoised)
    exponents = -((denoised[:, 3, 4] - clean[:, 3, 4]) / last.sigma).square() / 2
    torch.testing.assert_close(relative, exponents - exponents[0], rtol=1e-4, atol=1e-2)
    single = -((denoised[0, 3, 4] - last.grid) / last.sigma).square() / 2
    torch.testing.assert_close(single.log_softmax(0).exp().sum(), torch.ones(()))


def test_the_divergence_of_a_perceptron_is_its_jacobians_trace() -> None:
    torch.manual_seed(0)
    network = Perceptron(2, toys.PRESET, 3)
    torch.nn.init.normal_(network.exit.weight)
    point, level, label = torch.randn(5, 2), torch.randn(5), torch.arange(5) % 4
    estimate, divergence = network.divergence(point, level, label)
    torch.testing.assert_close(estimate, network(point, level, label))
    leaf = point.clone().requires_grad_()
    made = network(leaf, level, label)
    slopes = [torch.autograd.grad(made[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in (0, 1)]
    torch.testing.assert_close(divergence, slopes[0] + slopes[1], rtol=1e-4, atol=1e-5)


def test_slopes_along_directions_are_the_jacobians(digits: loading.Dataset) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(digits, toys.PRESET).eval().requires_grad_(False)
    for weights in denoiser.parameters():
        weights.add_(0.1 * torch.randn_like(weights))
    step, y, zeros = StepOfImage(denoiser), torch.randn(1, 8, 8), torch.zeros(1)
    uniform, label = torch.rand(1, PROBES, 8, 8), torch.tensor([3])
    _, _, _, log_density, variance = step(
        y, y, torch.zeros_like(y), zeros, zeros, label, uniform, torch.tensor([6]), torch.tensor([12])
    )
    stage = step.stage(torch.tensor([6]), torch.tensor([12]))
    leaf = y.clone().requires_grad_()
    estimate = denoiser.estimate(leaf, stage.sigma, label)
    slopes = [
        float((torch.autograd.grad((estimate * probe).sum(), leaf, retain_graph=True)[0] * probe).sum())
        for probe in torch.where(uniform[0] < 0.5, -1.0, 1.0)
    ]
    weight = float(stage.weight)
    assert float(log_density) == pytest.approx(-weight * sum(slopes) / 2, rel=0.01, abs=1e-4)
    assert float(variance.sqrt()) == pytest.approx(weight * abs(slopes[0] - slopes[1]) / 2, rel=0.02)


def test_scores_say_what_they_are(digits: loading.Dataset, interpreter: Interpreter) -> None:
    points = {
        program.variant: program.score
        for program in interpreter.manifest.programs
        if program.HasField("score")
    }
    assert points[""].kind == manifest_pb2.Score.KIND_LOWER_BOUND
    assert points["ode"].kind == manifest_pb2.Score.KIND_ESTIMATE
    assert (points[""].draws_parameter, points["ode"].draws_parameter) == ("draws", "")
    assert {score.coordinate_space for score in points.values()} == {"the plane"}
