"""Tests of diffusion sampling and inversion: the linear update equals each published sampler."""

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
from export.families.diffusion.sampling_graphs import SampleStep
from export.families.diffusion.solvers import DDIM, DPMPP2M, HEUN, SIGMA_MAX, SIGMA_MIN, resampling_update
from export.graphs.program import DataSpec, TensorSpec
from export.training.trainer import Settings
from samovar import noise
from tests.support.denoisers import NormalNetwork, build_interpreter

Array = NDArray[np.float64]
Denoise = Callable[[Array, float], Array]
STD = 0.75


def randomized(dataset: loading.Dataset) -> Denoiser:
    """Return a denoiser with random weights."""
    torch.manual_seed(0)
    denoiser = FAMILY.build_network(dataset, Preset(width=8, depth=1, training=Settings(steps=1)))
    with torch.no_grad():
        for weights in denoiser.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return denoiser.eval()


@pytest.fixture(scope="module")
def network(digits: loading.Dataset) -> Denoiser:
    return randomized(digits)


@pytest.fixture(scope="module")
def interpreter(network: Denoiser, digits: loading.Dataset) -> Interpreter:
    programs = FAMILY.build_programs(network, digits)
    return eager_interpreter(digits.spec, programs)


@pytest.fixture(scope="module")
def interpreters(interpreter: Interpreter, moons: loading.Dataset) -> dict[str, Interpreter]:
    return {
        "digits": interpreter,
        "moons": eager_interpreter(moons.spec, FAMILY.build_programs(randomized(moons), moons)),
    }


def run(
    interpreter: Interpreter,
    program: str,
    inputs: Mapping[str, NDArray[np.generic]],
    parameters: Mapping[str, float] | None = None,
) -> NDArray[np.float64]:
    """Return the first output of a program, with one row for each input row."""
    count = len(next(iter(inputs.values())))
    rows = make_rows(interpreter.program(program), 5, range(count), parameters, inputs)
    return interpreter.run(program, rows)[interpreter.program(program).outputs[0].name].astype(np.float64)


def schedule(levels: int) -> Array:
    """Return the noise levels of Karras et al., Eq. 5, and a final zero."""
    ramp = np.linspace(0, 1, levels) if levels > 1 else np.zeros(1)
    sigmas = (SIGMA_MAX ** (1 / 7) + ramp * (SIGMA_MIN ** (1 / 7) - SIGMA_MAX ** (1 / 7))) ** 7
    return np.append(sigmas, 0.0)


def ddim(denoise: Denoise, x: Array, steps: int, eta: float, step_noise: list[Array]) -> Array:
    """Song et al. (2020), Eq. 12 and 16, for x = x0 + sigma * eps: alpha_bar = 1 / (1 + sigma^2)."""
    sigmas = schedule(steps)
    for current, following, z in zip(sigmas[:-1], sigmas[1:], step_noise, strict=True):
        clean = denoise(x, current)
        alpha_bar, next_alpha_bar = 1 / (1 + current**2), 1 / (1 + following**2)
        added = (
            eta * np.sqrt((1 - next_alpha_bar) / (1 - alpha_bar)) * np.sqrt(1 - alpha_bar / next_alpha_bar)
        )
        direction = (x - clean) / current
        scaled = np.sqrt(next_alpha_bar) * clean + added * z
        scaled += np.sqrt(1 - next_alpha_bar - added**2) * direction
        x = scaled / np.sqrt(next_alpha_bar)
    return x


