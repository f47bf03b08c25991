"""The energy-based model: its gradient is its energy's, its chains keep the right density, Z is Z."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from export.artifacts.interpreter import Interpreter, Tensors, concatenate_rows, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.ebm import FAMILY, family
from export.families.ebm.energy import NOISE_SHARE, SMOOTHING, EnergyModel, Tilt, contrastive_loss
from export.families.ebm.log_partition import normaliser
from export.families.ebm.mcmc import GIVEN, AdjustedStep, UnadjustedStep
from export.families.ebm.scoring import DRAW, EnergyOfImage, EnergyOfPoint
from export.graphs import graph
from export.graphs.formats import FORMATS
from export.graphs.program import TensorSpec
from export.probability import langevin
from export.probability.langevin import ChainState, EnergyFunction
from export.probability.ppca_mixture import PpcaMixture
from export.training.trainer import Settings
from samovar import noise
from samovar.v1 import manifest_pb2

PRESET = Preset(width=8, depth=2, training=Settings(steps=1), evaluation_rows=16)


def randomise(network: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(scale * torch.randn_like(weights))


def randomised(dataset: loading.Dataset, scale: float = 0.2) -> EnergyModel:
    """A model that is far from the base with which it begins."""
    torch.manual_seed(0)
    model = FAMILY.build_network(dataset, PRESET)
    randomise(model, scale)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def interpreters(digits: loading.Dataset, moons: loading.Dataset) -> dict[str, Interpreter]:
    return {
        each.name: eager_interpreter(each.spec, FAMILY.build_programs(randomised(each), each))
        for each in (digits, moons)
    }


def play(
    interpreter: Interpreter,
    program: str,
    inputs: Mapping[str, np.ndarray] | None = None,
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tensors:
    """Four rows of a request, or as many as the inputs have."""
    count = len(next(iter((inputs or {}).values()), range(4)))
    return interpreter.run(
        program, make_rows(interpreter.program(program), seed, range(count), parameters, inputs)
    )


def autograd(landscape: EnergyFunction, x: Tensor) -> Tensor:
    """The gradient of the energy [B, D], by torch."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(landscape.energy(x)[0].sum(), x)[0]


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (7, 5, 3), (1, 2)])
def test_the_gradient_of_a_convolutional_network_is_autograds(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tilt = Tilt.of_images(shape, Preset(width=4, depth=3, training=Settings(steps=1))).double()
    randomise(tilt, 0.2)
    x = torch.randn(5, math.prod(shape)).double()
    torch.testing.assert_close(tilt.energy(x)[1], autograd(tilt, x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tilt.energy(x)[0], tilt(x))


def test_the_gradient_of_the_energy_is_autograds(dataset: loading.Dataset) -> None:
    model = randomised(dataset).double()
    x = torch.randn(6, model.dimensions).double()
    assert autograd(model.tilt, x).abs().max() > 0.1
    torch.testing.assert_close(model.energy(x)[1], autograd(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("format", FORMATS)
def test_the_exported_gradient_is_autograds(format: str, dataset: loading.Dataset, tmp_path: Path) -> None:
    """To the last digits of a float32."""
    model, rows = randomised(dataset), dataset.test.rows[:7]
    exported = EnergyOfImage(model) if dataset.spec.num_levels else EnergyOfPoint(model)
    module = graph.Graph(
        "energy",
        exported.eval(),
        (dataset.spec.tensor,),
        (
            TensorSpec("energy"),
            TensorSpec("gradient", shape=rows.shape[1:]),
            TensorSpec("gradient_norm"),
        ),
    )
    energy, gradient, norm = graph.load(graph.write(module, [format], tmp_path)[format], format)([rows])
    x = model.coordinates(torch.from_numpy(rows))
    np.testing.assert_allclose(energy, model.energy(x)[0].numpy(), rtol=1e-5, atol=1e-4)
    expected = autograd(model, x)
    np.testing.assert_allclose(gradient.reshape(7, -1), expected.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norm, expected.norm(dim=1).numpy(), rtol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_an_exported_step_descends_autograds_gradient(
    format: str, dataset: loading.Dataset, tmp_path: Path
) -> None:
    model = randomised(dataset)
    program = FAMILY.build_programs(model, dataset)[1]
    step = next(entry for entry in graph.collect([program]) if entry.name == "sample_langevin_step")
    step.module.eval()
    x = model.base.sample(5)
    state = {"x": x, "gradient": model.energy(x)[1], "step_size": torch.full((5,), 1e-3)}
    inputs = [state.get(spec.name, torch.zeros(5, *spec.shape)).numpy() for spec in step.inputs]
    typed = [array.astype(spec.dtype) for array, spec in zip(inputs, step.inputs, strict=True)]
    moved, _, gradient, _, _ = graph.load(graph.write(step, [format], tmp_path)[format], format)(typed)
    expected = x - 1e-3 * autograd(model, x)
    np.testing.assert_allclose(moved, expected.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient, autograd(model, expected).numpy(), rtol=1e-3, atol=1e-3)


def test_a_mixture_is_the_sum_of_its_normal_distributions() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    rows = torch.randn(300, 5).double() @ torch.randn(5, 5).double() + 3 * labels.unsqueeze(1)
    mixture = PpcaMixture.fit(rows, labels, 4, 0.5).double()
    parts = [rows[labels == label] for label in range(3)]
    # Four factors of five dimensions leave a single variance over, so the fit is the sample covariance.
    normals = [
        torch.distributions.MultivariateNormal(
            part.mean(0), torch.cov(part.T, correction=0) + 0.25 * torch.eye(5).double()
        )
        for part in parts
    ]
    x = torch.randn(20, 5).double() * 3
    densities = [normal.log_prob(x) for normal in normals]  # type: ignore[no-untyped-call]
    exact = torch.stack(densities).logsumexp(0) - math.log(3)
    torch.testing.assert_close(-mixture.energy(x)[0], exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixture.energy(x)[1], autograd(mixture, x), rtol=1e-9, atol=1e-9)


def test_draws_of_a_mixture_have_its_moments() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    rows = torch.randn(300, 5) @ torch.randn(5, 5) + 3 * labels.unsqueeze(1)
    drawn = PpcaMixture.fit(rows, labels, 4, 0.5).sample(200_000)
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), atol=0.05, rtol=0)
    covariance = torch.cov(rows.T, correction=0) + 0.25 * torch.eye(5)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0.02, atol=0.1)


def test_the_contrastive_loss_by_hand() -> None:
    """One row with f = 0.3, told from noise with f = -1 and 2: f low means data."""
    ratio = [1 / (1 + NOISE_SHARE * math.exp(f)) for f in (0.3, -1.0, 2.0)]
    expected = -math.log(ratio[0]) - math.log(1 - ratio[1]) - math.log(1 - ratio[2])
    loss = contrastive_loss(torch.tensor([0.3]), torch.tensor([[-1.0], [2.0]]))
    assert float(loss) == pytest.approx(expected)


def test_the_loss_lowers_the_energy_of_data_and_raises_that_of_noise() -> None:
    """The sign that the literature confuses: - grad log p = grad E(data) - E_noise[...]."""
    on_data, on_noise = torch.zeros(1, requires_grad=True), torch.zeros(NOISE_SHARE, 1, requires_grad=True)
    by_data, by_noise = torch.autograd.grad(contrastive_loss(on_data, on_noise).sum(), (on_data, on_noise))
    assert float(by_data) > 0
    assert (by_noise < 0).all()


def test_the_loss_is_least_at_the_log_ratio_of_the_densities() -> None:
    """With data N(1, 1) and noise N(0, 1), f(x) = 1/2 - x, at which Z is 1."""
    torch.manual_seed(0)
    on_data, on_noise = torch.randn(200_000) + 1, torch.randn(NOISE_SHARE, 200_000)

    def loss(slope: float, offset: float) -> float:
        return float(contrastive_loss(offset - slope * on_data, offset - slope * on_noise).mean())

    least = loss(1, 0.5)
    assert all(least < loss(1 + a, 0.5 + b) for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)))


