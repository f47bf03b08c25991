"""Diffusion: the one linear step is every textbook sampler, in any mixture of rows."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export import artifact, data, replay
from export.families.base import Preset
from export.families.diffusion import FAMILY
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampler import DDIM, DPMPP2M, HEUN, SIGMA_MAX, SIGMA_MIN
from export.families.diffusion.samples import Step
from export.training import Settings
from samovar import noise

Array = NDArray[np.float64]
Denoise = Callable[[Array, float], Array]
SPREAD = 0.75


@pytest.fixture(scope="module")
def network(digits: data.Dataset) -> Denoiser:
    torch.manual_seed(0)
    denoiser = FAMILY.network(digits, Preset(width=8, depth=1, training=Settings(steps=1)))
    with torch.no_grad():
        for weights in denoiser.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return denoiser.eval()


@pytest.fixture(scope="module")
def player(network: Denoiser, digits: data.Dataset) -> replay.Player:
    programs = FAMILY.programs(network, digits)
    return artifact.player(digits.value, programs)


def schedule(levels: int) -> Array:
    """Karras et al., Eq. 5, and the final zero."""
    ramp = np.linspace(0, 1, levels) if levels > 1 else np.zeros(1)
    sigmas = (SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7
    return np.append(sigmas, 0.0)


def ddim(denoise: Denoise, x: Array, steps: int, eta: float, fresh: list[Array]) -> Array:
    """Song et al. (2020), Eq. 12 and 16, for x = x0 + sigma * eps: alpha_bar = 1 / (1 + sigma^2)."""
    sigmas = schedule(steps)
    for now, after, z in zip(sigmas[:-1], sigmas[1:], fresh, strict=True):
        clean = denoise(x, now)
        bar_now, bar_after = 1 / (1 + now**2), 1 / (1 + after**2)
        injected = eta * np.sqrt((1 - bar_after) / (1 - bar_now)) * np.sqrt(1 - bar_now / bar_after)
        direction = (x - clean) / now
        scaled = np.sqrt(bar_after) * clean + np.sqrt(1 - bar_after - injected**2) * direction + injected * z
        x = scaled / np.sqrt(bar_after)
    return x


def heun(denoise: Denoise, x: Array, steps: int, eta: float, fresh: list[Array]) -> Array:
    """Karras et al. (2022), Algorithm 1; an even number of evaluations begins with an Euler step."""
    sigmas = schedule(steps // 2 + 1)
    for index, (now, after) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, now)) / now
        guess = x + (after - now) * slope
        if after > 0 and not (index == 0 and steps % 2 == 0):
            slope = (slope + (guess - denoise(guess, after)) / after) / 2
            guess = x + (after - now) * slope
        x = guess
    return x


def dpmpp2m(denoise: Denoise, x: Array, steps: int, eta: float, fresh: list[Array]) -> Array:
    """Lu et al. (2022), Algorithm 2, with lambda = -log sigma and alpha = 1."""
    sigmas = schedule(steps)
    last: Array | None = None
    for index, (now, after) in enumerate(pairwise(sigmas)):
        clean = denoise(x, now)
        if after == 0:
            return clean
        h = np.log(now / after)
        direction = clean
        if last is not None:
            r = np.log(sigmas[index - 1] / now) / h
            direction = (1 + 1 / (2 * r)) * clean - last / (2 * r)
        x, last = after / now * x - np.expm1(-h) * direction, clean
    return x


TEXTBOOK = {DDIM: ddim, HEUN: heun, DPMPP2M: dpmpp2m}


def gaussian(x: Array, sigma: float) -> Array:
    """The denoiser of two points at -0.5 and 0.5 blurred by SPREAD: smooth, not linear."""
    variance = SPREAD**2 + sigma**2
    return np.asarray((SPREAD**2 * x + sigma**2 * 0.5 * np.tanh(0.5 * x / variance)) / variance)


class Gaussian(torch.nn.Module):
    """The same as a network."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        level = sigma.reshape(-1, 1, 1).square()
        variance = SPREAD**2 + level
        return (SPREAD**2 * x + level * 0.5 * torch.tanh(0.5 * x / variance)) / variance


