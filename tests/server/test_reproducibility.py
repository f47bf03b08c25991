"""The heart: a row's bytes depend on artifact, format, operation, parameters, inputs, seed and index.

Through a real server, over every operation of every family, in every format.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import samovar
from export.families import FAMILIES
from tests.support.live_server import RunningServer

FORMATS = ("onnx", "torchscript", "torch_export")
ROWS = 64

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """One operation of one model, for rows of a job of 64: each row has inputs of its own."""

    model: str
    operation: str
    parameters: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(map(str, (self.model, self.operation, *self.parameters.values())))

    def __call__(self, client: samovar.Client, format: str, first: int, rows: int, seed: int) -> Outputs:
        settings = {"first_row": first, "seed": seed, "format": format, "parameters": self.parameters}
        inputs = {name: array[first : first + rows] for name, array in self._inputs(client).items()}
        result = self._call(client, rows, inputs, settings)
        assert result.run.determinism == samovar.Determinism.BITWISE
        return dict(result.columns() if isinstance(result, samovar.Scores) else result.outputs)

    def _call(
        self, client: samovar.Client, rows: int, inputs: Outputs, settings: dict[str, Any]
    ) -> samovar.Result | samovar.Scores:
        operation, _, method = self.operation.partition(":")
        settings["method"] = method
        if operation == "sample":
            return client.sample(self.model, rows, inputs=inputs, **settings)
        call: Callable[..., samovar.Result | samovar.Scores] = getattr(client, operation)
        return call(self.model, inputs, **settings)

    def _inputs(self, client: samovar.Client) -> Outputs:
        chance = np.random.default_rng(0)
        specs = [item.tensor for item in client.model(self.model).operations[self.operation].inputs]
        return {spec.name: _random(spec, chance) for spec in specs}


def _random(spec: samovar.TensorSpec, chance: np.random.Generator) -> NDArray[Any]:
    shape = (ROWS, *spec.shape)
    if spec.dtype.kind == "f":
        return chance.standard_normal(shape).astype(spec.dtype)
    assert spec.minimum is not None
    assert spec.maximum is not None
    return chance.integers(int(spec.minimum), int(spec.maximum) + 1, shape).astype(spec.dtype)


def _brief(family: str, operation: str) -> Mapping[str, float | str]:
    """Walks of a thousand steps prove no more than short ones."""
    if family == "diffusion":
        return {"draws": 4} if operation == "score" else {"steps": 6}
    return {"steps": 25} if family == "ebm" and "sample" in operation else {}


CASES = [
    *(
        Case(f"{entry.datasets[0]}-{name}", operation, _brief(name, operation))
        for name, entry in FAMILIES.items()
        for operation in entry.operations
    ),
    Case("digits-vae", "sample", {"pixels": "mean"}),
    Case("digits-vae", "reconstruct", {"latent": "draw"}),
    Case("digits-vae", "score", {"draws": 25}),
    Case("digits-diffusion", "sample", {"sampler": "ddim", "steps": 5, "eta": 0.5}),
    Case("digits-diffusion", "sample", {"sampler": "heun", "steps": 7}),
]

cases = pytest.mark.parametrize(
    ("format", "ask"),
    [pytest.param(format, ask, id=f"{format}-{ask}") for format in FORMATS for ask in CASES],
)


def _is_quick(format: str, ask: Case) -> bool:
    """Whether single rows take less than a minute; torch.export programs call every operator from Python."""
    return format != "torch_export" or not ask.model.endswith("-lstm")


quick_cases = pytest.mark.parametrize(
    ("format", "ask"),
    [
        pytest.param(format, ask, id=f"{format}-{ask}")
        for format in FORMATS
        for ask in CASES
        if _is_quick(format, ask)
    ],
)


def assert_same(left: Outputs, right: Outputs) -> None:
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
                ask, format = chance.choice(CASES), chance.choice(FORMATS)
                ask(client, format, chance.randrange(32), chance.randint(1, 32), chance.getrandbits(60))

    threads = [threading.Thread(target=disturb, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join()


@cases
def test_alone_and_in_traffic_are_the_same_bytes(
    client: samovar.Client, request: pytest.FixtureRequest, format: str, ask: Case
) -> None:
    alone = ask(client, format, 0, 40, 7)
    request.getfixturevalue("traffic")
    for _ in range(2):
        assert_same(ask(client, format, 0, 40, 7), alone)


@quick_cases
def test_one_request_of_64_rows_is_64_requests_of_one(client: samovar.Client, format: str, ask: Case) -> None:
    together = ask(client, format, 0, ROWS, 7)
    apart = [ask(client, format, row, 1, 7) for row in range(ROWS)]
    assert_same({name: np.concatenate([part[name] for part in apart]) for name in together}, together)


@pytest.mark.parametrize("format", FORMATS)
def test_after_a_cancelled_neighbour_are_the_same_bytes(client: samovar.Client, format: str) -> None:
    model = "digits-diffusion"
    options: dict[str, Any] = {"format": format, "parameters": {"steps": 60}}
    ((name, alone),) = client.sample(model, 20, seed=7, **options).outputs.items()
    found: dict[int, NDArray[Any]] = {}
    with client.stream(model, 5_000, seed=1, preview_every=1, **options) as neighbour:
        next(neighbour)
        with client.stream(model, 20, seed=7, preview_every=1, **options) as stream:
            next(stream)
            neighbour.cancel()
            for event in stream:
                if isinstance(event, samovar.Rows):
                    found |= dict(zip(event.indices.tolist(), event.outputs[name], strict=True))
    assert np.array_equal([found[row] for row in range(20)], alone)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", ["digits-vae", "digits-diffusion"])
def test_another_seed_or_index_is_another_row(client: samovar.Client, format: str, model: str) -> None:
    asked = [(0, 7), (1, 7), (0, 8)]
    rows = [client.sample(model, 1, first_row=first, seed=seed, format=format) for first, seed in asked]
    assert len({row.value.tobytes() for row in rows}) == 3


def test_formats_agree_but_for_rounding(client: samovar.Client) -> None:
    for ask in (Case("digits-vae", "encode"), Case("digits-vae", "score", {"draws": 25})):
        first, *others = (ask(client, format, 0, ROWS, 7) for format in FORMATS)
        for output, other in ((output, other) for output in first for other in others):
            assert np.allclose(first[output], other[output], rtol=1e-3, atol=1e-3), (str(ask), output)
