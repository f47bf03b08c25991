"""Tests of RealNVP: exact determinant, normalized density, exact inverse, valid likelihood bound."""

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
from export.families.realnvp import FAMILY
from export.families.realnvp.network import MAX_LOG_SCALE, Coupling, EmpiricalCdf, RealNVP, coupling_masks
from export.families.realnvp.programs import DRAW
from export.graphs.program import DataSpec, TensorSpec
from export.probability.importance_weighting import DRAWS_PER_STEP
from export.training.trainer import Settings
from samovar import noise
from samovar.v1 import manifest_pb2

PRESET = Preset(width=16, depth=6, training=Settings(steps=1))


def randomized(dataset: loading.Dataset, scale: float = 0.15) -> RealNVP:
    """Return a flow with random weights, far from its initial identity."""
    torch.manual_seed(0)
    flow = FAMILY.build_network(dataset, PRESET)
    with torch.no_grad():
        for weights in flow.parameters():
            weights.add_(scale * torch.randn_like(weights))
    return flow.eval().requires_grad_(False)


def interpreter(dataset: loading.Dataset) -> Interpreter:
    return eager_interpreter(dataset.spec, FAMILY.build_programs(randomized(dataset), dataset))


def run(
    interpreter: Interpreter,
    operation: str,
    inputs: Mapping[str, np.ndarray],
    parameters: Mapping[str, float] | None = None,
    seed: int = 0,
) -> Tensors:
    """Run a request with one row for each input row, or with six rows if there are no inputs."""
    count = len(next(iter(inputs.values()), range(6)))
    return interpreter.run(
        operation, make_rows(interpreter.program(operation), seed, range(count), parameters, inputs)
    )


def coordinates(dataset: loading.Dataset, count: int) -> Tensor:
    """Return test rows as coordinates, float64 [count, D]; pixels get uniform noise."""
    rows = torch.from_numpy(dataset.test.rows[:count]).flatten(1).double()
    return rows + torch.rand_like(rows) if dataset.spec.num_levels else rows


def test_encode_log_determinant_equals_jacobian_log_determinant(dataset: loading.Dataset) -> None:
    flow = randomized(dataset).double()
    for row in coordinates(dataset, 4):
        jacobian = torch.func.jacrev(lambda x: flow.encode(x)[0])(row)
        torch.testing.assert_close(flow.encode(row)[1].sum(), torch.linalg.slogdet(jacobian).logabsdet)


def test_log_density_is_base_log_density_plus_log_determinant(dataset: loading.Dataset) -> None:
    flow, rows = randomized(dataset).double(), coordinates(dataset, 8)
    latent, log_det_terms = flow.encode(rows)
    torch.testing.assert_close(flow.log_density(rows), normal_log_density(latent) + log_det_terms.sum(1))


def test_density_of_points_integrates_to_one(moons: loading.Dataset) -> None:
    flow = randomized(moons, 0.3).double()
    axis = torch.linspace(-20, 20, 501).double()
    integral = flow.log_density(torch.cartesian_prod(axis, axis)).exp().sum() * (40 / 500) ** 2
    assert float(integral) == pytest.approx(1, abs=1e-4)


def test_decode_inverts_encode(dataset: loading.Dataset) -> None:
    flow, rows = randomized(dataset), coordinates(dataset, 50).float()
    torch.testing.assert_close(flow.decode(flow.encode(rows)[0]), rows, atol=1e-4, rtol=0)
    latent = torch.randn(50, flow.dimensions).double()
    flow.double()
    torch.testing.assert_close(flow.encode(flow.decode(latent))[0], latent, atol=1e-4, rtol=0)


def test_empirical_cdf_maps_training_pixels_to_nearly_normal_numbers() -> None:
    rows = np.random.default_rng(0).choice(6, (5000, 2), p=[0.5, 0.3, 0.1, 0.05, 0.04, 0.01]).astype(np.uint8)
    torch.manual_seed(0)
    mapped, _ = EmpiricalCdf(rows, 6)(torch.from_numpy(rows) + torch.rand(rows.shape))
    assert mapped.mean(0).abs().max() < 0.05
    assert (mapped.std(0) - 1).abs().max() < 0.05


