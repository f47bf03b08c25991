"""Tests of diffusion scores on closed-form densities: the ODE is exact, the bound is a lower bound."""

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
from export.families.diffusion.ode_likelihood import NUM_PROBES, ImageStep
from export.families.diffusion.solvers import SIGMA_MAX
from export.families.diffusion.variational_bound import BoundStep, DecoderLikelihood
from export.graphs.program import DataSpec, TensorSpec
from samovar.v1 import manifest_pb2
from tests.support.denoisers import PRESET, NormalPairNetwork, OvershootingNetwork, build_interpreter

GRID_CELLS = 60


def score(
    interpreter: Interpreter, name: str, rows: NDArray[np.generic], parameters: Mapping[str, float]
) -> tuple[NDArray[np.float64], ...]:
    """Return all outputs of a score program, in order."""
    inputs = {interpreter.manifest.data_spec.tensor.name: rows}
    request = make_rows(interpreter.program(name), 3, range(len(rows)), parameters, inputs)
    return tuple(array.astype(np.float64) for array in interpreter.run(name, request).values())


def grid_points(limit: float) -> NDArray[np.float32]:
    axis = ((np.arange(GRID_CELLS) + 0.5) / GRID_CELLS * 2 - 1) * limit
    return np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2).astype(np.float32)


@pytest.fixture(scope="module")
def pair() -> NormalPairNetwork:
    return NormalPairNetwork()


@pytest.fixture(scope="module")
def interpreter(pair: NormalPairNetwork) -> Interpreter:
    return build_interpreter(pair)


def test_ode_score_of_exact_denoiser_converges_to_the_density(
    pair: NormalPairNetwork, interpreter: Interpreter
) -> None:
    """More steps reduce the error, where the density is not negligible."""
    rows = grid_points(2)
    rows = rows[pair.log_density(rows) > -6]
    errors = [
        np.abs(score(interpreter, "score:ode", rows, {"steps": steps})[0] - pair.log_density(rows)).max()
        for steps in (20, 160)
    ]
    assert errors[1] < 2e-3 < errors[0]


def test_ode_density_integrates_to_one(interpreter: Interpreter) -> None:
    (logs,) = score(interpreter, "score:ode", grid_points(3), {"steps": 40})
    assert np.exp(logs).sum() * (6 / GRID_CELLS) ** 2 == pytest.approx(1, abs=2e-3)


def test_bound_of_exact_denoiser_is_tight(pair: NormalPairNetwork, interpreter: Interpreter) -> None:
    rows = np.tile(grid_points(1)[:: GRID_CELLS + 1], (20, 1))
    bound, error = score(interpreter, "score", rows, {"draws": 50})
    gap = pair.log_density(rows) - bound
    assert abs(gap.mean()) < 3 * gap.std() / math.sqrt(len(gap))
    assert error.mean() == pytest.approx(gap.std(), rel=0.2)


def test_bound_of_inexact_denoiser_is_below_the_density_of_the_data() -> None:
    """No density has this denoiser, which overshoots."""
    model, rows = build_interpreter(OvershootingNetwork()), NormalPairNetwork().sample(1000)
    bound, _ = score(model, "score", rows, {"draws": 30})
    gap = NormalPairNetwork().log_density(rows) - bound
    assert gap.mean() > 0.1
    assert gap.mean() > 5 * gap.std() / math.sqrt(len(gap))


def test_prior_divergence_equals_closed_form(moons: loading.Dataset) -> None:
    """KL divergence of N(x, SIGMA_MAX^2) from N(0, SIGMA_MAX^2 + s^2), summed over coordinates."""
    denoiser = FAMILY.build_network(moons, PRESET)
    rows = 30 * torch.randn(20, 2)
    variance = SIGMA_MAX**2 + denoiser.data_std**2
    ratios = (SIGMA_MAX**2 + rows.square()) / variance
    expected = 0.5 * (ratios - 1 - math.log(SIGMA_MAX**2 / variance)).sum(1)
    torch.testing.assert_close(BoundStep(denoiser).prior_divergence(rows), expected, rtol=1e-3, atol=1e-6)


def test_bound_with_more_draws_has_smaller_error_and_the_same_mean(interpreter: Interpreter) -> None:
    rows = np.zeros((500, 2), np.float32)
    few_draws, many_draws = (score(interpreter, "score", rows, {"draws": draws}) for draws in (4, 64))
    assert few_draws[0].mean() == pytest.approx(
        many_draws[0].mean(), abs=4 * few_draws[0].std() / math.sqrt(500)
    )
    assert many_draws[0].std() < few_draws[0].std() / 3
    assert score(interpreter, "score", rows[:1], {"draws": 1})[1] == 0


class EnumeratedNetwork(torch.nn.Module):
    """F of the exact denoiser for a finite set of images with given probabilities."""

    def __init__(self, images: Tensor, probabilities: Tensor, data_std: float) -> None:
        super().__init__()
        self.images, self.probabilities, self.data_std = images, probabilities, data_std

    def forward(self, image: Tensor, c_noise: Tensor, label: Tensor) -> Tensor:
        sigma = (4 * c_noise).exp().reshape(-1, 1, 1)
        norm = torch.sqrt(sigma.square() + self.data_std**2)
        x = image * norm
        squares = (x.unsqueeze(1) - self.images).square().sum((2, 3))
        weights = (self.probabilities.log() - squares / (2 * sigma.reshape(-1, 1).square())).softmax(1)
        denoised = (weights @ self.images.flatten(1)).reshape(x.shape)
        return (denoised - x * (self.data_std / norm).square()) * norm / sigma / self.data_std


