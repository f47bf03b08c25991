"""Walks and edits in latent space: the geometry, and what a client is asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samovar import Client, InvalidRequest, UnsupportedOperation, latent, noise
from samovar.tensors import Array, unpack
from samovar.v1 import inference_pb2
from tests.support.fake_server import LEVELS, Counting

SHARES = np.linspace(0, 1, 7)
SEEDS = 1, 3
VECTORS = st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3).map(np.array)


@given(VECTORS, VECTORS)
def test_every_walk_begins_and_ends_where_it_should(a: np.ndarray, b: np.ndarray) -> None:
    for walk in (latent.lerp, latent.slerp):
        np.testing.assert_allclose(walk(a, b, [0, 1]), [a, b], atol=1e-4)


@given(st.integers(0, 2**32 - 1))
def test_an_arc_keeps_to_the_sphere_and_turns_evenly(seed: int) -> None:
    ends = np.random.default_rng(seed).standard_normal((2, 16))
    a, b = 3 * ends / np.linalg.norm(ends, axis=1, keepdims=True)
    walk = latent.slerp(a, b, SHARES)
    np.testing.assert_allclose(np.linalg.norm(walk, axis=1), 3, rtol=1e-4)
    turns = (walk[1:] * walk[:-1]).sum(1)
    np.testing.assert_allclose(turns, turns[0], rtol=1e-4)


@pytest.mark.parametrize("b", [[2.0, 0, 0], [1.0, 1e-9, 0], [-1.0, 0, 0], [0.0, 0, 0]])
def test_vectors_on_one_line_are_joined_by_it(b: list[float]) -> None:
    a = [1.0, 0, 0]
    np.testing.assert_array_equal(latent.slerp(a, b, SHARES), latent.lerp(a, b, SHARES))


def test_a_walk_has_the_shape_of_its_shares_and_its_ends() -> None:
    assert latent.slerp(np.eye(2), 1 - np.eye(2), np.zeros((4, 5))).shape == (4, 5, 2, 2)
    assert latent.lerp(0.0, 1.0, 0.25) == 0.25


def test_rows_are_encoded_walked_between_and_decoded(client: Client) -> None:
    """The counter's latent is (mean, -mean), and it decodes to the first of the two, rounded."""
    black, white = np.zeros((8, 6), np.uint8), np.full((8, 6), LEVELS - 1, np.uint8)
    walk = latent.interpolate(client, "counter", black, white, 5)
    assert walk[:, 0, 0].tolist() == [0, 4, 8, 12, 16]


def test_an_attribute_is_the_difference_of_means_and_an_edit_adds_it(client: Client) -> None:
    dark, bright = (np.full((3, 8, 6), level, np.uint8) for level in (2, 6))
    brightness = latent.attribute(client, "counter", bright, dark)
    np.testing.assert_allclose(brightness, [4, -4])
    assert (latent.edit(client, "counter", dark, brightness, 2) == 10).all()
    np.testing.assert_array_equal(latent.edit(client, "counter", dark, brightness, 0), dark)


def test_draws_are_those_of_the_documented_noise(client: Client) -> None:
    expected = noise.normal(np.full(3, 7, np.uint64), np.arange(3), np.zeros(3), 0, (2,))
    np.testing.assert_array_equal(latent.draw(client, "counter", 3, seed=7), expected)


def test_seeds_are_walked_between_on_the_sphere(client: Client, service: Counting) -> None:
    """These two draw latents that the counter can decode."""
    a, b = (latent.draw(client, "counter", 1, seed=seed)[0] for seed in SEEDS)
    latent.interpolate(client, "counter", *SEEDS, 8)
    np.testing.assert_array_equal(sent(service), latent.slerp(a, b, np.linspace(0, 1, 8)))
    latent.interpolate(client, "counter", *SEEDS, 3, path="lerp")
    np.testing.assert_array_equal(sent(service), latent.lerp(a, b, [0, 0.5, 1]))


def sent(service: Counting) -> Array:
    request = service.requests[-1]
    assert isinstance(request, inference_pb2.TransformRequest)
    return unpack(request.inputs["latent"])


def test_a_model_without_a_latent_space_says_so(client: Client) -> None:
    with pytest.raises(UnsupportedOperation, match="speaker 1 has no operation decode"):
        latent.interpolate(client, "speaker", 1, 2)


def test_what_neither_way_takes_is_refused(client: Client) -> None:
    with pytest.raises(InvalidRequest, match=r"inputs\[lable\]: neither encode nor decode has it"):
        latent.draw(client, "counter", 1, inputs={"lable": 3})
    with pytest.raises(InvalidRequest, match=r"parameters\[step\]: .* they have: none"):
        latent.draw(client, "counter", 1, parameters={"step": 3})