def test_empirical_cdf_inverse_recovers_every_level_including_rare_ones() -> None:
    rows = np.zeros((1000, 2), np.uint8)
    rows[:, 1] = 255
    rows[0] = 128
    cdf = EmpiricalCdf(rows, 256)
    x = torch.arange(256).unsqueeze(1) + torch.tensor([0.25, 0.75])
    assert torch.equal(cdf.inverse(cdf(x)[0]).floor(), x.floor())


@pytest.mark.parametrize("shape", [(2,), (5,), (8, 8), (4, 6, 3), (1, 2)])
def test_coupling_masks_of_each_pair_are_complementary(shape: tuple[int, ...]) -> None:
    """In each pair of couplings, one keeps a coordinate and the other transforms it."""
    masks = coupling_masks(shape, 12)
    for first, second in zip(masks[0::2], masks[1::2], strict=True):
        assert ((first + second) == 1).all()
        assert 0 < first.sum() < len(first)


def test_coupling_masks_of_images_are_checkerboards_rows_and_columns() -> None:
    squares, rows, columns = (mask.reshape(2, 2).tolist() for mask in coupling_masks((2, 2), 6)[0::2])
    assert (squares, rows, columns) == ([[0, 1], [1, 0]], [[0, 0], [1, 1]], [[0, 1], [0, 1]])


def test_coupling_keeps_masked_coordinates_and_bounds_the_scale_of_the_others() -> None:
    torch.manual_seed(1)
    mask = torch.tensor([1.0, 0, 1, 0])
    coupling = Coupling(mask, PRESET)
    for weights in coupling.parameters():
        torch.nn.init.normal_(weights, std=10)
    x = 100 * torch.randn(20, 4)
    y, log_scale = coupling(x)
    assert (y[:, mask == 1] == x[:, mask == 1]).all()
    assert (y[:, mask == 0] != x[:, mask == 0]).all()
    assert (log_scale[:, mask == 1] == 0).all()
    assert 0.9 * MAX_LOG_SCALE < log_scale.abs().max() <= MAX_LOG_SCALE


def test_untrained_flow_of_points_has_standard_normal_density(moons: loading.Dataset) -> None:
    rows = torch.from_numpy(moons.test.rows[:5])
    torch.testing.assert_close(
        FAMILY.build_network(moons, PRESET).eval().log_density(rows), normal_log_density(rows)
    )


def normal_log_density(latent: Tensor) -> Tensor:
    """Return the log-density [B] of the standard normal distribution at latents [B, D]."""
    return -0.5 * latent.square().sum(1) - 0.5 * latent.shape[1] * math.log(2 * math.pi)


def test_reconstruct_returns_the_row_and_its_largest_error(dataset: loading.Dataset) -> None:
    name, rows = dataset.spec.tensor.name, dataset.test.rows[:20]
    outputs = run(interpreter(dataset), "reconstruct", {name: rows})
    assert outputs["largest_error"].max() < 1e-3
    if dataset.spec.kind == "image":
        np.testing.assert_array_equal(outputs[name], rows)
    else:
        np.testing.assert_array_equal(np.abs(outputs[name] - rows).max(1), outputs["largest_error"])


def test_encode_with_drawn_dequantization_gives_latents_that_decode_to_the_image(
    digits: loading.Dataset,
) -> None:
    model, images = interpreter(digits), digits.test.rows[:5]
    middle = run(model, "encode", {"image": images}, seed=1)["latent"]
    drawn, other = (
        run(model, "encode", {"image": images}, {"dequantization": DRAW}, seed)["latent"] for seed in (1, 2)
    )
    assert not np.isclose(middle, drawn).all(1).any()
    assert not np.isclose(other, drawn).all(1).any()
    for latent in (middle, drawn, other):
        np.testing.assert_array_equal(run(model, "decode", {"latent": latent})["image"], images)


