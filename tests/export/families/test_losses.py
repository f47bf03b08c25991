"""Tests of the training losses: each loss agrees with the served score, and training lowers it."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from export.artifacts.interpreter import Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families import FAMILIES, diffusion, ebm, vae
from export.families.base import Preset
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling_graphs import EditPointInit
from export.families.diffusion.solvers import noise_level
from export.families.ebm.energy import NOISE_RATIO, EnergyModel, contrastive_loss
from export.families.realnvp.network import RealNVP
from export.families.vae import LATENT_DIMENSIONS, TRAINING_DRAWS
from export.training.trainer import Network, Settings, fit, validation_loss
from samovar import noise
from tests.support.denoisers import ExactNetwork

SETTINGS = Settings(
    steps=40, batch_rows=64, learning_rate=1e-2, ema_decay=0.8, evaluations=1, validation_rows=1
)
PRESET = Preset(width=16, depth=2, training=SETTINGS, evaluation_rows=16)
NUM_ROWS = 6


def randomized(family: str, dataset: loading.Dataset) -> Network:
    """Return a network with random weights, in eval mode."""
    torch.manual_seed(0)
    network = FAMILIES[family].load().build_network(dataset, PRESET)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return network.eval().requires_grad_(False)


def batch_of(dataset: loading.Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(dataset.test.rows[:NUM_ROWS]), torch.tensor(dataset.test.labels[:NUM_ROWS])


def loss_with_seed(seed: int, network: Network, dataset: loading.Dataset) -> Tensor:
    """Return the loss of a batch of test rows, with the random numbers of a seed."""
    torch.manual_seed(seed)
    return network.loss(*batch_of(dataset))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("vae", "diffusion", "pixelcnn", "realnvp", "ebm")
        for name in FAMILIES[family].datasets
        # The base of the energy model is a mixture fitted to the digits: 40 steps improve little on it.
        if (family, name) != ("ebm", "digits")
    ],
)
def test_training_lowers_the_loss_of_held_out_rows(
    family: str, name: str, digits: loading.Dataset, moons: loading.Dataset
) -> None:
    dataset = {"digits": digits, "moons": moons}[name]
    torch.manual_seed(0)
    network = FAMILIES[family].load().build_network(dataset, PRESET)
    held_out = dataset.test[:400]
    before = validation_loss(network.eval(), held_out, SETTINGS)
    fit(network, dataset, SETTINGS)
    assert validation_loss(network, held_out, SETTINGS) < before - 0.05


def nats(family: str, network: Network, dataset: loading.Dataset) -> np.ndarray:
    """Return the score in nats [NUM_ROWS] of a batch of test rows with their labels."""
    rows, labels = (tensor.numpy() for tensor in batch_of(dataset))
    interpreter = eager_interpreter(dataset.spec, FAMILIES[family].load().build_programs(network, dataset))
    program = interpreter.program("score")
    request = make_rows(program, 0, range(NUM_ROWS), inputs={dataset.spec.tensor.name: rows, "label": labels})
    output: np.ndarray = interpreter.run("score", request)[program.score.nats_output]
    return output


def test_pixelcnn_loss_is_negative_score_per_dimension(digits: loading.Dataset) -> None:
    network = randomized("pixelcnn", digits)
    np.testing.assert_allclose(
        loss_with_seed(0, network, digits).numpy(), -nats("pixelcnn", network, digits) / 64, rtol=1e-5
    )


def test_realnvp_loss_of_points_is_negative_score_per_dimension(moons: loading.Dataset) -> None:
    network = randomized("realnvp", moons)
    np.testing.assert_allclose(
        loss_with_seed(0, network, moons).numpy(), -nats("realnvp", network, moons) / 2, rtol=1e-5
    )


def test_realnvp_loss_of_images_is_negative_log_density_at_dequantized_pixels(
    digits: loading.Dataset,
) -> None:
    flow = randomized("realnvp", digits)
    assert isinstance(flow, RealNVP)
    loss = loss_with_seed(1, flow, digits)
    torch.manual_seed(1)
    corners = batch_of(digits)[0].flatten(1).float()
    torch.testing.assert_close(loss, -flow.log_density(corners + torch.rand_like(corners)) / 64)


def test_vae_loss_is_negative_importance_weighted_bound(digits: loading.Dataset) -> None:
    """By definition it is the log of the mean of p(x, z) / q(z | x) over draws z = mean + std eps."""
    network = randomized("vae", digits)
    assert isinstance(network, vae.VAE)
    images = batch_of(digits)[0]
    loss = loss_with_seed(2, network, digits)
    torch.manual_seed(2)
    eps = torch.randn(NUM_ROWS, TRAINING_DRAWS, LATENT_DIMENSIONS)
    mean, std = (part.unsqueeze(1) for part in network.encode(images))
    latent = mean + std * eps
    likelihood = network.decode(latent).log_mass(images.unsqueeze(1)).flatten(2).sum(2)
    prior, posterior = (log_normal(latent, *moments) for moments in ((0.0, torch.ones(())), (mean, std)))
    weights = (likelihood + prior - posterior).double().exp().mean(1).log()
    torch.testing.assert_close(loss, (-weights / 64).float(), rtol=1e-4, atol=1e-5)


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    """Return the log-density [...] of x [..., D] under independent normal distributions."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def test_vae_log_weights_contain_closed_form_divergence(digits: loading.Dataset) -> None:
    """KL = sum of (mean^2 + std^2 - 1 - log std^2) / 2. The mean over eps = -1 and 1 gives exact squares."""
    network = randomized("vae", digits)
    assert isinstance(network, vae.VAE)
    images = batch_of(digits)[0]
    mean, std = network.encode(images)
    eps = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1).expand(NUM_ROWS, -1, LATENT_DIMENSIONS)
    latent = mean.unsqueeze(1) + std.unsqueeze(1) * eps
    likelihood = network.decode(latent).log_mass(images.unsqueeze(1)).flatten(2).sum(2)
    divergence = (likelihood - network.log_weights(images, mean, std, eps)).mean(1)
    expected = 0.5 * (mean.square() + std.square() - 1 - std.square().log()).sum(1)
    torch.testing.assert_close(divergence, expected, rtol=1e-3, atol=1e-3)


