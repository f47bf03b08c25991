"""What is trained is what is served: every loss is the number that the scores say, and training lowers it."""

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
from export.families.diffusion.sampling import EditPointInit
from export.families.diffusion.solvers import noise_level
from export.families.ebm.energy import NOISE_SHARE, EnergyModel, contrastive_loss
from export.families.realnvp.network import RealNVP
from export.families.vae import LATENT_DIMENSIONS, TRAINING_DRAWS
from export.training.trainer import Network, Settings, fit, validation_loss
from samovar import noise
from tests.support import denoisers as toys

SETTINGS = Settings(
    steps=40, batch_rows=64, learning_rate=1e-2, ema_decay=0.8, evaluations=1, validation_rows=1
)
SMALL = Preset(width=16, depth=2, training=SETTINGS, evaluation_rows=16)
ROWS = 6


def randomised(family: str, dataset: loading.Dataset) -> Network:
    torch.manual_seed(0)
    network = FAMILIES[family].load().build_network(dataset, SMALL)
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return network.eval().requires_grad_(False)


def some(dataset: loading.Dataset) -> tuple[Tensor, Tensor]:
    return torch.tensor(dataset.test.rows[:ROWS]), torch.tensor(dataset.test.labels[:ROWS])


def loss_after(seed: int, network: Network, dataset: loading.Dataset) -> Tensor:
    """The loss of some rows, with the random numbers that follow a seed."""
    torch.manual_seed(seed)
    return network.loss(*some(dataset))


@pytest.mark.parametrize(
    ("family", "name"),
    [
        (family, name)
        for family in ("vae", "diffusion", "pixelcnn", "realnvp", "ebm")
        for name in FAMILIES[family].datasets
        # A mixture fitted to the digits is the base, from which a few steps do not get away.
        if (family, name) != ("ebm", "digits")
    ],
)
def test_a_few_steps_lower_the_loss_of_held_out_rows(
    family: str, name: str, digits: loading.Dataset, moons: loading.Dataset
) -> None:
    dataset = {"digits": digits, "moons": moons}[name]
    torch.manual_seed(0)
    network = FAMILIES[family].load().build_network(dataset, SMALL)
    held_out = dataset.test[:400]
    before = validation_loss(network.eval(), held_out, SETTINGS)
    fit(network, dataset, SETTINGS)
    assert validation_loss(network, held_out, SETTINGS) < before - 0.05


def nats(family: str, network: Network, dataset: loading.Dataset) -> np.ndarray:
    """What the program score says of some rows with their labels."""
    rows, labels = (part.numpy() for part in some(dataset))
    interpreter = eager_interpreter(dataset.spec, FAMILIES[family].load().build_programs(network, dataset))
    program = interpreter.program("score")
    asked = make_rows(program, 0, range(ROWS), inputs={dataset.spec.tensor.name: rows, "label": labels})
    answer: np.ndarray = interpreter.run("score", asked)[program.score.nats_output]
    return answer


def test_the_loss_of_the_pixelcnn_is_the_negative_score(digits: loading.Dataset) -> None:
    network = randomised("pixelcnn", digits)
    np.testing.assert_allclose(
        loss_after(0, network, digits).numpy(), -nats("pixelcnn", network, digits) / 64, rtol=1e-5
    )


def test_the_loss_of_a_flow_of_points_is_the_negative_score(moons: loading.Dataset) -> None:
    network = randomised("realnvp", moons)
    np.testing.assert_allclose(
        loss_after(0, network, moons).numpy(), -nats("realnvp", network, moons) / 2, rtol=1e-5
    )


def test_the_loss_of_a_flow_of_images_is_the_negative_density_somewhere_in_their_cubes(
    digits: loading.Dataset,
) -> None:
    flow = randomised("realnvp", digits)
    assert isinstance(flow, RealNVP)
    loss = loss_after(1, flow, digits)
    torch.manual_seed(1)
    corners = some(digits)[0].flatten(1).float()
    torch.testing.assert_close(loss, -flow.log_density(corners + torch.rand_like(corners)) / 64)


