"""Diffusion: the one linear step is every textbook sampler, in any mixture of rows."""

from collections.abc import Callable, Mapping
from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.artifacts.interpreter import Interpreter, concatenate_rows, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.diffusion import FAMILY
from export.families.diffusion.denoiser import Denoiser
from export.families.diffusion.sampling import Step
from export.families.diffusion.solvers import DDIM, DPMPP2M, HEUN, SIGMA_MAX, SIGMA_MIN, resampled
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings
from samovar import noise
from tests.support import denoisers as toys

Array = NDArray[np.float64]
Denoise = Callable[[Array, float], Array]
SPREAD = 0.75


def randomised(dataset: loading.Dataset) -> Denoiser:
    torch.manual_seed(0)
    denoiser = FAMILY.build_network(dataset, Preset(width=8, depth=1, training=Settings(steps=1)))
    with torch.no_grad():
        for weights in denoiser.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return denoiser.eval()


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> Denoiser:
    return randomised(digits)


@pytest.fixture(scope="module")
def interpreter(network: Denoiser, digits: loading.Dataset) -> Interpreter:
    programs = FAMILY.build_programs(network, digits)
    return eager_interpreter(digits.spec, programs)


@pytest.fixture(scope="module")
def interpreters(interpreter: Interpreter, moons: loading.Dataset) -> dict[str, Interpreter]:
    return {
        "digits": interpreter,
        "moons": eager_interpreter(moons.spec, FAMILY.build_programs(randomised(moons), moons)),
    }


def play(
    interpreter: Interpreter,
    program: str,
    inputs: Mapping[str, NDArray[np.generic]],
    parameters: Mapping[str, float] | None = None,
) -> NDArray[np.float64]:
    """The first output of a program for eight rows of inputs, or as many as there are."""
    count = len(next(iter(inputs.values())))
    rows = make_rows(interpreter.program(program), 5, range(count), parameters, inputs)
    return interpreter.run(program, rows)[interpreter.program(program).outputs[0].name].astype(np.float64)


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


def test_rows_of_all_samplers_and_lengths_share_a_batch(interpreter: Interpreter) -> None:
    program = interpreter.program("sample")
    parts = [
        make_rows(program, 10 * steps + sampler, [0, 1], {"steps": steps, "sampler": sampler, "eta": eta})
        for steps in (1, 4, 7)
        for sampler, eta in ((DDIM, 0.0), (DDIM, 1.0), (HEUN, 0.0), (DPMPP2M, 0.0))
    ]
    together = interpreter.run("sample", concatenate_rows(parts))["image"]
    alone = np.concatenate([interpreter.run("sample", part)["image"] for part in parts])
    assert np.abs(together.astype(int) - alone.astype(int)).max() <= 1


def test_a_label_that_is_left_out_is_drawn(interpreter: Interpreter, digits: loading.Dataset) -> None:
    """By frequency: half of the classes have about half of the rows."""
    program = interpreter.program("sample")
    rows = make_rows(program, 0, range(2000))
    init = interpreter.graphs[program.init]
    zeros = np.zeros(2000, np.int64)
    uniform = noise.uniform(rows.seeds, rows.indices, zeros, 2, ())
    drawn = init([np.zeros((2000, 8, 8), np.float32), rows.inputs["label"], uniform])[3]
    shares = np.bincount(drawn, minlength=10) / 2000
    known = np.bincount(digits.train.labels, minlength=10) / len(digits.train)
    np.testing.assert_allclose(shares, known, atol=0.03)


def test_a_label_that_is_given_is_kept(interpreter: Interpreter) -> None:
    program = interpreter.program("sample")
    labels = np.arange(10)
    rows = make_rows(program, 0, range(10), inputs={"label": labels})
    kept = interpreter.graphs[program.init]([
        np.zeros((10, 8, 8), np.float32), rows.inputs["label"], np.full(10, 0.5, np.float32)
    ])[3]  # fmt: skip
    np.testing.assert_array_equal(kept, labels)