def test_the_acceptance_ratio_by_hand() -> None:
    """E = x^2 / 2 from 1 to 0.7 with step size 0.2, so q(b | a) = N(b; 0.8 a, 0.4)."""
    here, there = (
        ChainState(torch.tensor([[x]]), torch.tensor([x**2 / 2]), torch.tensor([[x]])) for x in (1.0, 0.7)
    )
    forwards, backwards = -((0.7 - 0.8) ** 2) / 0.8, -((1 - 0.56) ** 2) / 0.8
    expected = (1 - 0.49) / 2 + backwards - forwards
    assert float(langevin.log_acceptance(here, there, torch.tensor([0.2]))) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_acceptance_ratio_is_detailed_balance() -> None:
    """p(a) q(b | a) min(1, r) is the same both ways."""
    torch.manual_seed(0)
    model, eta = PpcaMixture.isotropic(3, 0.7), torch.full((50,), 0.3)
    a, b = (ChainState(x, *model.energy(x)) for x in torch.randn(2, 50, 3))

    def flow(start: ChainState, end: ChainState) -> Tensor:
        step = functional.gaussian_nll_loss(
            end.x, start.x - 0.3 * start.gradient, torch.full_like(end.x, 0.6), reduction="none"
        ).sum(1)
        return -start.energy - step + langevin.log_acceptance(start, end, eta).clamp(max=0)

    torch.testing.assert_close(flow(a, b), flow(b, a))


