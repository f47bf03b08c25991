"""RealNVP: its determinant is the Jacobian's, its density is one, its inverse exact, its bound a bound."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from export import pipeline
from export.artifacts import reader, verify
from export.artifacts.interpreter import Interpreter, Tensors, eager_interpreter, make_rows
from export.datasets import loading
from export.families.base import Preset
from export.families.realnvp import DRAW, FAMILY, LARGEST_LOG_SCALE, Coupling, EmpiricalCdf, RealNVP, masks
from export.graphs.program import DataSpec, TensorSpec
from export.probability.importance_weighting import DRAWS_PER_STEP
from export.training.trainer import Settings
from samovar import noise
from samovar.v1 import manifest_pb2

PRESET = Preset(width=16, depth=6, training=Settings(steps=1))


def randomised(dataset: loading.Dataset, scale: float = 0.15) -> RealNVP:
    """A flow that is far from the identity with which it begins."""
    torch.manual_seed(0)
    flow = FAMILY.build_network(dataset, PRESET)
    with torch.no_grad():
        for weights in flow.parameters():
            weights.add_(scale * torch.randn_like(weights))
    return flow.eval().requires_grad_(False)


def interpreter(dataset: loading.Dataset) -> Interpreter:
    return eager_interpreter(dataset.spec, FAMILY.build_programs(randomised(dataset), dataset))


def play(
    interpreter: Interpreter,
    operation: str,
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tensors:
    """Six rows of a request, or as many as the inputs have."""
    count = len(next(iter(inputs.values()), range(6)))
    return interpreter.run(
        operation, make_rows(interpreter.program(operation), seed, range(count), parameters, inputs)
    )


def coordinates(dataset: loading.Dataset, count: int) -> Tensor:
    """Test rows as the flow takes them [count, D], in double precision."""
    rows = torch.from_numpy(dataset.test.rows[:count]).flatten(1).double()
    return rows + torch.rand_like(rows) if dataset.spec.num_levels else rows


def test_the_log_determinant_is_that_of_the_jacobian(dataset: loading.Dataset) -> None:
    flow = randomised(dataset).double()
    for row in coordinates(dataset, 4):
        jacobian = torch.func.jacrev(lambda x: flow.encode(x)[0])(row)
        torch.testing.assert_close(flow.encode(row)[1].sum(), torch.linalg.slogdet(jacobian).logabsdet)


def test_the_density_is_the_base_density_times_the_determinant(dataset: loading.Dataset) -> None:
    flow, rows = randomised(dataset).double(), coordinates(dataset, 8)
    latent, slopes = flow.encode(rows)
    torch.testing.assert_close(flow.log_density(rows), normal(latent) + slopes.sum(1))


def test_the_density_integrates_to_one(moons: loading.Dataset) -> None:
    flow = randomised(moons, 0.3).double()
    axis = torch.linspace(-20, 20, 501).double()
    total = flow.log_density(torch.cartesian_prod(axis, axis)).exp().sum() * (40 / 500) ** 2
    assert float(total) == pytest.approx(1, abs=1e-4)


def test_decoding_is_the_inverse_of_encoding(dataset: loading.Dataset) -> None:
    flow, rows = randomised(dataset), coordinates(dataset, 50).float()
    torch.testing.assert_close(flow.decode(flow.encode(rows)[0]), rows, atol=1e-4, rtol=0)
    latent = torch.randn(50, flow.dimensions).double()
    flow.double()
    torch.testing.assert_close(flow.encode(flow.decode(latent))[0], latent, atol=1e-4, rtol=0)


def test_a_pixel_of_the_training_rows_becomes_nearly_normal() -> None:
    rows = np.random.default_rng(0).choice(6, (5000, 2), p=[0.5, 0.3, 0.1, 0.05, 0.04, 0.01]).astype(np.uint8)
    torch.manual_seed(0)
    normal, _ = EmpiricalCdf(rows, 6)(torch.from_numpy(rows) + torch.rand(rows.shape))
    assert normal.mean(0).abs().max() < 0.05
    assert (normal.std(0) - 1).abs().max() < 0.05


def test_every_level_comes_back_however_rare_it_is() -> None:
    rows = np.zeros((1000, 2), np.uint8)
    rows[:, 1] = 255
    rows[0] = 128
    marginal = EmpiricalCdf(rows, 256)
    x = torch.arange(256).unsqueeze(1) + torch.tensor([0.25, 0.75])
    assert torch.equal(marginal.inverse(marginal(x)[0]).floor(), x.floor())


@pytest.mark.parametrize("shape", [(2,), (5,), (8, 8), (4, 6, 3), (1, 2)])
def test_masks_alternate(shape: tuple[int, ...]) -> None:
    """Of every pair of couplings each coordinate is kept by one and moved by the other."""
    kept = masks(shape, 12)
    for first, second in zip(kept[0::2], kept[1::2], strict=True):
        assert ((first + second) == 1).all()
        assert 0 < first.sum() < len(first)


def test_images_have_masks_of_squares_rows_and_columns() -> None:
    squares, rows, columns = (mask.reshape(2, 2).tolist() for mask in masks((2, 2), 6)[0::2])
    assert (squares, rows, columns) == ([[0, 1], [1, 0]], [[0, 0], [1, 1]], [[0, 1], [0, 1]])


def test_a_coupling_keeps_half_and_scales_the_rest_within_bounds() -> None:
    torch.manual_seed(1)
    kept = torch.tensor([1.0, 0, 1, 0])
    coupling = Coupling(kept, PRESET)
    for weights in coupling.parameters():
        torch.nn.init.normal_(weights, std=10)
    x = 100 * torch.randn(20, 4)
    y, log_slopes = coupling(x)
    assert (y[:, kept == 1] == x[:, kept == 1]).all()
    assert (y[:, kept == 0] != x[:, kept == 0]).all()
    assert (log_slopes[:, kept == 1] == 0).all()
    assert 0.9 * LARGEST_LOG_SCALE < log_slopes.abs().max() <= LARGEST_LOG_SCALE


def test_the_untrained_flow_of_points_is_the_normal_distribution(moons: loading.Dataset) -> None:
    rows = torch.from_numpy(moons.test.rows[:5])
    torch.testing.assert_close(FAMILY.build_network(moons, PRESET).eval().log_density(rows), normal(rows))


def normal(latent: Tensor) -> Tensor:
    """Log-density of the standard normal distribution [B]."""
    return -0.5 * latent.square().sum(1) - 0.5 * latent.shape[1] * math.log(2 * math.pi)


def test_a_round_trip_reports_how_far_it_is_off(dataset: loading.Dataset) -> None:
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:20]
    answer = play(interpreter(dataset), "reconstruct", {name: rows})
    assert answer["largest_error"].max() < 1e-3
    if dataset.spec.kind == "image":
        np.testing.assert_array_equal(answer[name], rows)
    else:
        np.testing.assert_array_equal(np.abs(answer[name] - rows).max(1), answer["largest_error"])


def test_drawn_dequantisations_decode_to_the_same_image(digits: loading.Dataset) -> None:
    model, images = interpreter(digits), digits.test.rows[:5]
    middle = play(model, "encode", {"image": images}, seed=1)["latent"]
    drawn, other = (
        play(model, "encode", {"image": images}, {"dequantisation": DRAW}, seed)["latent"] for seed in (1, 2)
    )
    assert not np.isclose(middle, drawn).all(1).any()
    assert not np.isclose(other, drawn).all(1).any()
    for latent in (middle, drawn, other):
        np.testing.assert_array_equal(play(model, "decode", {"latent": latent})["image"], images)


def test_the_temperature_is_the_spread_of_the_latents(dataset: loading.Dataset) -> None:
    model, name = interpreter(dataset), dataset.spec.tensor.name
    drawn = noise.normal(
        np.full(6, 9, np.uint64), np.arange(6), np.zeros(6, int), 0, [math.prod(dataset.spec.tensor.shape)]
    )
    for temperature in (0.0, 0.5, 1.0):
        samples = play(model, "sample", {}, {"temperature": temperature}, seed=9)[name]
        expected = play(model, "decode", {"latent": np.float32(temperature) * drawn})[name]
        np.testing.assert_array_equal(samples, expected)


def test_the_score_of_a_point_is_exact_and_of_an_image_a_bound(
    digits: loading.Dataset, moons: loading.Dataset
) -> None:
    point, image = (interpreter(dataset).program("score").score for dataset in (moons, digits))
    assert (point.kind, point.dimensions, point.draws_parameter) == (manifest_pb2.Score.KIND_EXACT, 2, "")
    assert (image.kind, image.dimensions, image.draws_parameter) == (
        manifest_pb2.Score.KIND_LOWER_BOUND,
        64,
        "draws",
    )
    assert "make_moons" in point.coordinate_space
    assert image.coordinate_space == "integers 0..16"


@pytest.mark.parametrize("draws", [1, 16, 25])
def test_the_bound_is_of_exactly_so_many_draws(draws: int, digits: loading.Dataset) -> None:
    """Directly from the documented noise, without steps and masks."""
    images = digits.test.rows[:3]
    answer = play(interpreter(digits), "score", {"image": images}, {"draws": draws}, seed=6)
    steps = [np.full(3, step) for step in range(-(-draws // DRAWS_PER_STEP))]
    uniform = [
        noise.uniform(np.full(3, 6, np.uint64), np.arange(3), step, 0, (DRAWS_PER_STEP, 64)) for step in steps
    ]
    drawn = torch.from_numpy(np.concatenate(uniform, 1)[:, :draws])
    weights = randomised(digits).log_density(torch.from_numpy(images).flatten(1).unsqueeze(1) + drawn)
    expected = weights.logsumexp(1) - math.log(draws)
    np.testing.assert_allclose(answer["log_likelihood"], expected.numpy(), rtol=1e-5)


def test_bounds_rise_to_the_exact_mass() -> None:
    """E[IW-1] <= E[IW-4] <= E[IW-32] <= log of the integral over the unit square of a two-pixel image."""
    flow = randomised(pairs(), 0.4).double()
    images = torch.tensor([[0.0, 0], [1, 2], [2, 0]]).double().unsqueeze(1)
    axis = (torch.arange(300).double() + 0.5) / 300
    exact = flow.log_density(images + torch.cartesian_prod(axis, axis)).logsumexp(1) - math.log(300**2)
    weights = flow.log_density(images + torch.rand(1, 64_000, 2).double())
    bounds = [
        (weights.reshape(3, -1, count).logsumexp(2) - math.log(count)).mean(1) for count in (1, 4, 32, 64_000)
    ]
    ladder = torch.stack([*bounds[:3], exact])
    assert (ladder.diff(dim=0) > 0).all()
    torch.testing.assert_close(bounds[3], exact, atol=0.02, rtol=0)


def pairs() -> loading.Dataset:
    """Images of two pixels with three levels."""
    rows = np.random.default_rng(0).integers(0, 3, (40, 1, 2), np.uint8)
    part = loading.Split(rows, np.zeros(40, np.int64))
    value = DataSpec("image", TensorSpec("image", "uint8", (1, 2), 0, 2), num_levels=3, class_labels=("any",))
    return loading.Dataset("pairs", value, part, part, part, "")


def test_points_are_trained_measured_and_served_too(moons: loading.Dataset, tmp_path: Path) -> None:
    order = pipeline.TrainingJob(FAMILY, moons, tmp_path, preset="tiny", formats=("torchscript",))
    written = pipeline.run(order)
    manifest = reader.read(written)
    assert [quality.name for quality in manifest.quality] == ["negative log-density", "C2ST"]
    assert (written / pipeline.SAMPLES_IMAGE).read_bytes().startswith(b"\x89PNG")
    assert verify.verify(written).failures == []
