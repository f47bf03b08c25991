"""Tests of the VAE: exact importance-weighted bound, inpainting chains, and consistent programs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.vae import FAMILY, LATENT_DIMENSIONS, VAE
from export.families.vae.programs import CHAINS, InpaintInit, InpaintStep
from export.probability.importance_weighting import DRAWS_PER_STEP
from export.training.trainer import Settings, fit
from samovar import noise

NUM_LEVELS = 17


def randomize(network: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(scale * torch.randn_like(weights))


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> VAE:
    torch.manual_seed(0)
    vae = FAMILY.build_network(digits, Preset(width=16, depth=1, training=Settings(steps=1)))
    randomize(vae, 0.1)
    return vae.eval()


@pytest.fixture(scope="module")
def interpreter(network: VAE, digits: loading.Dataset) -> Interpreter:
    return eager_interpreter(digits.spec, FAMILY.build_programs(network, digits))


def score(interpreter: Interpreter, images: np.ndarray, draws: int, seed: int = 0) -> Tensors:
    rows = make_rows(
        interpreter.program("score"), seed, range(len(images)), {"draws": draws}, {"image": images}
    )
    return interpreter.run("score", rows)


@pytest.mark.parametrize("draws", [1, 7, 10, 25])
def test_score_is_the_bound_with_the_requested_number_of_draws(
    draws: int, network: VAE, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:3]
    weights = log_weights(network, images, draws, seed=6)
    outputs = score(interpreter, images, draws, seed=6)
    expected = weights.logsumexp(1) - np.log(draws)
    np.testing.assert_allclose(outputs["log_likelihood"], expected.numpy(), rtol=1e-5)


def test_score_standard_error_follows_the_delta_method(
    network: VAE, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images, draws = digits.test.rows[:3], 40
    weights = log_weights(network, images, draws, seed=6).double()
    scaled = (weights - weights.amax(1, keepdim=True)).exp()
    expected = scaled.std(1) / scaled.mean(1) / np.sqrt(draws)
    standard_error = score(interpreter, images, draws, seed=6)["standard_error"]
    np.testing.assert_allclose(standard_error, expected.numpy(), rtol=1e-3)


def log_weights(network: VAE, images: np.ndarray, draws: int, seed: int) -> Tensor:
    """Return the log-weights [B, draws] of the documented noise, without steps and masks."""
    steps = -(-draws // DRAWS_PER_STEP)
    rows, seeds = np.arange(len(images)), np.full(len(images), seed, np.uint64)
    shape = (DRAWS_PER_STEP, LATENT_DIMENSIONS)
    drawn = [noise.normal(seeds, rows, np.full(len(rows), step), 0, shape) for step in range(steps)]
    image = torch.from_numpy(images)
    with torch.no_grad():
        mean, std = network.encode(image)
        return network.log_weights(image, mean, std, torch.from_numpy(np.concatenate(drawn, 1)[:, :draws]))


def test_bound_increases_with_draws_up_to_the_exact_value(digits: loading.Dataset) -> None:
    """ELBO <= E[IW-5] <= E[IW-50] <= log p(x); the last by quadrature over a two-dimensional latent."""
    torch.manual_seed(3)
    settings = Settings(steps=150, learning_rate=1e-2, ema_decay=0.9, evaluations=1)
    vae = VAE(digits.spec.tensor.shape, NUM_LEVELS, 2, Preset(width=16, depth=1, training=settings))
    fit(vae, digits, settings)
    image = torch.from_numpy(digits.test.rows[:2])
    with torch.no_grad():
        mean, std = vae.encode(image)
        standard = torch.randn(2, 5_000, 2)
        weights = vae.log_weights(image, mean, std, standard).double()
        wide = vae.log_weights(image, mean, 2 * std, standard).double()
        exact = log_mass_by_quadrature(vae, image)
    bounds = [(weights.reshape(2, -1, k).logsumexp(2) - np.log(k)).mean(1) for k in (1, 5, 50)]
    increasing = torch.stack([*bounds, exact])
    assert (increasing.diff(dim=0) > -1e-3).all()
    torch.testing.assert_close(wide.logsumexp(1) - np.log(5_000), exact, atol=0.05, rtol=0)


def latent_grid() -> tuple[Tensor, Tensor]:
    """Return a grid over [-6, 6]^2, [N, 2], and the logarithm of the prior's mass at its points [N]."""
    axis = torch.linspace(-6, 6, 121)
    grid = torch.cartesian_prod(axis, axis)
    return grid, -0.5 * grid.square().sum(1) - np.log(2 * np.pi) + 2 * np.log(12 / 120)


def log_mass_by_quadrature(vae: VAE, image: Tensor) -> Tensor:
    """Return log p(x), the logarithm of the integral of p(x | z) N(z; 0, I) over a grid, in nats [B]."""
    grid, prior = latent_grid()
    mass = vae.decode(grid.unsqueeze(0)).log_mass(image.unsqueeze(1)).flatten(2).sum(-1)
    integral: Tensor = (mass + prior).double().logsumexp(1)
    return integral