def run_vae(network: Network, dataset: loading.Dataset, program: str, **arguments: Any) -> Tensors:
    """Run a program of the VAE with seed 9; array arguments are inputs, numbers are parameters."""
    interpreter = eager_interpreter(dataset.spec, vae.FAMILY.build_programs(network, dataset))
    inputs = {name: value for name, value in arguments.items() if isinstance(value, np.ndarray)}
    parameters = {name: value for name, value in arguments.items() if name not in inputs}
    return interpreter.run(
        program, make_rows(interpreter.program(program), 9, range(NUM_ROWS), parameters, inputs)
    )


def stream_0_noise() -> np.ndarray:
    """Return the noise of stream 0 in the first call, for seed 9."""
    seeds, rows = np.full(NUM_ROWS, 9, np.uint64), np.arange(NUM_ROWS)
    return noise.normal(seeds, rows, np.zeros(NUM_ROWS, int), 0, (LATENT_DIMENSIONS,))


def test_vae_drawn_latent_is_mean_plus_std_times_noise(digits: loading.Dataset) -> None:
    network, images = randomized("vae", digits), digits.test.rows[:NUM_ROWS]
    encoded = run_vae(network, digits, "encode", image=images)
    latent = encoded["mean"] + encoded["std"] * stream_0_noise()
    drawn = run_vae(network, digits, "reconstruct", image=images, latent=1)["image"]
    np.testing.assert_array_equal(drawn, run_vae(network, digits, "decode", latent=latent)["image"])
    by_variance = encoded["mean"] + encoded["std"] ** 2 * stream_0_noise()
    assert (drawn != run_vae(network, digits, "decode", latent=by_variance)["image"]).any()


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_vae_sample_temperature_is_the_standard_deviation_of_the_latents(
    temperature: float, digits: loading.Dataset
) -> None:
    network = randomized("vae", digits)
    sampled = run_vae(network, digits, "sample", temperature=temperature, pixels=0)["image"]
    latent = np.float32(temperature) * stream_0_noise()
    np.testing.assert_array_equal(sampled, run_vae(network, digits, "decode", latent=latent)["image"])


def test_ebm_loss_is_contrastive_loss_of_rows_and_base_noise(dataset: loading.Dataset) -> None:
    """The reference uses the same draws: f of the rows first, then f of the noise."""
    model = randomized("ebm", dataset)
    assert isinstance(model, EnergyModel)
    loss = loss_with_seed(3, model, dataset)
    torch.manual_seed(3)
    clean = model.to_coordinates(batch_of(dataset)[0])
    rows = clean + model.smoothing_std * torch.randn_like(clean)
    drawn = model.base.sample(NOISE_RATIO * NUM_ROWS)
    torch.testing.assert_close(
        loss, contrastive_loss(model.tilt(rows), model.tilt(drawn).reshape(NOISE_RATIO, NUM_ROWS))
    )