def test_sample_temperature_is_the_standard_deviation_of_the_latents(dataset: loading.Dataset) -> None:
    model, name = interpreter(dataset), dataset.spec.tensor.name
    base_noise = noise.normal(
        np.full(6, 9, np.uint64), np.arange(6), np.zeros(6, int), 0, [math.prod(dataset.spec.tensor.shape)]
    )
    for temperature in (0.0, 0.5, 1.0):
        samples = run(model, "sample", {}, {"temperature": temperature}, seed=9)[name]
        expected = run(model, "decode", {"latent": np.float32(temperature) * base_noise})[name]
        np.testing.assert_array_equal(samples, expected)


def test_score_is_declared_exact_for_points_and_a_lower_bound_for_images(
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
def test_score_of_image_averages_exactly_the_requested_draws(draws: int, digits: loading.Dataset) -> None:
    """The reference computes the bound directly from the documented noise, without steps and masks."""
    images = digits.test.rows[:3]
    outputs = run(interpreter(digits), "score", {"image": images}, {"draws": draws}, seed=6)
    steps = [np.full(3, step) for step in range(-(-draws // DRAWS_PER_STEP))]
    uniform = [
        noise.uniform(np.full(3, 6, np.uint64), np.arange(3), step, 0, (DRAWS_PER_STEP, 64)) for step in steps
    ]
    offsets = torch.from_numpy(np.concatenate(uniform, 1)[:, :draws])
    log_weights = randomized(digits).log_density(torch.from_numpy(images).flatten(1).unsqueeze(1) + offsets)
    expected = log_weights.logsumexp(1) - math.log(draws)
    np.testing.assert_allclose(outputs["log_likelihood"], expected.numpy(), rtol=1e-5)


def test_bound_with_more_draws_rises_to_the_exact_probability() -> None:
    """E[IW-1] <= E[IW-4] <= E[IW-32] <= log of the integral over the unit square of a two-pixel image."""
    flow = randomized(two_pixel_images(), 0.4).double()
    images = torch.tensor([[0.0, 0], [1, 2], [2, 0]]).double().unsqueeze(1)
    axis = (torch.arange(300).double() + 0.5) / 300
    exact = flow.log_density(images + torch.cartesian_prod(axis, axis)).logsumexp(1) - math.log(300**2)
    log_weights = flow.log_density(images + torch.rand(1, 64_000, 2).double())
    bounds = [
        (log_weights.reshape(3, -1, count).logsumexp(2) - math.log(count)).mean(1)
        for count in (1, 4, 32, 64_000)
    ]
    ascending = torch.stack([*bounds[:3], exact])
    assert (ascending.diff(dim=0) > 0).all()
    torch.testing.assert_close(bounds[3], exact, atol=0.02, rtol=0)


def two_pixel_images() -> loading.Dataset:
    """Return images of two pixels with three levels."""
    rows = np.random.default_rng(0).integers(0, 3, (40, 1, 2), np.uint8)
    split = loading.Split(rows, np.zeros(40, np.int64))
    data_spec = DataSpec(
        "image", TensorSpec("image", "uint8", (1, 2), 0, 2), num_levels=3, class_labels=("any",)
    )
    return loading.Dataset("pairs", data_spec, split, split, split, "")


def test_pipeline_trains_measures_and_writes_a_flow_of_points(moons: loading.Dataset, tmp_path: Path) -> None:
    job = pipeline.TrainingJob(FAMILY, moons, tmp_path, preset="tiny", formats=("torchscript",))
    artifact = pipeline.run(job)
    manifest = reader.read(artifact)
    assert [quality.name for quality in manifest.quality] == ["negative log-density", "C2ST"]
    assert (artifact / pipeline.SAMPLES_IMAGE).read_bytes().startswith(b"\x89PNG")
    assert verify.verify(artifact).failures == []