def test_the_denoiser_keeps_what_is_clean(network: Denoiser) -> None:
    """Preconditioning: at no noise D is the identity, whatever the network says."""
    x = torch.linspace(-1, 1, 128).reshape(2, 8, 8)
    with torch.no_grad():
        denoised = network(x, torch.full((2,), 1e-4), torch.zeros(2).long())
    torch.testing.assert_close(denoised, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "shape", [(8, 7), (7, 8), (20, 15), (9, 7), (5, 5), (16, 12, 3), (28, 28), (32, 32, 3), (1, 1)]
)
def test_images_of_any_size_are_denoised(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
    part = loading.Split(rows, np.arange(6) % 2)
    value = DataSpec("image", TensorSpec("image", "uint8", shape, 0, 255), 256, class_labels=("a", "b"))
    denoiser = randomised(loading.Dataset("noise", value, part, part, part, ""))
    with torch.no_grad():
        losses = denoiser.loss(torch.tensor(rows), torch.tensor(part.labels))
    assert losses.shape == (6,)
    assert losses.isfinite().all()


def test_previews_are_images(interpreter: Interpreter) -> None:
    """The readout of a state on its way, and of one that has not begun, is within the levels."""
    assert interpreter.program("sample").previewable
    readout = interpreter.graphs[interpreter.program("sample").readout]
    (image,) = readout([np.array([[[-9.0, 0.0, 9.0]]], np.float32)])
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0, 8, 16]]]