def test_the_loss_of_the_vae_is_its_negative_bound(digits: loading.Dataset) -> None:
    """By the definition: the logarithm of the mean of p(x, z) / q(z | x) over draws z = mean + std eps."""
    network = randomised("vae", digits)
    assert isinstance(network, vae.VAE)
    images = some(digits)[0]
    loss = loss_after(2, network, digits)
    torch.manual_seed(2)
    eps = torch.randn(ROWS, TRAINING_DRAWS, LATENT_DIMENSIONS)
    mean, std = (part.unsqueeze(1) for part in network.encode(images))
    latent = mean + std * eps
    likelihood = network.decode(latent).log_mass(images.unsqueeze(1)).flatten(2).sum(2)
    prior, posterior = (log_normal(latent, *moments) for moments in ((0.0, torch.ones(())), (mean, std)))
    weights = (likelihood + prior - posterior).double().exp().mean(1).log()
    torch.testing.assert_close(loss, (-weights / 64).float(), rtol=1e-4, atol=1e-5)


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor) -> Tensor:
    """Log-density of x [..., D] under independent normal distributions [...]."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def test_the_bound_of_the_vae_has_the_divergence_in_closed_form(digits: loading.Dataset) -> None:
    """KL = sum of (mean^2 + std^2 - 1 - log std^2) / 2; eps of -1 and 1 average squares exactly."""
    network = randomised("vae", digits)
    assert isinstance(network, vae.VAE)
    images = some(digits)[0]
    mean, std = network.encode(images)
    eps = torch.tensor([-1.0, 1.0]).reshape(1, 2, 1).expand(ROWS, -1, LATENT_DIMENSIONS)
    latent = mean.unsqueeze(1) + std.unsqueeze(1) * eps
    likelihood = network.decode(latent).log_mass(images.unsqueeze(1)).flatten(2).sum(2)
    divergence = (likelihood - network.log_weights(images, mean, std, eps)).mean(1)
    expected = 0.5 * (mean.square() + std.square() - 1 - std.square().log()).sum(1)
    torch.testing.assert_close(divergence, expected, rtol=1e-3, atol=1e-3)


def played(network: Network, dataset: loading.Dataset, program: str, **settings: Any) -> Tensors:
    """What a program of the VAE gives for some rows with seed 9; keywords are parameters or inputs."""
    interpreter = eager_interpreter(dataset.spec, vae.FAMILY.build_programs(network, dataset))
    inputs = {name: value for name, value in settings.items() if isinstance(value, np.ndarray)}
    parameters = {name: value for name, value in settings.items() if name not in inputs}
    return interpreter.run(
        program, make_rows(interpreter.program(program), 9, range(ROWS), parameters, inputs)
    )


def documented_noise() -> np.ndarray:
    """What stream 0 gives rows of seed 9 in the first call."""
    seeds, rows = np.full(ROWS, 9, np.uint64), np.arange(ROWS)
    return noise.normal(seeds, rows, np.zeros(ROWS, int), 0, (LATENT_DIMENSIONS,))


def test_a_drawn_latent_is_the_mean_and_so_many_standard_deviations(digits: loading.Dataset) -> None:
    """z = mean + std eps, as encode gives them and as the noise is documented."""
    network, images = randomised("vae", digits), digits.test.rows[:ROWS]
    encoded = played(network, digits, "encode", image=images)
    latent = encoded["mean"] + encoded["std"] * documented_noise()
    drawn = played(network, digits, "reconstruct", image=images, latent=1)["image"]
    np.testing.assert_array_equal(drawn, played(network, digits, "decode", latent=latent)["image"])
    by_variance = encoded["mean"] + encoded["std"] ** 2 * documented_noise()
    assert (drawn != played(network, digits, "decode", latent=by_variance)["image"]).any()


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_a_temperature_is_the_standard_deviation_of_the_latents(
    temperature: float, digits: loading.Dataset
) -> None:
    network = randomised("vae", digits)
    sampled = played(network, digits, "sample", temperature=temperature, pixels=0)["image"]
    latent = np.float32(temperature) * documented_noise()
    np.testing.assert_array_equal(sampled, played(network, digits, "decode", latent=latent)["image"])


def test_the_loss_of_the_energy_model_tells_rows_from_noise(dataset: loading.Dataset) -> None:
    """And not the other way round: with the same draws, f of rows stands first and that of noise after it."""
    model = randomised("ebm", dataset)
    assert isinstance(model, EnergyModel)
    loss = loss_after(3, model, dataset)
    torch.manual_seed(3)
    clean = model.coordinates(some(dataset)[0])
    rows = clean + model.smoothing * torch.randn_like(clean)
    drawn = model.base.sample(NOISE_SHARE * ROWS)
    torch.testing.assert_close(
        loss, contrastive_loss(model.tilt(rows), model.tilt(drawn).reshape(NOISE_SHARE, ROWS))
    )


def test_trained_energies_are_low_where_rows_are(moons: loading.Dataset) -> None:
    torch.manual_seed(0)
    model = ebm.FAMILY.build_network(moons, SMALL)
    fit(model, moons, SETTINGS)
    with torch.no_grad():
        rows, drawn = torch.tensor(moons.test.rows[:400]), model.base.sample(400)
        assert model.tilt(rows).mean() < model.tilt(drawn).mean() - 0.1


class Certain(toys.Exact):
    """Of data that are one point only."""

    POINT = (0.3, -0.7)

    def denoise(self, x: Tensor, variance: Tensor) -> Tensor:
        return torch.tensor(self.POINT).expand_as(x)


def certain(moons: loading.Dataset) -> Denoiser:
    denoiser = diffusion.FAMILY.build_network(moons, SMALL)
    denoiser.network = Certain()
    denoiser.network.spread = denoiser.data_std
    return denoiser.eval()


def test_the_denoiser_that_knows_the_only_row_has_no_loss_and_others_have_their_distance(
    moons: loading.Dataset,
) -> None:
    """So the target is the clean row: neither the noise on it nor a step of it."""
    denoiser = certain(moons)
    point, labels = torch.tensor(Certain.POINT).repeat(200, 1), torch.zeros(200).long()
    torch.manual_seed(4)
    at_the_point = denoiser.loss(point, labels)
    torch.manual_seed(4)
    beside_it = denoiser.loss(point + torch.tensor([0.5, 0.0]), labels)
    torch.manual_seed(4)
    _, sigma = torch.rand(200), (denoiser.log_sigma[0] + denoiser.log_sigma[1] * torch.randn(200)).exp()
    weight = (sigma.square() + denoiser.data_std**2) / (sigma * denoiser.data_std).square()
    assert (at_the_point < 1e-5 * weight).all()
    torch.testing.assert_close(beside_it, weight * 0.5**2 / 2, rtol=1e-3, atol=1e-5)


def test_the_diffusion_loss_is_karras_table_1(dataset: loading.Dataset) -> None:
    """By the same draws, in their order: labels that are dropped, log-levels, noise."""
    denoiser = randomised("diffusion", dataset)
    assert isinstance(denoiser, Denoiser)
    rows, labels = some(dataset)
    loss = loss_after(5, denoiser, dataset)
    torch.manual_seed(5)
    labels = torch.where(torch.rand(ROWS) < denoiser.dropped, denoiser.classes, labels)
    mean, std = denoiser.log_sigma
    sigma = (mean + std * torch.randn(ROWS)).exp()
    clean = denoiser.scale(rows)
    level = sigma.reshape(-1, *(1 for _ in clean.shape[1:]))
    error = denoiser(clean + level * torch.randn_like(clean), sigma, labels) - clean
    weight = (sigma**2 + denoiser.data_std**2) / (sigma * denoiser.data_std) ** 2
    torch.testing.assert_close(loss, weight * error.square().flatten(1).mean(1))


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_the_noise_that_a_denoiser_tells_is_all_of_it(strength: float, moons: loading.Dataset) -> None:
    """x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, abar = 1 / (1 + sigma^2), and eps of the whole way."""
    torch.manual_seed(6)
    denoiser = certain(moons)
    point, eps = torch.tensor(Certain.POINT).repeat(8, 1), torch.randn(8, 2)
    labels, strengths = torch.zeros(8).long(), torch.full((8,), strength)
    x, *_ = EditPointInit(denoiser)(point, strengths, eps, labels)
    sigma = noise_level(strengths)
    abar = (1 / (1 + sigma.square())).unsqueeze(1)
    scaled = x * abar.sqrt()
    torch.testing.assert_close(scaled, abar.sqrt() * point + (1 - abar).sqrt() * eps, rtol=1e-4, atol=1e-4)
    told = (scaled - abar.sqrt() * denoiser(x, sigma, labels)) / (1 - abar).sqrt()
    torch.testing.assert_close(told, eps, rtol=1e-3, atol=1e-3)