def test_scores_of_integer_images_bound_their_probabilities() -> None:
    """The probabilities of all nine images of two pixels with three levels sum to about one."""
    pixels = np.array([[[a, b]] for a in range(3) for b in range(3)], np.uint8)
    probabilities = np.array([4, 1, 1, 1, 6, 2, 1, 1, 3]) / 20
    split = loading.Split(np.repeat(pixels, (20 * probabilities).astype(int), 0), np.zeros(20, np.int64))
    data_spec = DataSpec(
        "image", TensorSpec("image", "uint8", (1, 2), 0, 2), num_levels=3, class_labels=("any",)
    )
    dataset = loading.Dataset("pairs", data_spec, split, split, split, "")
    denoiser = Denoiser(dataset, PRESET)
    images = denoiser.scale(torch.from_numpy(pixels))
    exact = EnumeratedNetwork(images, torch.tensor(probabilities).float(), denoiser.data_std)
    denoiser.network = exact  # type: ignore[assignment]
    model = eager_interpreter(data_spec, FAMILY.build_programs(denoiser.eval(), dataset))

    for name, parameters in (("score", {"draws": 100}), ("score:ode", {"steps": 100})):
        nats = score(model, name, np.tile(pixels, (40, 1, 1)), parameters)[0].reshape(40, 9)
        mean, error = nats.mean(0), nats.std(0) / math.sqrt(40)
        assert (mean < np.log(probabilities) + 4 * error).all()
        assert np.exp(mean).sum() == pytest.approx(1, abs=0.1)


def test_ode_score_of_images_declares_no_standard_error(digits: loading.Dataset) -> None:
    """The standard error of the divergence is a separate output."""
    program = ode_likelihood.build_program(FAMILY.build_network(digits, PRESET), digits.spec)
    assert program.score is not None
    assert program.score.standard_error_output is None
    assert [output.name for output in program.outputs] == ["log_likelihood", "divergence_error"]


def test_decoder_likelihood_of_a_pixel_sums_to_one_over_its_levels(digits: loading.Dataset) -> None:
    """This holds for any denoised value."""
    denoiser = Denoiser(digits, PRESET).eval()
    decoder = DecoderLikelihood(denoiser)
    denoised = torch.linspace(-3, 3, 64).reshape(1, 8, 8).expand(17, -1, -1)
    clean = torch.full((17, 8, 8), -1.0)
    clean[:, 3, 4] = denoiser.scale(torch.arange(17))
    reference = clean.clone()
    reference[:, 3, 4] = clean[0, 3, 4]
    relative = decoder(clean, denoised) - decoder(reference, denoised)
    exponents = -((denoised[:, 3, 4] - clean[:, 3, 4]) / decoder.sigma).square() / 2
    torch.testing.assert_close(relative, exponents - exponents[0], rtol=1e-4, atol=1e-2)
    one_pixel = -((denoised[0, 3, 4] - decoder.scaled_levels) / decoder.sigma).square() / 2
    torch.testing.assert_close(one_pixel.log_softmax(0).exp().sum(), torch.ones(()))


def test_perceptron_divergence_equals_jacobian_trace() -> None:
    torch.manual_seed(0)
    network = Perceptron(2, PRESET, 3)
    torch.nn.init.normal_(network.output.weight)
    point, c_noise, label = torch.randn(5, 2), torch.randn(5), torch.arange(5) % 4
    output, divergence = network.forward_with_divergence(point, c_noise, label)
    torch.testing.assert_close(output, network(point, c_noise, label))
    leaf = point.clone().requires_grad_()
    outputs = network(leaf, c_noise, label)
    diagonal = [torch.autograd.grad(outputs[:, i].sum(), leaf, retain_graph=True)[0][:, i] for i in (0, 1)]
    torch.testing.assert_close(divergence, diagonal[0] + diagonal[1], rtol=1e-4, atol=1e-5)


def test_image_step_divergence_equals_jacobian_products_along_probes(digits: loading.Dataset) -> None:
    torch.manual_seed(0)
    denoiser = Denoiser(digits, PRESET).eval().requires_grad_(False)
    for weights in denoiser.parameters():
        weights.add_(0.1 * torch.randn_like(weights))
    step, y, zeros = ImageStep(denoiser), torch.randn(1, 8, 8), torch.zeros(1)
    uniform, label = torch.rand(1, NUM_PROBES, 8, 8), torch.tensor([3])
    _, _, _, log_density, variance = step(
        y, y, torch.zeros_like(y), zeros, zeros, label, uniform, torch.tensor([6]), torch.tensor([12])
    )
    stage = step.stage(torch.tensor([6]), torch.tensor([12]))
    leaf = y.clone().requires_grad_()
    output = denoiser.raw_output(leaf, stage.sigma, label)
    slopes = [
        float((torch.autograd.grad((output * probe).sum(), leaf, retain_graph=True)[0] * probe).sum())
        for probe in torch.where(uniform[0] < 0.5, -1.0, 1.0)
    ]
    weight = float(stage.weight)
    assert float(log_density) == pytest.approx(-weight * sum(slopes) / 2, rel=0.01, abs=1e-4)
    assert float(variance.sqrt()) == pytest.approx(weight * abs(slopes[0] - slopes[1]) / 2, rel=0.02)


def test_score_programs_declare_their_kind_and_space(
    digits: loading.Dataset, interpreter: Interpreter
) -> None:
    points = {
        program.variant: program.score
        for program in interpreter.manifest.programs
        if program.HasField("score")
    }
    assert points[""].kind == manifest_pb2.Score.KIND_LOWER_BOUND
    assert points["ode"].kind == manifest_pb2.Score.KIND_ESTIMATE
    assert (points[""].draws_parameter, points["ode"].draws_parameter) == ("draws", "")
    assert {score.coordinate_space for score in points.values()} == {"the plane"}
