"""The VAE: its density is one, its draws follow it, its bound is a bound and is computed exactly."""

import numpy as np
import pytest
import torch
from torch import Tensor

from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.vae import FAMILY, LATENT_DIMENSIONS, VAE
from export.families.vae.programs import CHAINS, InpaintInit, InpaintStep
from export.probability.discretized_logistic import PixelMixture
from export.probability.importance_weighting import DRAWS_PER_STEP
from export.training.trainer import Settings, fit
from samovar import noise

LEVELS = 17


def randomise(network: torch.nn.Module, scale: float) -> None:
    with torch.no_grad():
        for weights in network.parameters():
            weights.add_(scale * torch.randn_like(weights))


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> VAE:
    torch.manual_seed(0)
    vae = FAMILY.build_network(digits, Preset(width=16, depth=1, training=Settings(steps=1)))
    randomise(vae, 0.1)
    return vae.eval()


@pytest.fixture(scope="module")
def interpreter(network: VAE, digits: loading.Dataset) -> Interpreter:
    return eager_interpreter(digits.spec, FAMILY.build_programs(network, digits))


def score(interpreter: Interpreter, images: np.ndarray, draws: int, seed: int = 0) -> Tensors:
    rows = make_rows(
        interpreter.program("score"), seed, range(len(images)), {"draws": draws}, {"image": images}
    )
    return interpreter.run("score", rows)


def test_pixel_mass_sums_to_one() -> None:
    torch.manual_seed(0)
    parameters = (4 * torch.randn(50, 15)).double()
    masses = torch.stack(
        [PixelMixture(parameters, LEVELS).log_mass(torch.full((50,), v)) for v in range(LEVELS)]
    )
    torch.testing.assert_close(masses.exp().sum(0), torch.ones(50).double())


@pytest.mark.parametrize("levels", [17, 256])
def test_draws_follow_the_mass(levels: int) -> None:
    """Inversion over an even grid of uniforms gives every level its mass."""
    torch.manual_seed(1)
    count = 400_000
    for parameters in torch.randn(4, 9).double():
        mixture = PixelMixture(parameters.expand(count, -1), levels)
        drawn = mixture.quantize(mixture.sample_by_inversion((torch.arange(count).double() + 0.5) / count))
        mass = PixelMixture(parameters.expand(levels, -1), levels).log_mass(torch.arange(levels)).exp()
        torch.testing.assert_close(
            drawn.long().bincount(minlength=levels) / count, mass.float(), atol=2e-4, rtol=0
        )


def test_the_mean_is_the_mean_of_the_mass() -> None:
    """To half a level: the closed form is of the clipped continuous mixture."""
    torch.manual_seed(2)
    parameters = torch.randn(50, 9)
    masses = torch.stack(
        [PixelMixture(parameters, LEVELS).log_mass(torch.full((50,), v)) for v in range(LEVELS)]
    )
    exact = (masses.exp() * torch.arange(LEVELS).unsqueeze(1)).sum(0)
    torch.testing.assert_close(PixelMixture(parameters, LEVELS).mean(), exact, atol=0.25, rtol=0)


@pytest.mark.parametrize("draws", [1, 7, 10, 25])
def test_the_score_is_the_bound_of_exactly_so_many_draws(
    draws: int, network: VAE, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:3]
    weights = log_weights(network, images, draws, seed=6)
    answer = score(interpreter, images, draws, seed=6)
    expected = weights.logsumexp(1) - np.log(draws)
    np.testing.assert_allclose(answer["log_likelihood"], expected.numpy(), rtol=1e-5)


