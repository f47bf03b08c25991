"""Tests of the energy-based model: gradients, losses, stationary density of chains, estimates of log Z."""

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
from export.families.ebm.energy import NOISE_RATIO, SMOOTHING_STD, EnergyModel, Tilt, contrastive_loss
from export.families.ebm.log_partition import estimate_log_partition
from export.families.ebm.mcmc import GIVEN, LangevinStep, MalaStep
from export.families.ebm.scoring import DRAW, ImageEnergy, PointEnergy
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


def randomize(network: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(scale * torch.randn_like(weights))


def randomized(dataset: loading.Dataset, scale: float = 0.2) -> EnergyModel:
    """Return a model with random weights, far from its base."""
    torch.manual_seed(0)
    model = FAMILY.build_network(dataset, PRESET)
    randomize(model, scale)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def interpreters(digits: loading.Dataset, moons: loading.Dataset) -> dict[str, Interpreter]:
    return {
        dataset.name: eager_interpreter(dataset.spec, FAMILY.build_programs(randomized(dataset), dataset))
        for dataset in (digits, moons)
    }


def run(
    interpreter: Interpreter,
    program: str,
    inputs: Mapping[str, np.ndarray] | None = None,
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tensors:
    """Run a request with one row for each input row, or with four rows if there are no inputs."""
    count = len(next(iter((inputs or {}).values()), range(4)))
    return interpreter.run(
        program, make_rows(interpreter.program(program), seed, range(count), parameters, inputs)
    )


def autograd(energy_function: EnergyFunction, x: Tensor) -> Tensor:
    """Return the gradient of the energy [B, D], computed by torch."""
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(energy_function.energy(x)[0].sum(), x)[0]


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (7, 5, 3), (1, 2)])
def test_tilt_gradient_of_images_equals_autograd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tilt = Tilt.for_images(shape, Preset(width=4, depth=3, training=Settings(steps=1))).double()
    randomize(tilt, 0.2)
    x = torch.randn(5, math.prod(shape)).double()
    torch.testing.assert_close(tilt.energy(x)[1], autograd(tilt, x), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tilt.energy(x)[0], tilt(x))


