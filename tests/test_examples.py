"""The worked examples: short, exported by the command, served by a server that knows neither, and true."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import samovar
from export.__main__ import main
from tests.support.live_server import serving

EXAMPLES = Path(__file__).parent.parent / "examples"
FORMATS = ("onnx", "torchscript")
HOT, SPINS, DRAWN = 4.0, 32 * 32, 64


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[samovar.Client]:
    models = tmp_path_factory.mktemp("own")
    for name in ("galaxy", "ising"):
        assert main(["write", str(EXAMPLES / f"{name}.py"), "--models", str(models)]) == 0
    with serving(models) as server, samovar.Client(server.address, timeout=60.0) as connected:
        yield connected


@pytest.mark.parametrize(("name", "limit"), [("galaxy", 40), ("ising", 60)])
def test_an_example_is_short(name: str, limit: int) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < limit


@pytest.mark.parametrize("format", FORMATS)
def test_the_density_of_the_galaxy_integrates_to_one(client: samovar.Client, format: str) -> None:
    axis, width = np.linspace(-9, 9, 301, retstep=True)
    grid = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2).astype(np.float32)
    scores = client.score("galaxy", grid, format=format)
    assert scores.kind is samovar.ScoreKind.EXACT
    assert np.exp(scores.nats.astype(np.float64)).sum() * width**2 == pytest.approx(1, abs=2e-3)


def test_the_galaxy_is_drawn_from_the_density_that_it_scores(client: samovar.Client) -> None:
    """The mean score of samples is the negative entropy, which winding leaves as it was."""
    nats = client.score("galaxy", client.sample("galaxy", 4000, seed=1).value).nats
    entropy = 1 + math.log(2 * math.pi) + math.log(2.0 * 0.2)
    assert -nats.mean() == pytest.approx(entropy, abs=4 * float(nats.std()) / math.sqrt(len(nats)))


def test_latents_and_points_of_the_galaxy_go_back_and_forth(client: samovar.Client) -> None:
    points = client.sample("galaxy", 50, seed=2).value
    latents = client.encode("galaxy", points).value
    np.testing.assert_allclose(client.decode("galaxy", latents).value, points, atol=1e-4)


def onsager(temperature: float) -> float:
    """Energy per spin of the infinite lattice (Onsager 1944); when hot, a torus of 32 by 32 has it too."""
    coupling = 2 / temperature
    modulus = 2 * math.sinh(coupling) / math.cosh(coupling) ** 2
    angle = (np.arange(2000) + 0.5) * math.pi / 4000
    elliptic = float((math.pi / 4000 / np.sqrt(1 - (modulus * np.sin(angle)) ** 2)).sum())
    return -(1 + 2 / math.pi * (2 * math.tanh(coupling) ** 2 - 1) * elliptic) / math.tanh(coupling)


def energies(client: samovar.Client, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    answer = client.energy("ising", images, parameters={"temperature": HOT})
    np.testing.assert_allclose(answer.outputs["log_weight"], -answer.outputs["energy"] / HOT, rtol=1e-6)
    return answer.outputs["energy"].astype(np.float64) / SPINS


@pytest.mark.parametrize("format", FORMATS)
def test_the_spins_have_the_energy_that_onsager_found(client: samovar.Client, format: str) -> None:
    hot = {"temperature": HOT, "sweeps": 40}
    found = energies(client, client.sample("ising", DRAWN, seed=3, parameters=hot, format=format).value)
    assert found.mean() == pytest.approx(onsager(HOT), abs=4 * float(found.std()) / math.sqrt(DRAWN))
    assert onsager(HOT) == pytest.approx(-0.5571, abs=1e-3)


def test_the_energy_counts_the_pairs_that_agree(client: samovar.Client) -> None:
    checkerboard = (np.indices((32, 32)).sum(0) % 2).astype(np.uint8)
    one_down = np.ones((32, 32), np.uint8)
    one_down[0, 0] = 0
    images = np.stack([np.ones((32, 32), np.uint8), checkerboard, one_down])
    assert (energies(client, images) * SPINS).tolist() == [-2 * SPINS, 2 * SPINS, -2 * SPINS + 8]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("name", "parameters"), [("galaxy", {}), ("ising", {"sweeps": 7})])
def test_rows_are_the_same_alone_and_split(
    client: samovar.Client, name: str, parameters: dict[str, int], format: str
) -> None:
    whole = client.sample(name, 9, seed=4, parameters=parameters, format=format)
    parts = [
        client.sample(name, rows, seed=4, first_row=first, parameters=parameters, format=format).value
        for first, rows in ((0, 1), (1, 3), (4, 5))
    ]
    assert np.concatenate(parts).tobytes() == whole.value.tobytes()
    assert whole.run.determinism is samovar.Determinism.BITWISE


def test_the_chain_can_be_watched(client: samovar.Client) -> None:
    with client.stream("ising", 1, seed=5, preview_every=2, parameters={"sweeps": 8}) as events:
        assert sum(isinstance(event, samovar.Preview) for event in events) >= 3