def test_the_standard_error_is_the_delta_method(
    network: VAE, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images, draws = digits.test.rows[:3], 40
    weights = log_weights(network, images, draws, seed=6).double()
    scaled = (weights - weights.amax(1, keepdim=True)).exp()
    expected = scaled.std(1) / scaled.mean(1) / np.sqrt(draws)
    answer = score(interpreter, images, draws, seed=6)["standard_error"]
    np.testing.assert_allclose(answer, expected.numpy(), rtol=1e-3)


def log_weights(network: VAE, images: np.ndarray, draws: int, seed: int) -> Tensor:
    """Directly from the documented noise, without steps and masks."""
    steps = -(-draws // DRAWS_PER_STEP)
    rows = np.arange(len(images))
    drawn = [
        noise.normal(
            np.full(len(rows), seed, np.uint64),
            rows,
            np.full(len(rows), step),
            0,
            (DRAWS_PER_STEP, LATENT_DIMENSIONS),
        )
        for step in range(steps)
    ]
    image = torch.from_numpy(images)
    with torch.no_grad():
        mean, std = network.encode(image)
        return network.log_weights(image, mean, std, torch.from_numpy(np.concatenate(drawn, 1)[:, :draws]))


def test_bounds_rise_to_the_exact_value(digits: loading.Dataset) -> None:
    """ELBO <= E[IW-5] <= E[IW-50] <= log p(x), the last by quadrature over a latent of two dimensions."""
    torch.manual_seed(3)
    settings = Settings(steps=150, learning_rate=1e-2, ema_decay=0.9, evaluations=1)
    vae = VAE(digits.spec.tensor.shape, LEVELS, 2, Preset(width=16, depth=1, training=settings))
    fit(vae, digits, settings)
    image = torch.from_numpy(digits.test.rows[:2])
    with torch.no_grad():
        mean, std = vae.encode(image)
        standard = torch.randn(2, 5_000, 2)
        weights = vae.log_weights(image, mean, std, standard).double()
        wide = vae.log_weights(image, mean, 2 * std, standard).double()
        exact = quadrature(vae, image)
    bounds = [(weights.reshape(2, -1, k).logsumexp(2) - np.log(k)).mean(1) for k in (1, 5, 50)]
    ladder = torch.stack([*bounds, exact])
    assert (ladder.diff(dim=0) > -1e-3).all()
    torch.testing.assert_close(wide.logsumexp(1) - np.log(5_000), exact, atol=0.05, rtol=0)


def plane() -> tuple[Tensor, Tensor]:
    """A grid over [-6, 6]^2, and the logarithm of the prior's mass at its points."""
    axis = torch.linspace(-6, 6, 121)
    grid = torch.cartesian_prod(axis, axis)
    return grid, -0.5 * grid.square().sum(1) - np.log(2 * np.pi) + 2 * np.log(12 / 120)


def quadrature(vae: VAE, image: Tensor) -> Tensor:
    """log p(x) = log of the integral of p(x | z) N(z; 0, I) over a grid, in nats [B]."""
    grid, prior = plane()
    mass = vae.decode(grid.unsqueeze(0)).log_mass(image.unsqueeze(1)).flatten(2).sum(-1)
    integral: Tensor = (mass + prior).double().logsumexp(1)
    return integral


@pytest.mark.parametrize(("chain", "low", "high"), [(CHAINS[0], 0.05, 0.2), (CHAINS[1], 0, 0.02)])
def test_only_the_metropolis_chain_tends_to_the_conditional_whatever_the_encoder(
    chain: str, low: float, high: float
) -> None:
    """Total variation of a missing pixel of four from its conditional by quadrature; an untrained encoder."""
    torch.manual_seed(1)
    vae = VAE((2, 2), LEVELS, 2, Preset(width=16, depth=1, training=Settings(steps=1))).eval()
    randomise(vae.decoder, 0.5)
    image = torch.tensor([[3, 12], [0, 0]], dtype=torch.uint8)
    known = torch.tensor([[1, 1], [0, 0]], dtype=torch.uint8)
    with torch.no_grad():
        drawn = inpainted(vae, image.expand(20_000, 2, 2), known.expand(20_000, 2, 2), CHAINS.index(chain))
        shares = drawn[:, 1, 0].long().bincount(minlength=LEVELS) / len(drawn)
        distance = 0.5 * (shares - conditional(vae, image, known)[:, 1, 0]).abs().sum()
    assert low <= distance <= high


def inpainted(vae: VAE, image: Tensor, known: Tensor, chain: int) -> Tensor:
    """After 20 steps, with torch's own noise."""
    init, step, rows = InpaintInit(vae), InpaintStep(vae), len(image)
    canvas: Tensor
    canvas, latent = init(image, known, torch.randn(rows, 2), torch.rand(image.shape))
    for index in range(20):
        noise = torch.randn(rows, 2), torch.rand(image.shape), torch.rand(rows)
        clock = torch.tensor(index), torch.tensor(20)
        canvas, latent = step(canvas, latent, known, torch.tensor(chain), *noise, *clock)
    return canvas


def conditional(vae: VAE, image: Tensor, known: Tensor) -> Tensor:
    """The mass of every level of every pixel given the known ones [levels, *shape], by quadrature."""
    grid, prior = plane()
    mixture = vae.decode(grid)
    posterior = (prior + (mixture.log_mass(image) * known).flatten(1).sum(1)).softmax(0)
    return torch.stack(
        [
            (posterior[:, None, None] * mixture.log_mass(torch.full((2, 2), level)).exp()).sum(0)
            for level in range(LEVELS)
        ]
    )


@pytest.mark.parametrize("chain", range(len(CHAINS)))
@pytest.mark.parametrize("pixels", [0, 1])
def test_inpainting_keeps_what_is_known_and_draws_the_rest(
    chain: int, pixels: int, interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:4]
    known = (np.random.default_rng(0).random(images.shape) < 0.5).astype(np.uint8)
    settings = {"steps": 3, "chain": chain, "pixels": pixels}
    first, second = (inpaint(interpreter, images, known, settings, seed) for seed in (1, 2))
    for drawn in (first, second):
        assert (drawn[known == 1] == images[known == 1]).all()
    assert (first != second)[known == 0].any()


def test_missing_pixels_of_the_given_image_are_not_read(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:4]
    known = np.zeros_like(images)
    known[:, :4] = 1
    others = np.where(known == 1, images, 16 - images)
    left, right = (inpaint(interpreter, given, known, {"steps": 3}, seed=1) for given in (images, others))
    np.testing.assert_array_equal(left, right)


def inpaint(
    interpreter: Interpreter,
    images: np.ndarray,
    known: np.ndarray,
    settings: dict[str, int],
    seed: int,
) -> np.ndarray:
    given = {"image": images, "known": known}
    rows = make_rows(interpreter.program("sample:inpaint"), seed, range(len(images)), settings, given)
    image: np.ndarray = interpreter.run("sample:inpaint", rows)["image"]
    return image


def test_a_temperature_of_zero_forgets_the_noise(interpreter: Interpreter) -> None:
    rows = make_rows(interpreter.program("sample"), 1, range(4), {"temperature": 0, "pixels": 0})
    images = interpreter.run("sample", rows)["image"]
    assert (images == images[0]).all()


def test_reconstructing_the_mean_is_decoding_the_encoded_mean(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    images = digits.test.rows[:3]
    encoded = interpreter.run(
        "encode", make_rows(interpreter.program("encode"), 0, range(3), {}, {"image": images})
    )
    decoded = interpreter.run(
        "decode", make_rows(interpreter.program("decode"), 0, range(3), {}, {"latent": encoded["mean"]})
    )
    again = make_rows(interpreter.program("reconstruct"), 9, range(3), {}, {"image": images})
    np.testing.assert_array_equal(interpreter.run("reconstruct", again)["image"], decoded["image"])