def test_energy_gradient_equals_autograd(dataset: loading.Dataset) -> None:
    model = randomized(dataset).double()
    x = torch.randn(6, model.dimensions).double()
    assert autograd(model.tilt, x).abs().max() > 0.1
    torch.testing.assert_close(model.energy(x)[1], autograd(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_exported_energy_gradient_equals_autograd(
    format: str, dataset: loading.Dataset, tmp_path: Path
) -> None:
    """Up to float32 rounding."""
    model, rows = randomized(dataset), dataset.test.rows[:7]
    exported = ImageEnergy(model) if dataset.spec.num_levels else PointEnergy(model)
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
    x = model.to_coordinates(torch.from_numpy(rows))
    np.testing.assert_allclose(energy, model.energy(x)[0].numpy(), rtol=1e-5, atol=1e-4)
    expected = autograd(model, x)
    np.testing.assert_allclose(gradient.reshape(7, -1), expected.numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(norm, expected.norm(dim=1).numpy(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_exported_langevin_step_follows_autograd_gradient(
    format: str, dataset: loading.Dataset, tmp_path: Path
) -> None:
    model = randomized(dataset)
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


def test_mixture_density_equals_sum_of_normal_densities() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    rows = torch.randn(300, 5).double() @ torch.randn(5, 5).double() + 3 * labels.unsqueeze(1)
    mixture = PpcaMixture.fit(rows, labels, 4, 0.5).double()
    parts = [rows[labels == label] for label in range(3)]
    # Four factors in five dimensions leave one isotropic variance, so the fit is the sample covariance.
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


def test_mixture_samples_have_its_moments() -> None:
    torch.manual_seed(0)
    labels = torch.arange(300) % 3
    rows = torch.randn(300, 5) @ torch.randn(5, 5) + 3 * labels.unsqueeze(1)
    drawn = PpcaMixture.fit(rows, labels, 4, 0.5).sample(200_000)
    torch.testing.assert_close(drawn.mean(0), rows.mean(0), atol=0.05, rtol=0)
    covariance = torch.cov(rows.T, correction=0) + 0.25 * torch.eye(5)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0.02, atol=0.1)


def test_contrastive_loss_equals_hand_computed_value() -> None:
    """One row with f = 0.3 and noise with f = -1 and 2. Low f means data."""
    p_data = [1 / (1 + NOISE_RATIO * math.exp(f)) for f in (0.3, -1.0, 2.0)]
    expected = -math.log(p_data[0]) - math.log(1 - p_data[1]) - math.log(1 - p_data[2])
    loss = contrastive_loss(torch.tensor([0.3]), torch.tensor([[-1.0], [2.0]]))
    assert float(loss) == pytest.approx(expected)


def test_contrastive_loss_lowers_energy_of_data_and_raises_energy_of_noise() -> None:
    """The sign is that of - grad log p = grad E(data) - E_noise[...]."""
    f_data, f_noise = torch.zeros(1, requires_grad=True), torch.zeros(NOISE_RATIO, 1, requires_grad=True)
    data_gradient, noise_gradient = torch.autograd.grad(
        contrastive_loss(f_data, f_noise).sum(), (f_data, f_noise)
    )
    assert float(data_gradient) > 0
    assert (noise_gradient < 0).all()


def test_contrastive_loss_is_minimal_at_log_density_ratio() -> None:
    """For data N(1, 1) and noise N(0, 1) the minimum is f(x) = 1/2 - x, and Z is 1."""
    torch.manual_seed(0)
    data, noise_rows = torch.randn(200_000) + 1, torch.randn(NOISE_RATIO, 200_000)

    def loss(slope: float, offset: float) -> float:
        return float(contrastive_loss(offset - slope * data, offset - slope * noise_rows).mean())

    minimum = loss(1, 0.5)
    assert all(minimum < loss(1 + a, 0.5 + b) for a, b in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)))


def test_log_acceptance_equals_hand_computed_value() -> None:
    """E = x^2 / 2 from 1 to 0.7 with step size 0.2, so q(b | a) = N(b; 0.8 a, 0.4)."""
    current, proposal = (
        ChainState(torch.tensor([[x]]), torch.tensor([x**2 / 2]), torch.tensor([[x]])) for x in (1.0, 0.7)
    )
    forwards, backwards = -((0.7 - 0.8) ** 2) / 0.8, -((1 - 0.56) ** 2) / 0.8
    expected = (1 - 0.49) / 2 + backwards - forwards
    assert float(langevin.log_acceptance(current, proposal, torch.tensor([0.2]))) == pytest.approx(
        expected, rel=1e-5
    )


def test_log_acceptance_satisfies_detailed_balance() -> None:
    """p(a) q(b | a) min(1, r) is symmetric in a and b."""
    torch.manual_seed(0)
    model, eta = PpcaMixture.isotropic(3, 0.7), torch.full((50,), 0.3)
    a, b = (ChainState(x, *model.energy(x)) for x in torch.randn(2, 50, 3))

    def flow(start: ChainState, end: ChainState) -> Tensor:
        step = functional.gaussian_nll_loss(
            end.x, start.x - 0.3 * start.gradient, torch.full_like(end.x, 0.6), reduction="none"
        ).sum(1)
        return -start.energy - step + langevin.log_acceptance(start, end, eta).clamp(max=0)

    torch.testing.assert_close(flow(a, b), flow(b, a))


STEP_SIZE, NUM_CHAINS = 0.4, 40_000


class NormalEnergy(torch.nn.Module):
    """Energy of N(0, I)."""

    def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * x.square().sum(1), x


def run_chains(step: torch.nn.Module, adjusted: bool) -> tuple[float, float, float]:
    """Return mean, variance and acceptance rate of chains on N(0, 1), 40 steps after they start at 3."""
    torch.manual_seed(0)
    known = torch.zeros(NUM_CHAINS, 1, dtype=torch.uint8)
    x = torch.full((NUM_CHAINS, 1), 3.0)
    state = (x, *NormalEnergy().energy(x), torch.zeros(NUM_CHAINS), torch.zeros_like(x))
    size, scale = torch.full((NUM_CHAINS,), STEP_SIZE), torch.ones(NUM_CHAINS)
    for _ in range(40):
        step_noise = torch.randn(NUM_CHAINS, 1)
        if adjusted:
            state = step(*state, known, size, step_noise, torch.rand(NUM_CHAINS))
        else:
            state = step(state[0], *state[2:], known, size, scale, step_noise)
    return float(state[0].mean()), float(state[0].var()), float(state[3].mean() / 40)


def test_mala_chains_have_the_variance_of_the_density() -> None:
    mean, variance, acceptance = run_chains(MalaStep(NormalEnergy()), adjusted=True)
    error = 4 * math.sqrt(2 / NUM_CHAINS)
    assert mean == pytest.approx(0, abs=4 / math.sqrt(NUM_CHAINS))
    assert variance == pytest.approx(1, abs=error)
    assert 0.8 < acceptance < 1


def test_langevin_chains_have_the_biased_variance_of_theory() -> None:
    """The variance is 1 / (1 - eta / 2)."""
    mean, variance, acceptance = run_chains(LangevinStep(NormalEnergy()), adjusted=False)
    expected = 1 / (1 - STEP_SIZE / 2)
    assert mean == pytest.approx(0, abs=4 * math.sqrt(expected / NUM_CHAINS))
    assert variance == pytest.approx(expected, abs=4 * expected * math.sqrt(2 / NUM_CHAINS))
    assert acceptance == 1


def test_accept_or_reject_rejects_nonfinite_energies() -> None:
    current = ChainState(torch.zeros(2, 1), torch.zeros(2), torch.zeros(2, 1))
    proposal = ChainState(torch.ones(2, 1), torch.tensor([math.nan, math.inf]), torch.zeros(2, 1))
    state, is_accepted = langevin.accept_or_reject(current, proposal, torch.ones(2), torch.full((2,), 1e-30))
    assert not is_accepted.any()
    assert (state.x == 0).all()


def test_annealing_estimates_known_log_z_in_both_directions() -> None:
    """The path is from N(0, I) to N(0, I) exp(-|x|^2), so Z = 3^(-D / 2)."""
    torch.manual_seed(0)

    class SquaredNorm(torch.nn.Module):
        def energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x.square().sum(1), 2 * x

    base, expected = PpcaMixture.isotropic(4, 1.0), -2 * math.log(3)
    path, times = langevin.AnnealingPath(base, SquaredNorm()), torch.linspace(0, 1, 41)
    _, forwards = path.anneal(base.sample(4000), times, 0.2, "forwards")
    _, backwards = path.anneal(base.sample(4000) / math.sqrt(3), times.flip(0), 0.2, "backwards")
    for sign, log_weights in ((1, forwards), (-1, backwards)):
        log_z, error = langevin.log_mean_weight(log_weights)
        assert error < 0.02
        assert sign * log_z == pytest.approx(expected, abs=4 * error)


def test_quadrature_log_z_normalizes_the_density_of_points(moons: loading.Dataset) -> None:
    """log Z of an untrained model is 0. For any model, the density integrates to 1."""
    assert estimate_log_partition(FAMILY.build_network(moons, PRESET)).log_z == pytest.approx(0, abs=1e-3)
    model = randomized(moons, 0.3)
    partition = estimate_log_partition(model)
    axis = torch.linspace(-8, 8, 251)
    density = (-model.energy(torch.cartesian_prod(axis, axis))[0] - partition.log_z).double().exp()
    assert abs(partition.log_z) > 0.02
    assert float(density.sum() * (16 / 250) ** 2) == pytest.approx(1, abs=2e-3)
    assert partition.standard_error < 1e-3


def test_annealing_agrees_with_quadrature(moons: loading.Dataset) -> None:
    model = randomized(moons, 0.3)
    exact = estimate_log_partition(model).log_z
    torch.manual_seed(1)
    path = langevin.AnnealingPath(model.base, model.tilt)
    _, log_weights = path.anneal(model.base.sample(2000), torch.linspace(0, 1, 31), 0.05, "forwards")
    log_z, error = langevin.log_mean_weight(log_weights)
    assert log_z == pytest.approx(exact, abs=4 * error)


def test_score_is_negative_energy_minus_log_z(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter, partition = interpreters[dataset.name], estimate_log_partition(randomized(dataset))
    inputs = {dataset.spec.tensor.name: dataset.test.rows[:5]}
    energy, score = run(interpreter, "energy", inputs)["energy"], run(interpreter, "score", inputs)
    np.testing.assert_allclose(score["log_density"], -energy - partition.log_z, rtol=1e-5)
    np.testing.assert_allclose(score["standard_error"], partition.standard_error, rtol=1e-5)
    assert f"{partition.log_z:.3f}" in interpreter.program("score").doc
    declaration = interpreter.program("score").score
    assert declaration.kind == manifest_pb2.Score.KIND_ESTIMATE
    assert interpreter.program("energy").score.kind == manifest_pb2.Score.KIND_UNNORMALIZED
    assert declaration.dimensions == dataset.test.rows[0].size


def test_quality_reports_both_log_z_estimates_with_their_errors(
    digits: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter, rows = interpreters["digits"], digits.test.rows[:2]
    partition = estimate_log_partition(randomized(digits))
    scores = run(interpreter, "score", {"image": rows})
    forwards, backwards = (
        family._log_partition(interpreter, rows, scores, "log Z", suffix) for suffix in ("", "_reverse")
    )
    assert partition.standard_error != pytest.approx(partition.reverse_standard_error, rel=0.01)
    for quality, value, error in (
        (forwards, partition.log_z, partition.standard_error),
        (backwards, partition.reverse_log_z, partition.reverse_standard_error),
    ):
        assert quality.value == pytest.approx(value, rel=1e-4, abs=1e-3)
        assert quality.standard_error == pytest.approx(error, rel=1e-5)


def test_score_with_drawn_blur_adds_the_documented_noise(
    digits: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, interpreter, inputs = randomized(digits), interpreters["digits"], {"image": digits.test.rows[:3]}
    sharp, blurred = (
        run(interpreter, "score", inputs, {"blur": blur}, seed=8)["log_density"] for blur in (0, DRAW)
    )
    blur_noise = noise.normal(np.full(3, 8, np.uint64), np.arange(3), np.zeros(3, int), 0, [64])
    x = model.to_coordinates(torch.from_numpy(inputs["image"]))
    change = model.energy(x)[0] - model.energy(x + SMOOTHING_STD * torch.from_numpy(blur_noise))[0]
    np.testing.assert_allclose(blurred - sharp, change.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("program", ["sample", "sample:langevin"])
def test_sample_keeps_known_elements(
    program: str, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:4]
    known = loading.first_half_mask(rows)
    samples = run(interpreters[dataset.name], program, {name: rows, "known": known}, {"steps": 7})[name]
    np.testing.assert_array_equal(samples[known == 1], rows[known == 1])
    assert (samples[known == 0] != rows[known == 0]).any()


def test_sample_starts_from_the_row_or_from_the_base(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """With a tiny step size, one step hardly changes the first state."""
    interpreter, name, rows = interpreters[dataset.name], dataset.spec.tensor.name, dataset.test.rows[:4]
    tiny_step = {"steps": 1, "step_size": 1e-6}
    from_row = run(interpreter, "sample", {name: rows}, {**tiny_step, "start": GIVEN})
    with_ignored_row = run(interpreter, "sample", {name: rows}, tiny_step)
    from_base = run(interpreter, "sample", None, tiny_step)
    np.testing.assert_array_equal(with_ignored_row[name], from_base[name])
    assert (
        np.abs(from_row[name].astype(float) - rows).mean()
        < 0.25 * np.abs(from_base[name].astype(float) - rows).mean()
    )


def test_langevin_without_noise_descends_the_energy(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    parameters = {"noise_scale": 0, "step_size": 1e-3}
    energies = [
        run(interpreters[dataset.name], "sample:langevin", None, {**parameters, "steps": steps})["energy"]
        for steps in (1, 10, 40)
    ]
    assert (np.diff(energies, axis=0) < 0).all()


def test_sample_of_mixed_steps_and_step_sizes_in_one_batch_equals_separate_runs(
    dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    interpreter = interpreters[dataset.name]
    program = interpreter.program("sample")
    settings: list[dict[str, float]] = [{"steps": 3}, {"steps": 9, "step_size": 1e-3}, {"steps": 1}]
    parts = [make_rows(program, seed, range(2), parameters) for seed, parameters in enumerate(settings)]
    batched = interpreter.run("sample", concatenate_rows(parts))
    separate = [interpreter.run("sample", part) for part in parts]
    for name, values in batched.items():
        expected = np.concatenate([outputs[name] for outputs in separate])
        tolerance = 1 if values.dtype == np.uint8 else 1e-4
        np.testing.assert_allclose(values.astype(float), expected.astype(float), rtol=1e-4, atol=tolerance)
    assert ((batched["acceptance"] >= 0) & (batched["acceptance"] <= 1)).all()