def test_ebm_training_lowers_energy_of_rows_relative_to_noise(moons: loading.Dataset) -> None:
    torch.manual_seed(0)
    model = ebm.FAMILY.build_network(moons, PRESET)
    fit(model, moons, SETTINGS)
    with torch.no_grad():
        rows, drawn = torch.tensor(moons.test.rows[:400]), model.base.sample(400)
        assert model.tilt(rows).mean() < model.tilt(drawn).mean() - 0.1


class SinglePointNetwork(ExactNetwork):
    """Exact network for data that consist of one point."""

    POINT = (0.3, -0.7)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        return torch.tensor(self.POINT).expand_as(x)


def single_point_denoiser(moons: loading.Dataset) -> Denoiser:
    denoiser = diffusion.FAMILY.build_network(moons, PRESET)
    denoiser.network = SinglePointNetwork()
    denoiser.network.data_std = denoiser.data_std
    return denoiser.eval()


def test_diffusion_loss_of_exact_denoiser_is_weighted_distance_from_the_only_point(
    moons: loading.Dataset,
) -> None:
    """So the target is the clean row, not the noise."""
    denoiser = single_point_denoiser(moons)
    point, labels = torch.tensor(SinglePointNetwork.POINT).repeat(200, 1), torch.zeros(200).long()
    torch.manual_seed(4)
    loss_at_point = denoiser.loss(point, labels)
    torch.manual_seed(4)
    loss_off_point = denoiser.loss(point + torch.tensor([0.5, 0.0]), labels)
    torch.manual_seed(4)
    _, sigma = torch.rand(200), (denoiser.log_sigma[0] + denoiser.log_sigma[1] * torch.randn(200)).exp()
    weight = (sigma.square() + denoiser.data_std**2) / (sigma * denoiser.data_std).square()
    assert (loss_at_point < 1e-5 * weight).all()
    torch.testing.assert_close(loss_off_point, weight * 0.5**2 / 2, rtol=1e-3, atol=1e-5)


def test_diffusion_loss_equals_karras_table_1(dataset: loading.Dataset) -> None:
    """The reference draws in the same order: dropped labels, log-levels, noise."""
    denoiser = randomized("diffusion", dataset)
    assert isinstance(denoiser, Denoiser)
    rows, labels = batch_of(dataset)
    loss = loss_with_seed(5, denoiser, dataset)
    torch.manual_seed(5)
    labels = torch.where(torch.rand(NUM_ROWS) < denoiser.label_dropout, denoiser.num_classes, labels)
    mean, std = denoiser.log_sigma
    sigma = (mean + std * torch.randn(NUM_ROWS)).exp()
    clean = denoiser.scale(rows)
    level = sigma.reshape(-1, *(1 for _ in clean.shape[1:]))
    error = denoiser(clean + level * torch.randn_like(clean), sigma, labels) - clean
    weight = (sigma**2 + denoiser.data_std**2) / (sigma * denoiser.data_std) ** 2
    torch.testing.assert_close(loss, weight * error.square().flatten(1).mean(1))


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_exact_denoiser_recovers_the_noise_of_an_edit(strength: float, moons: loading.Dataset) -> None:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps with abar = 1 / (1 + sigma^2)."""
    torch.manual_seed(6)
    denoiser = single_point_denoiser(moons)
    point, eps = torch.tensor(SinglePointNetwork.POINT).repeat(8, 1), torch.randn(8, 2)
    labels, strengths = torch.zeros(8).long(), torch.full((8,), strength)
    x, *_ = EditPointInit(denoiser)(point, strengths, eps, labels)
    sigma = noise_level(strengths)
    abar = (1 / (1 + sigma.square())).unsqueeze(1)
    scaled = x * abar.sqrt()
    torch.testing.assert_close(scaled, abar.sqrt() * point + (1 - abar).sqrt() * eps, rtol=1e-4, atol=1e-4)
    predicted = (scaled - abar.sqrt() * denoiser(x, sigma, labels)) / (1 - abar).sqrt()
    torch.testing.assert_close(predicted, eps, rtol=1e-3, atol=1e-3)