ETA, CHAINS = 0.4, 40_000


class Bowl(torch.nn.Module):
    """The energy of N(0, I)."""

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * x.square().sum(1), x


def variance(step: torch.nn.Module, adjusted: bool) -> tuple[float, float, float]:
    """Mean, variance and acceptance of chains on N(0, 1) after 40 steps from a point far off."""
    torch.manual_seed(0)
    known = torch.zeros(CHAINS, 1, dtype=torch.uint8)
    x = torch.full((CHAINS, 1), 3.0)
    state = (x, *Bowl().energy(x), torch.zeros(CHAINS), torch.zeros_like(x))
    size, scale = torch.full((CHAINS,), ETA), torch.ones(CHAINS)
    for _ in range(40):
        drawn = torch.randn(CHAINS, 1)
        if adjusted:
            state = step(*state, known, size, drawn, torch.rand(CHAINS))
        else:
            state = step(state[0], *state[2:], known, size, scale, drawn)
    return float(state[0].mean()), float(state[0].var()), float(state[3].mean() / 40)


def test_adjusted_chains_have_the_variance_of_the_density() -> None:
    mean, spread, acceptance = variance(AdjustedStep(Bowl()), adjusted=True)
    error = 4 * math.sqrt(2 / CHAINS)
    assert mean == pytest.approx(0, abs=4 / math.sqrt(CHAINS))
    assert spread == pytest.approx(1, abs=error)
    assert 0.8 < acceptance < 1


def test_unadjusted_chains_have_the_variance_of_theory() -> None:
    """1 / (1 - eta / 2): the step is downhill with noise sqrt(2 eta), and biased by as much as is known."""
    mean, spread, acceptance = variance(UnadjustedStep(Bowl()), adjusted=False)
    expected = 1 / (1 - ETA / 2)
    assert mean == pytest.approx(0, abs=4 * math.sqrt(expected / CHAINS))
    assert spread == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / CHAINS))
    assert acceptance == 1


def test_proposals_into_the_void_are_refused() -> None:
    here = ChainState(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1))
    there = ChainState(torch.ones(2, 1), torch.tensor([math.nan, math.inf]), torch.zeros(2, 1))
    place, accepted = langevin.adjust(here, there, torch.ones(2), torch.full((2,), 1e-30))
    assert not accepted.any()
    assert (place.x == 0).all()


def test_annealing_finds_a_known_normaliser_from_both_sides() -> None:
    """From N(0, I) to exp(-|x|^2) times its density: Z = 3^(-D / 2)."""
    torch.manual_seed(0)

    class Square(torch.nn.Module):
        def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.square().sum(1), 2 * x

    base, expected = PpcaMixture.isotropic(4, 1.0), -2 * math.log(3)
    path, times = langevin.Path(base, Square()), torch.linspace(0, 1, 41)
    _, forwards = path.walk(base.sample(4000), times, 0.2, "forwards")
    _, backwards = path.walk(base.sample(4000) / math.sqrt(3), times.flip(0), 0.2, "backwards")
    for sign, log_weights in ((1, forwards), (-1, backwards)):
        log_z, error = langevin.log_mean(log_weights)
        assert error < 0.02
        assert sign * log_z == pytest.approx(expected, abs=4 * error)


def test_quadrature_finds_the_normaliser_of_points(moons: loading.Dataset) -> None:
    """Of the base, 1; and of any energy, the number that makes its density integrate to 1."""
    assert normaliser(FAMILY.build_network(moons, PRESET)).log_z == pytest.approx(0, abs=1e-3)
    model = randomised(moons, 0.3)
    known = normaliser(model)
    axis = torch.linspace(-8, 8, 251)
    density = (-model.energy(torch.cartesian_prod(axis, axis))[0] - known.log_z).double().exp()
    assert abs(known.log_z) > 0.02
    assert float(density.sum() * (16 / 250) ** 2) == pytest.approx(1, abs=2e-3)
    assert known.standard_error < 1e-3


def test_annealing_and_quadrature_agree(moons: loading.Dataset) -> None:
    model = randomised(moons, 0.3)
    exact = normaliser(model).log_z
    torch.manual_seed(1)
    path = langevin.Path(model.base, model.tilt)
    _, log_weights = path.walk(model.base.sample(2000), torch.linspace(0, 1, 31), 0.05, "forwards")
    log_z, error = langevin.log_mean(log_weights)
    assert log_z == pytest.approx(exact, abs=4 * error)


