"""The examples: short files whose served models have the known mathematical properties."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import samovar
from export.__main__ import main
from tests.support.live_server import HANG_SECONDS, serving

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parent.parent / "examples"
FORMATS = ("onnx", "torchscript")
HIGH_TEMPERATURE, NUM_SPINS, NUM_SAMPLES = 4.0, 32 * 32, 64


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[samovar.Client]:
    models = tmp_path_factory.mktemp("examples")
    for name in ("galaxy", "ising"):
        assert main(["export", str(EXAMPLES / f"{name}.py"), "--models", str(models)]) == 0
    with serving(models) as server, samovar.Client(server.address, timeout=HANG_SECONDS) as connected:
        yield connected


@pytest.mark.parametrize(("name", "max_lines"), [("galaxy", 40), ("ising", 70)])
def test_example_is_short(name: str, max_lines: int) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < max_lines


@pytest.mark.parametrize("format", FORMATS)
def test_galaxy_density_integrates_to_one(client: samovar.Client, format: str) -> None:
    axis, width = np.linspace(-9, 9, 301, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2).astype(np.float32)
    scores = client.score("galaxy", grid, format=format)
    assert scores.kind is samovar.ScoreKind.EXACT
    assert np.exp(scores.nats.astype(np.float64)).sum() * width**2 == pytest.approx(1, abs=2e-3)


def test_galaxy_samples_have_mean_score_of_negative_entropy(client: samovar.Client) -> None:
    """Winding preserves areas, so the entropy is that of the normal distribution."""
    nats = client.score("galaxy", client.sample("galaxy", 4000, seed=1).value).nats
    entropy = 1 + math.log(2 * math.pi) + math.log(2.0 * 0.2)
    assert -nats.mean() == pytest.approx(entropy, abs=4 * float(nats.std()) / math.sqrt(len(nats)))


def test_galaxy_decode_inverts_encode(client: samovar.Client) -> None:
    points = client.sample("galaxy", 50, seed=2).value
    latents = client.encode("galaxy", points).value
    np.testing.assert_allclose(client.decode("galaxy", latents).value, points, atol=1e-4)


def onsager_energy(temperature: float) -> float:
    """Energy per spin of the infinite lattice (Onsager 1944); at high temperature also of a 32x32 torus."""
    coupling = 2 / temperature
    modulus = 2 * math.sinh(coupling) / math.cosh(coupling) ** 2
    angle = (np.arange(2000) + 0.5) * math.pi / 4000
    elliptic = float((math.pi / 4000 / np.sqrt(1 - (modulus * np.sin(angle)) ** 2)).sum())
    return -(1 + 2 / math.pi * (2 * math.tanh(coupling) ** 2 - 1) * elliptic) / math.tanh(coupling)


def energies(client: samovar.Client, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the energy per spin of each image."""
    result = client.energy("ising", images, parameters={"temperature": HIGH_TEMPERATURE})
    np.testing.assert_allclose(
        result.outputs["log_weight"], -result.outputs["energy"] / HIGH_TEMPERATURE, rtol=1e-6
    )
    return result.outputs["energy"].astype(np.float64) / NUM_SPINS


@pytest.mark.parametrize("format", FORMATS)
def test_ising_samples_have_onsager_energy(client: samovar.Client, format: str) -> None:
    parameters = {"temperature": HIGH_TEMPERATURE, "sweeps": 40}
    images = client.sample("ising", NUM_SAMPLES, seed=3, parameters=parameters, format=format).value
    measured = energies(client, images)
    expected = onsager_energy(HIGH_TEMPERATURE)
    assert measured.mean() == pytest.approx(expected, abs=4 * float(measured.std()) / math.sqrt(NUM_SAMPLES))
    assert expected == pytest.approx(-0.5571, abs=1e-3)


def test_ising_energy_counts_agreeing_pairs(client: samovar.Client) -> None:
    checkerboard = (np.indices((32, 32)).sum(0) % 2).astype(np.uint8)
    one_down = np.ones((32, 32), np.uint8)
    one_down[0, 0] = 0
    images = np.stack([np.ones((32, 32), np.uint8), checkerboard, one_down])
    assert (energies(client, images) * NUM_SPINS).tolist() == [
        -2 * NUM_SPINS,
        2 * NUM_SPINS,
        -2 * NUM_SPINS + 8,
    ]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("name", "parameters"), [("galaxy", {}), ("ising", {"sweeps": 7})])
def test_example_rows_do_not_depend_on_request_split(
    client: samovar.Client, name: str, parameters: dict[str, int], format: str
) -> None:
    whole = client.sample(name, 9, seed=4, parameters=parameters, format=format)
    parts = [
        client.sample(name, rows, seed=4, first_row=first, parameters=parameters, format=format).value
        for first, rows in ((0, 1), (1, 3), (4, 5))
    ]
    assert np.concatenate(parts).tobytes() == whole.value.tobytes()
    assert whole.run.determinism is samovar.Determinism.BITWISE


def test_ising_chain_sends_previews(client: samovar.Client) -> None:
    with client.stream("ising", 1, seed=5, preview_every=2, parameters={"sweeps": 8}) as events:
        assert sum(isinstance(event, samovar.Preview) for event in events) >= 3