def heun(denoise: Denoise, x: Array, steps: int, eta: float, step_noise: list[Array]) -> Array:
    """Karras et al. (2022), Algorithm 1; an even number of evaluations starts with an Euler step."""
    sigmas = schedule(steps // 2 + 1)
    for index, (current, following) in enumerate(pairwise(sigmas)):
        slope = (x - denoise(x, current)) / current
        guess = x + (following - current) * slope
        if following > 0 and not (index == 0 and steps % 2 == 0):
            slope = (slope + (guess - denoise(guess, following)) / following) / 2
            guess = x + (following - current) * slope
        x = guess
    return x


def dpmpp2m(denoise: Denoise, x: Array, steps: int, eta: float, step_noise: list[Array]) -> Array:
    """Lu et al. (2022), Algorithm 2, with lambda = -log sigma and alpha = 1."""
    sigmas = schedule(steps)
    last: Array | None = None
    for index, (current, following) in enumerate(pairwise(sigmas)):
        clean = denoise(x, current)
        if following == 0:
            return clean
        h = np.log(current / following)
        direction = clean
        if last is not None:
            r = np.log(sigmas[index - 1] / current) / h
            direction = (1 + 1 / (2 * r)) * clean - last / (2 * r)
        x, last = following / current * x - np.expm1(-h) * direction, clean
    return x


REFERENCE_SAMPLERS = {DDIM: ddim, HEUN: heun, DPMPP2M: dpmpp2m}


def mixture_denoiser(x: Array, sigma: float) -> Array:
    """Denoise x for data from normal distributions around -0.5 and 0.5: smooth and nonlinear."""
    variance = STD**2 + sigma**2
    return np.asarray((STD**2 * x + sigma**2 * 0.5 * np.tanh(0.5 * x / variance)) / variance)


class MixtureDenoiser(torch.nn.Module):
    """The same denoiser as a network."""

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        level = sigma.reshape(-1, 1, 1).square()
        variance = STD**2 + level
        return (STD**2 * x + level * 0.5 * torch.tanh(0.5 * x / variance)) / variance


def run_steps(steps: int, sampler: int, eta: float) -> tuple[Array, Array, list[Array]]:
    """Run the step graph on one row, and return its last x, its first x and its noise."""
    step = SampleStep(MixtureDenoiser())  # type: ignore[arg-type]
    row, seed = np.array([3]), np.array([11], np.uint64)
    step_noise = [noise.normal(seed, row, np.array([index]), 1, (2, 2)) for index in range(steps)]
    start = SIGMA_MAX * noise.normal(seed, row, np.array([0]), 0, (2, 2))
    x, memory, label = torch.tensor(start), torch.zeros(1, 2, 2), torch.zeros(1).long()
    for index in range(steps):
        counts = (torch.tensor([number]) for number in (index, steps, sampler))
        x, memory, denoised, label, _ = step(
            x, memory, label, torch.ones(1), torch.tensor(step_noise[index]), *counts, torch.tensor([eta])
        )
    np.testing.assert_array_equal(x.numpy(), denoised.numpy())
    return x.numpy().astype(np.float64), start.astype(np.float64), [z.astype(np.float64) for z in step_noise]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "eta"),
    [(DDIM, 0.0), (DDIM, 0.5), (DDIM, 1.0), (HEUN, 0.0), (HEUN, 1.0), (DPMPP2M, 0.0), (DPMPP2M, 1.0)],
)
def test_sample_step_equals_published_sampler(sampler: int, eta: float, steps: int) -> None:
    """The reference is float64. Only ddim uses eta."""
    last, first, step_noise = run_steps(steps, sampler, eta)
    expected = REFERENCE_SAMPLERS[sampler](mixture_denoiser, first, steps, eta, step_noise)
    np.testing.assert_allclose(last, expected, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 2, 5, 6, 39])
@pytest.mark.parametrize("sampler", REFERENCE_SAMPLERS)
def test_published_sampler_takes_requested_number_of_evaluations(sampler: int, steps: int) -> None:
    levels: list[float] = []

    def record_level(x: Array, sigma: float) -> Array:
        levels.append(sigma)
        return mixture_denoiser(x, sigma)

    REFERENCE_SAMPLERS[sampler](record_level, np.ones((1, 2, 2)), steps, 0.0, [np.zeros((1, 2, 2))] * steps)
    assert len(levels) == steps
    assert min(levels) >= (SIGMA_MAX if steps == 1 else SIGMA_MIN) * (1 - 1e-9)


