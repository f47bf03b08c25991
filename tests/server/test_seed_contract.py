"""The heart: a row's bytes depend on artifact, format, operation, parameters, inputs, seed and index.

Through a real server, over every operation of every family, in both formats.
"""

import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

import samovar
from tests.serving import RunningServer

FORMATS = ("onnx", "torchscript")
VAE, DIFFUSION = "digits-vae", "digits-diffusion"
DIGITS = np.random.default_rng(0).integers(0, 17, (64, 8, 8)).astype(np.uint8)
LATENTS = np.random.default_rng(1).standard_normal((64, 16)).astype(np.float32)

Ask = Callable[[samovar.Client, str, int, int, int], dict[str, np.ndarray]]


def sample(model: str, **parameters: float | str) -> Ask:
    def ask(client: samovar.Client, format: str, first: int, rows: int, seed: int) -> dict[str, np.ndarray]:
        result = client.sample(model, rows, first_row=first, seed=seed, format=format, parameters=parameters)
        assert result.run.determinism == samovar.Determinism.BITWISE
        return dict(result.outputs)

    return ask


def transform(operation: str, inputs: np.ndarray, **parameters: float | str) -> Ask:
    def ask(client: samovar.Client, format: str, first: int, rows: int, seed: int) -> dict[str, np.ndarray]:
        result = getattr(client, operation)(
            VAE,
            inputs[first : first + rows],
            first_row=first,
            seed=seed,
            format=format,
            parameters=parameters,
        )
        assert result.run.determinism == samovar.Determinism.BITWISE
        return {"nats": result.nats} if operation == "score" else dict(result.outputs)

    return ask


ASKS = {
    "vae-sample": sample(VAE, pixels="draw"),
    "vae-reconstruct": transform("reconstruct", DIGITS, latent="draw"),
    "vae-encode": transform("encode", DIGITS),
    "vae-decode": transform("decode", LATENTS),
    "vae-score": transform("score", DIGITS, draws=25),
    "diffusion-ddim": sample(DIFFUSION, steps=5, sampler="ddim", eta=0.5),
    "diffusion-heun": sample(DIFFUSION, steps=7, sampler="heun"),
    "diffusion-dpmpp2m": sample(DIFFUSION, steps=6, sampler="dpmpp2m"),
}

cases = pytest.mark.parametrize(
    ("format", "ask"),
    [pytest.param(format, ask, id=f"{format}-{name}") for format in FORMATS for name, ask in ASKS.items()],
)


def assert_same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


@pytest.fixture
def traffic(server: RunningServer) -> Iterator[None]:
    """Other clients that keep asking for other things, with seeds and sizes of their own."""
    stop = threading.Event()

    def disturb(number: int) -> None:
        chance = random.Random(number)
        with samovar.Client(server.address, timeout=60.0) as client:
            while not stop.is_set():
                ask = ASKS[chance.choice(list(ASKS))]
                ask(
                    client,
                    chance.choice(FORMATS),
                    chance.randrange(32),
                    chance.randint(1, 32),
                    chance.getrandbits(60),
                )

    threads = [threading.Thread(target=disturb, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@cases
def test_alone_and_in_traffic_are_the_same_bytes(
    client: samovar.Client, request: pytest.FixtureRequest, format: str, ask: Ask
) -> None:
    alone = ask(client, format, 0, 40, 7)
    request.getfixturevalue("traffic")
    for _ in range(3):
        assert_same(ask(client, format, 0, 40, 7), alone)


@cases
def test_one_request_of_64_rows_is_64_requests_of_one(client: samovar.Client, format: str, ask: Ask) -> None:
    together = ask(client, format, 0, 64, 7)
    apart = [ask(client, format, row, 1, 7) for row in range(64)]
    assert_same({name: np.concatenate([part[name] for part in apart]) for name in together}, together)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["vae-sample", "diffusion-ddim"])
def test_another_seed_or_index_is_another_row(client: samovar.Client, format: str, name: str) -> None:
    rows = [ASKS[name](client, format, first, 1, seed) for first, seed in ((0, 7), (1, 7), (0, 8))]
    assert len({row["image"].tobytes() for row in rows}) == 3


def test_formats_agree_but_for_rounding(client: samovar.Client) -> None:
    for name in ("vae-encode", "vae-score"):
        left, right = (ASKS[name](client, format, 0, 64, 7) for format in FORMATS)
        for output in left:
            assert np.allclose(left[output], right[output], rtol=1e-3, atol=1e-3), (name, output)