def walk(steps: int, sampler: int, eta: float) -> tuple[Array, Array, list[Array]]:
    """Run the graph's step on one row; returns where it ends, where it began, and its noise."""
    step = Step(Gaussian())  # type: ignore[arg-type]
    row, seed = np.array([3]), np.array([11], np.uint64)
    fresh = [noise.normal(seed, row, np.array([index]), 1, (2, 2)) for index in range(steps)]
    start = SIGMA_MAX * noise.normal(seed, row, np.array([0]), 0, (2, 2))
    x, memory, label = torch.tensor(start), torch.zeros(1, 2, 2), torch.zeros(1).long()
    for index in range(steps):
        counts = (torch.tensor([number]) for number in (index, steps, sampler))
        x, memory, denoised, label, _ = step(
            x, memory, label, torch.ones(1), torch.tensor(fresh[index]), *counts, torch.tensor([eta])
        )
    np.testing.assert_array_equal(x.numpy(), denoised.numpy())
    return x.numpy().astype(np.float64), start.astype(np.float64), [z.astype(np.float64) for z in fresh]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [(DDIM, 0.0), (DDIM, 0.5), (DDIM, 1.0), (HEUN, 0.0), (HEUN, 1.0), (DPMPP2M, 0.0), (DPMPP2M, 1.0)],
)
def test_the_linear_step_is_the_textbook_sampler(sampler: int, eta: float, steps: int) -> None:
    """Against float64; eta counts for ddim only."""
    end, start, fresh = walk(steps, sampler, eta)
    np.testing.assert_allclose(end, TEXTBOOK[sampler](gaussian, start, steps, eta, fresh), atol=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 39])
@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_the_textbook_takes_as_many_evaluations_as_were_asked_for(sampler: int, steps: int) -> None:
    levels: list[float] = []

    def counting(x: Array, sigma: float) -> Array:
        levels.append(sigma)
        return gaussian(x, sigma)

    TEXTBOOK[sampler](counting, np.ones((1, 2, 2)), steps, 0.0, [np.zeros((1, 2, 2))] * steps)
    assert len(levels) == steps
    assert min(levels) >= (SIGMA_MAX if steps == 1 else SIGMA_MIN) * (1 - 1e-9)


def test_rows_of_all_samplers_and_lengths_share_a_batch(player: replay.Player) -> None:
    program = player.program("sample")
    parts = [
        replay.request(
            program, 10 * steps + sampler, [0, 1], {"steps": steps, "sampler": sampler, "eta": eta}
        )
        for steps in (1, 4, 7)
        for sampler, eta in ((DDIM, 0.0), (DDIM, 1.0), (HEUN, 0.0), (DPMPP2M, 0.0))
    ]
    together = player.play("sample", replay.join(parts))["image"]
    alone = np.concatenate([player.play("sample", part)["image"] for part in parts])
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1


def test_a_label_that_is_left_out_is_drawn(player: replay.Player, digits: data.Dataset) -> None:
    """By frequency: half of the classes have about half of the rows."""
    program = player.program("sample")
    rows = replay.request(program, 0, range(2000))
    init = player.graphs[program.init]
    zeros = np.zeros(2000, np.int64)
    uniform = noise.uniform(rows.seeds, rows.indices, zeros, 2, ())
    drawn = init([np.zeros((2000, 8, 8), np.float32), rows.inputs["label"], uniform])[3]
    shares = np.bincount(drawn, minlength=10) / 2000
    known = np.bincount(digits.train.labels, minlength=10) / len(digits.train)
    np.testing.assert_allclose(shares, known, atol=0.03)


def test_a_label_that_is_given_is_kept(player: replay.Player) -> None:
    program = player.program("sample")
    labels = np.arange(10)
    rows = replay.request(program, 0, range(10), inputs={"label": labels})
    kept = player.graphs[program.init]([
        np.zeros((10, 8, 8), np.float32), rows.inputs["label"], np.full(10, 0.5, np.float32)
    ])[3]  # fmt: skip
    np.testing.assert_array_equal(kept, labels)


def test_the_denoiser_keeps_what_is_clean(network: Denoiser) -> None:
    """Preconditioning: at no noise D is the identity, whatever the network says."""
    x = torch.linspace(-1, 1, 128).reshape(2, 8, 8)
    with torch.no_grad():
        denoised = network(x, torch.full((2,), 1e-4), torch.zeros(2).long())
    torch.testing.assert_close(denoised, x, atol=1e-3, rtol=0)


def test_previews_are_images(player: replay.Player) -> None:
    """The readout of a state on its way, and of one that has not begun, is within the levels."""
    assert player.program("sample").previewable
    readout = player.graphs[player.program("sample").readout]
    (image,) = readout([np.array([[[-9.0, 0.0, 9.0]]], np.float32)])
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0, 8, 16]]]