def test_sample_of_mixed_samplers_and_lengths_in_one_batch_equals_separate_runs(
    interpreter: Interpreter,
) -> None:
    program = interpreter.program("sample")
    parts = [
        make_rows(program, 10 * steps + sampler, [0, 1], {"steps": steps, "sampler": sampler, "eta": eta})
        for steps in (1, 4, 7)
        for sampler, eta in ((DDIM, 0.0), (DDIM, 1.0), (HEUN, 0.0), (DPMPP2M, 0.0))
    ]
    batched = interpreter.run("sample", concatenate_rows(parts))["image"]
    separate = np.concatenate([interpreter.run("sample", part)["image"] for part in parts])
    assert np.abs(batched.astype(int) - separate.astype(int)).max() <= 1


def test_sample_without_label_draws_classes_by_frequency(
    interpreter: Interpreter, digits: loading.Dataset
) -> None:
    program = interpreter.program("sample")
    rows = make_rows(program, 0, range(2000))
    init = interpreter.graphs[program.init]
    zeros = np.zeros(2000, np.int64)
    uniform = noise.uniform(rows.seeds, rows.indices, zeros, 2, ())
    drawn = init([np.zeros((2000, 8, 8), np.float32), rows.inputs["label"], uniform])[3]
    frequencies = np.bincount(drawn, minlength=10) / 2000
    expected = np.bincount(digits.train.labels, minlength=10) / len(digits.train)
    np.testing.assert_allclose(frequencies, expected, atol=0.03)


def test_sample_with_label_keeps_it(interpreter: Interpreter) -> None:
    program = interpreter.program("sample")
    labels = np.arange(10)
    rows = make_rows(program, 0, range(10), inputs={"label": labels})
    kept = interpreter.graphs[program.init]([
        np.zeros((10, 8, 8), np.float32), rows.inputs["label"], np.full(10, 0.5, np.float32)
    ])[3]  # fmt: skip
    np.testing.assert_array_equal(kept, labels)


def test_denoiser_without_noise_is_the_identity(network: Denoiser) -> None:
    """This follows from the preconditioning, for any network."""
    x = torch.linspace(-1, 1, 128).reshape(2, 8, 8)
    with torch.no_grad():
        denoised = network(x, torch.full((2,), 1e-4), torch.zeros(2).long())
    torch.testing.assert_close(denoised, x, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "shape", [(8, 7), (7, 8), (20, 15), (9, 7), (5, 5), (16, 12, 3), (28, 28), (32, 32, 3), (1, 1)]
)
def test_loss_is_finite_for_images_of_any_shape(shape: tuple[int, ...]) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
    split = loading.Split(rows, np.arange(6) % 2)
    data_spec = DataSpec("image", TensorSpec("image", "uint8", shape, 0, 255), 256, class_labels=("a", "b"))
    denoiser = randomized(loading.Dataset("noise", data_spec, split, split, split, ""))
    with torch.no_grad():
        losses = denoiser.loss(torch.tensor(rows), torch.tensor(split.labels))
    assert losses.shape == (6,)
    assert losses.isfinite().all()


def test_sample_previews_are_images_within_the_levels(interpreter: Interpreter) -> None:
    """The readout clips the denoised estimate of an unfinished row."""
    assert interpreter.program("sample").previewable
    readout = interpreter.graphs[interpreter.program("sample").readout]
    (image,) = readout([np.array([[[-9.0, 0.0, 9.0]]], np.float32)])
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0, 8, 16]]]


