"""Tests of interpolation and of edits in latent space."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samovar import Client, InvalidRequest, UnsupportedOperation, interpolation, latent, noise
from samovar.tensors import Array, unpack
from samovar.v1 import inference_pb2
from tests.support.fake_server import LEVELS, FakeService

WEIGHTS = np.linspace(0, 1, 7)
SEEDS = 1, 3
VECTORS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3).map(np.array)


@given(VECTORS, VECTORS)
def test_interpolation_starts_and_ends_at_given_points(a: np.ndarray, b: np.ndarray) -> None:
    for interpolate in (interpolation.lerp, interpolation.slerp):
        np.testing.assert_allclose(interpolate(a, b, [0, 1]), [a, b], atol=1e-4)


@given(st.integers(0, 2**32 - 1))
def test_slerp_keeps_norm_and_constant_angle(seed: int) -> None:
    ends = np.random.default_rng(seed).standard_normal((2, 16))
    a, b = 3 * ends / np.linalg.norm(ends, axis=1, keepdims=True)
    points = interpolation.slerp(a, b, WEIGHTS)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 3, rtol=1e-4)
    products = (points[1:] * points[:-1]).sum(1)
    np.testing.assert_allclose(products, products[0], rtol=1e-4)


@pytest.mark.parametrize("b", [[2.0, 0, 0], [1.0, 1e-9, 0], [-1.0, 0, 0], [0.0, 0, 0]])
def test_slerp_of_parallel_vectors_is_lerp(b: list[float]) -> None:
    a = [1.0, 0, 0]
    np.testing.assert_array_equal(interpolation.slerp(a, b, WEIGHTS), interpolation.lerp(a, b, WEIGHTS))


def test_interpolation_has_shape_of_weights_and_points() -> None:
    assert interpolation.slerp(np.eye(2), 1 - np.eye(2), np.zeros((4, 5))).shape == (4, 5, 2, 2)
    assert interpolation.lerp(0.0, 1.0, 0.25) == 0.25


def test_interpolate_encodes_and_decodes_rows(client: Client) -> None:
    """The counter encodes an image as (mean, -mean) and decodes the first element, truncated."""
    black, white = np.zeros((8, 6), np.uint8), np.full((8, 6), LEVELS - 1, np.uint8)
    rows = latent.interpolate(client, "counter", black, white, 5)
    assert rows[:, 0, 0].tolist() == [0, 4, 8, 12, 16]


def test_attribute_is_difference_of_means_and_edit_adds_it(client: Client) -> None:
    dark, bright = (np.full((3, 8, 6), level, np.uint8) for level in (2, 6))
    brightness = latent.attribute(client, "counter", bright, dark)
    np.testing.assert_allclose(brightness, [4, -4])
    assert (latent.edit(client, "counter", dark, brightness, 2) == 10).all()
    np.testing.assert_array_equal(latent.edit(client, "counter", dark, brightness, 0), dark)


def test_draw_equals_documented_noise(client: Client) -> None:
    expected = noise.normal(np.full(3, 7, np.uint64), np.arange(3), np.zeros(3), 0, (2,))
    np.testing.assert_array_equal(latent.draw(client, "counter", 3, seed=7), expected)


def test_interpolate_between_seeds_uses_slerp(client: Client, service: FakeService) -> None:
    """The counter can decode the latents that these seeds draw."""
    a, b = (latent.draw(client, "counter", 1, seed=seed)[0] for seed in SEEDS)
    latent.interpolate(client, "counter", *SEEDS, 8)
    np.testing.assert_array_equal(sent_latents(service), interpolation.slerp(a, b, np.linspace(0, 1, 8)))
    latent.interpolate(client, "counter", *SEEDS, 3, path="lerp")
    np.testing.assert_array_equal(sent_latents(service), interpolation.lerp(a, b, [0, 0.5, 1]))


def sent_latents(service: FakeService) -> Array:
    request = service.requests[-1]
    assert isinstance(request, inference_pb2.TransformRequest)
    return unpack(request.inputs["latent"])


def test_interpolate_without_decode_is_unsupported(client: Client) -> None:
    with pytest.raises(UnsupportedOperation, match="speaker/1 does not support 'decode'"):
        latent.interpolate(client, "speaker", 1, 2)


def test_option_unknown_to_both_operations_is_rejected(client: Client) -> None:
    with pytest.raises(
        InvalidRequest, match=r"inputs\[lable\]: unknown to encode and decode; expected one of: image, latent"
    ):
        latent.draw(client, "counter", 1, inputs={"lable": 3})
    with pytest.raises(InvalidRequest, match=r"parameters\[step\]: .* expected one of: none"):
        latent.draw(client, "counter", 1, parameters={"step": 3})