def test_the_score_is_minus_the_energy_minus_log_z(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter, known = interpreters[dataset.name], normaliser(randomised(dataset))
    given = {dataset.spec.tensor.name: dataset.test.rows[:5]}
    energy, score = play(interpreter, "energy", given)["energy"], play(interpreter, "score", given)
    np.testing.assert_allclose(score["log_density"], -energy - known.log_z, rtol=1e-5)
    np.testing.assert_allclose(score["standard_error"], known.standard_error, rtol=1e-5)
    assert f"{known.log_z:.3f}" in interpreter.program("score").doc
    semantics = interpreter.program("score").score
    assert semantics.kind == manifest_pb2.Score.KIND_ESTIMATE
    assert interpreter.program("energy").score.kind == manifest_pb2.Score.KIND_UNNORMALIZED
    assert semantics.dimensions == dataset.test.rows[0].size


def test_each_way_to_log_z_is_measured_with_an_error_of_its_own(
    digits: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter, known, rows = interpreters["digits"], normaliser(randomised(digits)), digits.test.rows[:2]
    weighed = play(interpreter, "score", {"image": rows})
    forwards, backwards = (
        family._log_normaliser(interpreter, rows, weighed, "log Z", way) for way in ("", "_reverse")
    )
    assert known.standard_error != pytest.approx(known.reverse_standard_error, rel=0.01)
    for figure, value, error in (
        (forwards, known.log_z, known.standard_error),
        (backwards, known.reverse, known.reverse_standard_error),
    ):
        assert figure.value == pytest.approx(value, rel=1e-4, abs=1e-3)
        assert figure.standard_error == pytest.approx(error, rel=1e-5)


def test_a_drawn_blur_is_the_documented_noise(
    digits: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, interpreter, given = randomised(digits), interpreters["digits"], {"image": digits.test.rows[:3]}
    still, drawn = (
        play(interpreter, "score", given, {"blur": blur}, seed=8)["log_density"] for blur in (0, DRAW)
    )
    normal = noise.normal(np.full(3, 8, np.uint64), np.arange(3), np.zeros(3, int), 0, [64])
    x = model.coordinates(torch.from_numpy(given["image"]))
    change = model.energy(x)[0] - model.energy(x + SMOOTHING * torch.from_numpy(normal))[0]
    np.testing.assert_allclose(drawn - still, change.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("program", ["sample", "sample:langevin"])
def test_known_coordinates_stay(
    program: str, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:4]
    known = loading.first_half_mask(rows)
    walked = play(interpreters[dataset.name], program, {name: rows, "known": known}, {"steps": 7})[name]
    np.testing.assert_array_equal(walked[known == 1], rows[known == 1])
    assert (walked[known == 0] != rows[known == 0]).any()


def test_a_chain_starts_where_it_is_told_to(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """One step of no size from the given row leaves it there; from noise it is a draw of the base."""
    interpreter, name, rows = interpreters[dataset.name], dataset.spec.tensor.name, dataset.test.rows[:4]
    still = {"steps": 1, "step_size": 1e-6}
    given = play(interpreter, "sample", {name: rows}, {**still, "start": GIVEN})
    ignored = play(interpreter, "sample", {name: rows}, still)
    free = play(interpreter, "sample", None, still)
    np.testing.assert_array_equal(ignored[name], free[name])
    assert (
        np.abs(given[name].astype(float) - rows).mean()
        < 0.25 * np.abs(free[name].astype(float) - rows).mean()
    )


def test_without_noise_a_chain_descends(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    parameters = {"noise_scale": 0, "step_size": 1e-3}
    energies = [
        play(interpreters[dataset.name], "sample:langevin", None, {**parameters, "steps": steps})["energy"]
        for steps in (1, 10, 40)
    ]
    assert (np.diff(energies, axis=0) < 0).all()


def test_rows_of_every_age_and_size_mix(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter = interpreters[dataset.name]
    program = interpreter.program("sample")
    settings: list[dict[str, float]] = [{"steps": 3}, {"steps": 9, "step_size": 1e-3}, {"steps": 1}]
    parts = [make_rows(program, seed, range(2), each) for seed, each in enumerate(settings)]
    together = interpreter.run("sample", concatenate_rows(parts))
    apart = [interpreter.run("sample", part) for part in parts]
    for name, values in together.items():
        expected = np.concatenate([each[name] for each in apart])
        tolerance = 1 if values.dtype == np.uint8 else 1e-4
        np.testing.assert_allclose(values.astype(float), expected.astype(float), rtol=1e-4, atol=tolerance)
    assert ((together["acceptance"] >= 0) & (together["acceptance"] <= 1)).all()