@pytest.mark.parametrize(("chain", "low", "high"), [(CHAINS[0], 0.05, 0.2), (CHAINS[1], 0, 0.02)])
def test_only_metropolis_chain_converges_to_the_conditional_of_an_untrained_encoder(
    chain: str, low: float, high: float
) -> None:
    """The total variation between a missing pixel's draws and its conditional by quadrature is in bounds."""
    torch.manual_seed(1)
    vae = VAE((2, 2), NUM_LEVELS, 2, Preset(width=16, depth=1, training=Settings(steps=1))).eval()
    randomize(vae.decoder, 0.5)
    image = torch.tensor([[3, 12], [0, 0]], dtype=torch.uint8)
    known = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)
    with torch.no_grad():
        images, masks = image.expand(20_000, 2, 2), known.expand(20_000, 2, 2)
        drawn = run_chain(vae, images, masks, CHAINS.index(chain))
        frequencies = drawn[:, 1, 0].long().bincount(minlength=NUM_LEVELS) / len(drawn)
        distance = 0.5 * (frequencies - conditional(vae, image, known)[:, 1, 0]).abs().sum()
    assert low <= distance <= high


def run_chain(vae: VAE, image: Tensor, known: Tensor, chain: int) -> Tensor:
    """Return the canvas after 20 steps with torch's random numbers."""
    init, step, rows = InpaintInit(vae), InpaintStep(vae), len(image)
    canvas: Tensor
    canvas, latent = init(image, known, torch.randn(rows, 2), torch.rand(image.shape))
    for index in range(20):
        noise = torch.randn(rows, 2), torch.rand(image.shape), torch.rand(rows)
        counters = torch.tensor(index), torch.tensor(20)
        canvas, latent = step(canvas, latent, known, torch.tensor(chain), *noise, *counters)
    return canvas


def conditional(vae: VAE, image: Tensor, known: Tensor) -> Tensor:
    """Return the mass of each level of each pixel given the known ones [levels, *shape], by quadrature."""
    grid, prior = latent_grid()
    mixture = vae.decode(grid)
    posterior = (prior + (mixture.log_mass(image) * known).flatten(1).sum(1)).softmax(0)
    return torch.stack(
        [
            (posterior[:, None, None] * mixture.log_mass(torch.full((2, 2), level)).exp()).sum(0)
            for level in range(NUM_LEVELS)
        ]
    )


@pytest.mark.parametrize("chain", range(len(CHAINS)))
@pytest.mark.parametrize("pixels", [0, 1])
def test_inpaint_keeps_known_pixels_and_draws_the_others(
    chain: int, pixels: int, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:4]
    known = (np.random.default_rng(0).random(images.shape) < 0.5).astype(np.uint8)
    parameters = {"steps": 3, "chain": chain, "pixels": pixels}
    first, second = (inpaint(interpreter, images, known, parameters, seed) for seed in (1, 2))
    for drawn in (first, second):
        assert (drawn[known == 1] == images[known == 1]).all()
    assert (first != second)[known == 0].any()


def test_inpaint_ignores_the_image_outside_the_known_pixels(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:4]
    known = np.zeros_like(images)
    known[:, :4] = 1
    changed = np.where(known == 1, images, 16 - images)
    left, right = (inpaint(interpreter, inputs, known, {"steps": 3}, seed=1) for inputs in (images, changed))
    np.testing.assert_array_equal(left, right)


def inpaint(
    interpreter: Interpreter,
    images: np.ndarray,
    known: np.ndarray,
    parameters: dict[str, int],
    seed: int,
) -> np.ndarray:
    inputs = {"image": images, "known": known}
    rows = make_rows(interpreter.program("sample:inpaint"), seed, range(len(images)), parameters, inputs)
    image: np.ndarray = interpreter.run("sample:inpaint", rows)["image"]
    return image


def test_sample_with_temperature_zero_ignores_the_noise(interpreter: Interpreter) -> None:
    rows = make_rows(interpreter.program("sample"), 1, range(4), {"temperature": 0, "pixels": 0})
    images = interpreter.run("sample", rows)["image"]
    assert (images == images[0]).all()


def test_reconstruct_with_the_mean_latent_equals_decode_of_the_encoded_mean(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:3]
    encoded = interpreter.run(
        "encode", make_rows(interpreter.program("encode"), 0, range(3), {}, {"image": images})
    )
    decoded = interpreter.run(
        "decode", make_rows(interpreter.program("decode"), 0, range(3), {}, {"latent": encoded["mean"]})
    )
    rows = make_rows(interpreter.program("reconstruct"), 9, range(3), {}, {"image": images})
    np.testing.assert_array_equal(interpreter.run("reconstruct", rows)["image"], decoded["image"])