@pytest.mark.parametrize("sampler", REFERENCE_SAMPLERS)
def test_guided_with_guidance_1_equals_sample_and_others_differ(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, labels = interpreters[dataset.name], {"label": np.arange(8) % 2}
    parameters = {"steps": 5, "sampler": sampler}
    plain = run(model, "sample", labels, parameters)
    tolerance = 1 if dataset.spec.num_levels else 1e-3
    for guidance, is_equal in ((1, True), (0, False), (3, False)):
        guided = run(model, "sample:guided", labels, {**parameters, "guidance": guidance})
        assert (np.abs(guided - plain).max() <= tolerance) == is_equal


def test_guided_with_guidance_0_ignores_the_label(interpreters: dict[str, Interpreter]) -> None:
    """The reference decodes the same noise as a latent, with and without the label."""
    model = interpreters["moons"]
    latent = noise.normal(np.full(8, 5, np.uint64), np.arange(8), np.zeros(8, int), 0, (2,))
    parameters = {"steps": 7, "sampler": DPMPP2M}
    for guidance, label in ((0, 2), (1, 1)):
        outputs = run(
            model, "sample:guided", {"label": np.ones(8, int)}, {**parameters, "guidance": guidance}
        )
        expected = run(model, "decode", {"latent": latent, "label": np.full(8, label)}, parameters)
        np.testing.assert_allclose(outputs, expected, atol=1e-5)


@pytest.mark.parametrize("sampler", REFERENCE_SAMPLERS)
def test_decode_of_the_initial_noise_of_a_sample_equals_the_sample(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    model, shape, labels = interpreters[dataset.name], dataset.spec.tensor.shape, np.arange(8) % 2
    latent = noise.normal(np.full(8, 5, np.uint64), np.arange(8), np.zeros(8, int), 0, shape).reshape(8, -1)
    parameters = {"steps": 6, "sampler": sampler}
    outputs = run(model, "sample", {"label": labels}, parameters)
    expected = run(model, "decode", {"latent": latent, "label": labels}, parameters)
    np.testing.assert_allclose(expected, outputs, atol=1 if dataset.spec.num_levels else 1e-3)


@pytest.mark.parametrize("rounds", [1, 3, 20])
def test_inpaint_keeps_known_elements_and_ignores_the_others(
    rounds: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """Known elements are bitwise unchanged."""
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:8]
    known, labels = loading.first_half_mask(rows), np.zeros(8, int)
    parameters = {"steps": 5, "rounds": rounds}
    outputs, masked_outputs = (
        run(
            interpreters[dataset.name],
            "sample:inpaint",
            {name: inputs, "known": known, "label": labels},
            parameters,
        )
        for inputs in (rows, rows * known)
    )
    np.testing.assert_array_equal(outputs[known == 1], rows[known == 1])
    np.testing.assert_array_equal(outputs, masked_outputs)
    assert (outputs[known == 0] != rows[known == 0]).any()


def test_inpaint_with_more_rounds_is_closer_to_the_conditional_distribution() -> None:
    """With correlation 0.9, the second coordinate has mean 1.9 given the first one, not 1."""
    model = build_interpreter(NormalNetwork([1.0, 1.0], [[1.0, 0.9], [0.9, 1.0]]))
    points = np.tile(np.array([[2.0, -9.0]], np.float32), (2000, 1))
    known = np.tile(np.array([[1, 0]], np.uint8), (2000, 1))
    one_round, five_rounds = (
        run(model, "sample:inpaint", {"point": points, "known": known}, {"steps": 100, "rounds": rounds})[
            :, 1
        ]
        for rounds in (1, 5)
    )
    assert 1.3 < one_round.mean() < 1.7
    assert five_rounds.mean() == pytest.approx(1.9, abs=0.12)
    assert 0.1 < five_rounds.var() < 0.2


@pytest.mark.parametrize(("steps", "rounds"), [(1, 5), (7, 1), (7, 3), (12, 4)])
def test_resampling_update_repeats_each_noise_level(steps: int, rounds: int) -> None:
    """The noise levels before and after each step follow RePaint's schedule."""
    num_steps, repeats = torch.full((steps,), steps), min(rounds, steps)
    update = resampling_update(torch.arange(steps), num_steps, torch.full((steps,), rounds))
    levels, remainder = schedule(steps // repeats), steps % repeats
    before = np.repeat(levels[:-1], repeats)
    np.testing.assert_allclose(update.sigma.numpy(), [*[levels[0]] * remainder, *before], rtol=1e-4)
    np.testing.assert_allclose(update.next_sigma.numpy()[:-1], update.sigma.numpy()[1:], rtol=1e-6)
    assert update.next_sigma[-1] == 0
    variance = update.x_from_x.square() * update.sigma.square() + update.x_from_noise.square()
    torch.testing.assert_close(variance, update.next_sigma.square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", REFERENCE_SAMPLERS)
def test_edit_with_more_strength_is_farther_from_the_row(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    """The result ranges from the row itself to a sample that is independent of it."""
    name, rows, labels = dataset.spec.tensor.name, dataset.test.rows[:8], np.zeros(8, int)
    parameters = {"steps": 8, "sampler": sampler}
    model = interpreters[dataset.name]
    edits = [
        run(model, "sample:edit", {name: rows, "label": labels}, {**parameters, "strength": strength})
        for strength in (0.01, 0.3, 0.6, 1)
    ]
    distances = [np.abs(edit - rows).mean() for edit in edits]
    assert distances == sorted(distances)
    assert distances[0] < (0.01 if dataset.spec.num_levels else 0.05) < distances[-1]
    sample = run(model, "sample", {"label": labels}, parameters)
    assert np.abs(edits[-1] - sample).mean() < distances[-1] / 4


def test_encode_of_normal_data_standardizes_rows() -> None:
    """The ODE has a closed form: x / sqrt(variance + sigma^2) is constant."""
    model = build_interpreter(NormalNetwork([0.0, 0.0], [[0.25, 0.0], [0.0, 0.25]]))
    rows = np.linspace(-1, 1, 16, dtype=np.float32).reshape(8, 2)
    latent = rows * np.sqrt((0.25 + SIGMA_MAX**2) / (0.25 + SIGMA_MIN**2), dtype=np.float32) / SIGMA_MAX
    parameters = {"steps": 200, "sampler": HEUN}
    np.testing.assert_allclose(run(model, "encode", {"point": rows}, parameters), latent, atol=5e-3)
    np.testing.assert_allclose(run(model, "decode", {"latent": latent}, parameters), rows, atol=5e-3)


@pytest.mark.parametrize("sampler", REFERENCE_SAMPLERS)
def test_reconstruct_equals_encode_then_decode_and_improves_with_steps(
    sampler: int, dataset: loading.Dataset, interpreters: dict[str, Interpreter]
) -> None:
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:8]
    labels: dict[str, NDArray[np.generic]] = {"label": np.zeros(8, int)}
    model, errors = interpreters[dataset.name], []
    for steps in (10, 41):
        parameters = {"steps": steps, "sampler": sampler}
        latent = run(model, "encode", {name: rows, **labels}, parameters).astype(np.float32)
        decoded = run(model, "decode", {"latent": latent, **labels}, parameters)
        reconstructed = run(model, "reconstruct", {name: rows, **labels}, {**parameters, "steps": 2 * steps})
        np.testing.assert_allclose(reconstructed, decoded, atol=1 if dataset.spec.num_levels else 1e-3)
        errors.append(np.abs(decoded - rows).mean())
    assert errors[1] <= errors[0]
    assert errors[1] < {DDIM: 1.0, HEUN: 0.1, DPMPP2M: 0.1}[sampler]


def test_reconstruct_of_mixed_lengths_in_one_batch_equals_separate_runs(
    interpreters: dict[str, Interpreter],
) -> None:
    model = interpreters["moons"]
    program, points = model.program("reconstruct"), np.ones((2, 2), np.float32)
    parts = [
        make_rows(program, 0, [0, 1], {"steps": steps, "sampler": sampler}, {"point": points * steps / 9})
        for steps in (2, 7, 12)
        for sampler in REFERENCE_SAMPLERS
    ]
    batched = model.run("reconstruct", concatenate_rows(parts))["point"]
    separate = np.concatenate([model.run("reconstruct", part)["point"] for part in parts])
    np.testing.assert_allclose(batched, separate, atol=1e-5)