@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_guidance_1_is_sample_and_more_is_not(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, labels = interpreters[dataset.name], {"label": np.arange(8) % 2}
    walk = {"steps": 5, "sampler": sampler}
    plain = play(model, "sample", labels, walk)
    levels = 1 if dataset.spec.num_levels else 1e-3
    for guidance, is_plain in ((1, True), (0, False), (3, False)):
        guided = play(model, "sample:guided", labels, {**walk, "guidance": guidance})
        assert (np.abs(guided - plain).max() <= levels) == is_plain


def test_no_guidance_is_the_model_without_labels(interpreters: dict[str, Interpreter]) -> None:
    """The same noise as a latent, decoded with and without a label."""
    model = interpreters["moons"]
    latent = noise.normal(np.full(8, 5, np.uint64), np.arange(8), np.zeros(8, int), 0, (2,))
    walk = {"steps": 7, "sampler": DPMPP2M}
    for guidance, label in ((0, 2), (1, 1)):
        made = play(model, "sample:guided", {"label": np.ones(8, int)}, {**walk, "guidance": guidance})
        known = play(model, "decode", {"latent": latent, "label": np.full(8, label)}, walk)
        np.testing.assert_allclose(made, known, atol=1e-5)


@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_decoding_the_noise_of_a_sample_is_that_sample(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, shape, labels = interpreters[dataset.name], dataset.spec.tensor.shape, np.arange(8) % 2
    latent = noise.normal(np.full(8, 5, np.uint64), np.arange(8), np.zeros(8, int), 0, shape).reshape(8, -1)
    walk = {"steps": 6, "sampler": sampler}
    made = play(model, "sample", {"label": labels}, walk)
    known = play(model, "decode", {"latent": latent, "label": labels}, walk)
    np.testing.assert_allclose(known, made, atol=1 if dataset.spec.num_levels else 1e-3)


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_inpainting_keeps_what_is_known(
    rounds: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """To the bit, and looks at nothing else of the given row."""
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:8]
    known, labels = loading.first_half_mask(rows), np.zeros(8, int)
    walk = {"steps": 5, "rounds": rounds}
    made, other = (
        play(
            interpreters[dataset.name], "sample:inpaint", {name: given, "known": known, "label": labels}, walk
        )
        for given in (rows, rows * known)
    )
    np.testing.assert_array_equal(made[known == 1], rows[known == 1])
    np.testing.assert_array_equal(made, other)
    assert (made[known == 0] != rows[known == 0]).any()


def test_what_is_known_steers_the_rest_the_more_the_more_rounds() -> None:
    """Of two coordinates with correlation 0.9, the other has mean 1.9 given the one, not 1."""
    model = toys.interpreter(toys.Normal([1.0, 1.0], [[1.0, 0.9], [0.9, 1.0]]))
    given = np.tile(np.array([[2.0, -9.0]], np.float32), (2000, 1))
    known = np.tile(np.array([[1, 0]], np.uint8), (2000, 1))
    once, often = (
        play(model, "sample:inpaint", {"point": given, "known": known}, {"steps": 100, "rounds": rounds})[
            :, 1
        ]
        for rounds in (1, 5)
    )
    assert 1.3 < once.mean() < 1.7
    assert often.mean() == pytest.approx(1.9, abs=0.12)
    assert 0.1 < often.var() < 0.2


@pytest.mark.parametrize(("steps", "rounds"), [(1, 5), (7, 1), (7, 3), (12, 4)])
def test_every_level_takes_its_rounds(steps: int, rounds: int) -> None:
    """Noise levels before and after each step, against RePaint's schedule."""
    count, whole = torch.full((steps,), steps), min(rounds, steps)
    ticks = resampled(torch.arange(steps), count, torch.full((steps,), rounds))
    levels, left_over = schedule(steps // whole), steps % whole
    before = np.repeat(levels[:-1], whole)
    np.testing.assert_allclose(ticks.sigma.numpy(), [*[levels[0]] * left_over, *before], rtol=1e-4)
    np.testing.assert_allclose(ticks.reached.numpy()[:-1], ticks.sigma.numpy()[1:], rtol=1e-6)
    assert ticks.reached[-1] == 0
    kept = ticks.x_x.square() * ticks.sigma.square() + ticks.x_z.square()
    torch.testing.assert_close(kept, ticks.reached.square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_an_edit_goes_as_far_as_its_strength(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """From the row itself to a sample that knows nothing of it."""
    name, rows, labels = dataset.spec.tensor.name, dataset.test.rows[:8], np.zeros(8, int)
    walk = {"steps": 8, "sampler": sampler}
    model = interpreters[dataset.name]
    edits = [
        play(model, "sample:edit", {name: rows, "label": labels}, {**walk, "strength": strength})
        for strength in (0.01, 0.3, 0.6, 1)
    ]
    distances = [np.abs(edit - rows).mean() for edit in edits]
    assert distances == sorted(distances)
    assert distances[0] < (0.01 if dataset.spec.num_levels else 0.05) < distances[-1]
    sample = play(model, "sample", {"label": labels}, walk)
    assert np.abs(edits[-1] - sample).mean() < distances[-1] / 4


def test_latents_of_a_normal_distribution_are_its_rows_standardised() -> None:
    """Its ODE has a closed form: x / sqrt(variance + sigma^2) stays."""
    model = toys.interpreter(toys.Normal([0.0, 0.0], [[0.25, 0.0], [0.0, 0.25]]))
    rows = np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2)
    latent = rows * np.sqrt((0.25 + SIGMA_MAX**2) / (0.25 + SIGMA_MIN**2), dtype=np.float32) / SIGMA_MAX
    walk = {"steps": 200, "sampler": HEUN}
    np.testing.assert_allclose(play(model, "encode", {"point": rows}, walk), latent, atol=5e-3)
    np.testing.assert_allclose(play(model, "decode", {"latent": latent}, walk), rows, atol=5e-3)


@pytest.mark.parametrize("sampler", TEXTBOOK)
def test_a_round_trip_is_encode_then_decode(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """In the same steps, and nearer to the row with more of them."""
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:8]
    labels: dict[str, NDArray[np.generic]] = {"label": np.zeros(8, int)}
    model, errors = interpreters[dataset.name], []
    for steps in (10, 41):
        walk = {"steps": steps, "sampler": sampler}
        latent = play(model, "encode", {name: rows, **labels}, walk).astype(np.float32)
        again = play(model, "decode", {"latent": latent, **labels}, walk)
        both = play(model, "reconstruct", {name: rows, **labels}, {**walk, "steps": 2 * steps})
        np.testing.assert_allclose(both, again, atol=1 if dataset.spec.num_levels else 1e-3)
        errors.append(np.abs(again - rows).mean())
    assert errors[1] <= errors[0]
    assert errors[1] < {DDIM: 1.0, HEUN: 0.1, DPMPP2M: 0.1}[sampler]


def test_walks_up_and_down_of_all_lengths_share_a_batch(interpreters: dict[str, Interpreter]) -> None:
    model = interpreters["moons"]
    program, given = model.program("reconstruct"), np.ones((2, 2), np.float32)
    parts = [
        make_rows(program, 0, [0, 1], {"steps": steps, "sampler": sampler}, {"point": given * steps / 9})
        for steps in (2, 7, 12)
        for sampler in TEXTBOOK
    ]
    together = model.run("reconstruct", concatenate_rows(parts))["point"]
    alone = np.concatenate([model.run("reconstruct", part)["point"] for part in parts])
    np.testing.assert_allclose(together, alone, atol=1e-5)
