"""Reproducibility of rows: every operation of every family, in every format, on a real server.

A row's bytes depend only on the artifact, its format, the operation, the parameters, the inputs, the seed
and the index of the row.
"""

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import samovar
from export.families import FAMILIES
from samovar.operations import parse_program_name
from tests.support.live_server import HANG_SECONDS, RunningServer

pytestmark = pytest.mark.slow

FORMATS = ("onnx", "torchscript", "torch_export")
ROWS = 64
ROWS_IN_TRAFFIC = 40
NUM_TRAFFIC_CLIENTS = 3
NUM_CONCURRENT_CALLS = 16
SEED = 7

Outputs = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """An operation of a model with 64 rows of random inputs."""

    model: str
    operation: str
    parameters: Mapping[str, float | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join(map(str, (self.model, self.operation, *self.parameters.values())))

    def request(self, client: samovar.Client, format: str, first: int, rows: int, seed: int) -> Outputs:
        """Request the outputs of rows `first` to `first + rows`, by name."""
        options = {"first_row": first, "seed": seed, "format": format, "parameters": self.parameters}
        inputs = {name: array[first : first + rows] for name, array in self._inputs(client).items()}
        result = self._call(client, rows, inputs, options)
        assert result.run.determinism == samovar.Determinism.BITWISE
        return dict(result.columns() if isinstance(result, samovar.Scores) else result.outputs)

    def _call(
        self, client: samovar.Client, rows: int, inputs: Outputs, options: dict[str, Any]
    ) -> samovar.Result | samovar.Scores:
        operation, variant = parse_program_name(self.operation)
        options["variant"] = variant
        if operation == "sample":
            return client.sample(self.model, rows, inputs=inputs, **options)
        call: Callable[..., samovar.Result | samovar.Scores] = getattr(client, operation)
        return call(self.model, inputs, **options)

    def _inputs(self, client: samovar.Client) -> Outputs:
        rng = np.random.default_rng(0)
        specs = [item.tensor for item in client.model(self.model).operations[self.operation].inputs]
        return {spec.name: random_rows(spec, rng) for spec in specs}


def random_rows(spec: samovar.TensorSpec, rng: np.random.Generator) -> NDArray[Any]:
    shape = (ROWS, *spec.shape)
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    assert spec.minimum is not None
    assert spec.maximum is not None
    return rng.integers(int(spec.minimum), int(spec.maximum) + 1, shape).astype(spec.dtype)


def few_steps(family: str, operation: str) -> Mapping[str, float | str]:
    """Return the parameters that keep a chain short: a long one proves no more."""
    if family == "diffusion":
        return {"draws": 4} if operation == "score" else {"steps": 6}
    return {"steps": 25} if family == "ebm" and "sample" in operation else {}


CASES = (
    *(
        Case(f"{entry.datasets[0]}-{family}", operation, few_steps(family, operation))
        for family, entry in FAMILIES.items()
        for operation in entry.operations
    ),
    Case("digits-vae", "sample", {"pixels": "mean"}),
    Case("digits-vae", "reconstruct", {"latent": "draw"}),
    Case("digits-vae", "score", {"draws": 25}),
    Case("digits-diffusion", "sample", {"sampler": "ddim", "steps": 5, "eta": 0.5}),
    Case("digits-diffusion", "sample", {"sampler": "heun", "steps": 7}),
)

for_each_case = pytest.mark.parametrize("case", CASES, ids=str)


def assert_same_bytes(left: Outputs, right: Outputs) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


@pytest.fixture(scope="module", params=FORMATS)
def format(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


@pytest.fixture(scope="module")
def server(format: str, request: pytest.FixtureRequest) -> RunningServer:
    """The shared server that has the format."""
    name = "torch_export_server" if format == "torch_export" else "default_server"
    running: RunningServer = request.getfixturevalue(name)
    return running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=HANG_SECONDS) as connected:
        yield connected


class Traffic:
    """Clients that send random requests until they are stopped, half of them for the case under test."""

    def __init__(self, server: RunningServer, format: str) -> None:
        self._address = server.address
        self._formats = [name for name in FORMATS if (name == "torch_export") == (format == "torch_export")]
        self._case_under_test = (CASES[0], format)
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, case: Case, format: str) -> None:
        """Start the clients that do not run yet, and let them send requests for this case."""
        self._case_under_test = (case, format)
        if not self._threads:
            self._stop.clear()
            self._threads = [
                threading.Thread(target=self._send_requests, args=(number,))
                for number in range(NUM_TRAFFIC_CLIENTS)
            ]
            for thread in self._threads:
                thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _send_requests(self, number: int) -> None:
        rng = random.Random(number)
        with samovar.Client(self._address, timeout=HANG_SECONDS) as client:
            while not self._stop.is_set():
                case, format = self._case_under_test
                if rng.random() < 0.5:
                    case, format = rng.choice(CASES), rng.choice(self._formats)
                case.request(client, format, rng.randrange(32), rng.randint(1, 32), rng.getrandbits(60))


@pytest.fixture(scope="module")
def traffic(server: RunningServer, format: str) -> Iterator[Traffic]:
    running = Traffic(server, format)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def request_alone(client: samovar.Client, format: str, traffic: Traffic) -> Callable[[Case], Outputs]:
    """Function that returns the 64 rows of a case, requested together and without traffic, once per case."""
    known: dict[str, Outputs] = {}

    def outputs(case: Case) -> Outputs:
        if str(case) not in known:
            traffic.stop()
            known[str(case)] = case.request(client, format, 0, ROWS, SEED)
        return known[str(case)]

    return outputs


@for_each_case
def test_rows_of_one_request_equal_rows_of_single_row_requests(
    client: samovar.Client, format: str, case: Case, request_alone: Callable[[Case], Outputs]
) -> None:
    expected = request_alone(case)
    with ThreadPoolExecutor(NUM_CONCURRENT_CALLS) as pool:
        rows = list(pool.map(lambda row: case.request(client, format, row, 1, SEED), range(ROWS)))
    assert_same_bytes({name: np.concatenate([row[name] for row in rows]) for name in expected}, expected)


@for_each_case
def test_rows_in_traffic_equal_rows_without_traffic(
    client: samovar.Client,
    format: str,
    case: Case,
    request_alone: Callable[[Case], Outputs],
    traffic: Traffic,
) -> None:
    expected = {name: array[:ROWS_IN_TRAFFIC] for name, array in request_alone(case).items()}
    traffic.start(case, format)
    for _ in range(2):
        assert_same_bytes(case.request(client, format, 0, ROWS_IN_TRAFFIC, SEED), expected)


def test_rows_after_cancelled_request_in_their_batch_have_same_bytes(
    client: samovar.Client, format: str
) -> None:
    model = "digits-diffusion"
    options: dict[str, Any] = {"format": format, "parameters": {"steps": 60}}
    ((name, expected),) = client.sample(model, 20, seed=SEED, **options).outputs.items()
    found: dict[int, NDArray[Any]] = {}
    with client.stream(model, 5_000, seed=1, preview_every=1, **options) as other:
        next(other)
        with client.stream(model, 20, seed=SEED, preview_every=1, **options) as stream:
            next(stream)
            other.cancel()
            for event in stream:
                if isinstance(event, samovar.Rows):
                    found |= dict(zip(event.indices.tolist(), event.outputs[name], strict=True))
    assert np.array_equal([found[row] for row in range(20)], expected)


@pytest.mark.parametrize("model", ["digits-vae", "digits-diffusion"])
def test_rows_of_other_seed_or_index_differ(client: samovar.Client, format: str, model: str) -> None:
    keys = [(0, 7), (1, 7), (0, 8)]
    rows = [client.sample(model, 1, first_row=first, seed=seed, format=format) for first, seed in keys]
    assert len({row.value.tobytes() for row in rows}) == 3


@pytest.mark.parametrize(
    "case", [Case("digits-vae", "encode"), Case("digits-vae", "score", {"draws": 25})], ids=str
)
def test_formats_agree_within_rounding(
    default_server: RunningServer, torch_export_server: RunningServer, case: Case
) -> None:
    with (
        samovar.Client(default_server.address, timeout=HANG_SECONDS) as default_client,
        samovar.Client(torch_export_server.address, timeout=HANG_SECONDS) as torch_export_client,
    ):
        first = case.request(default_client, "onnx", 0, ROWS, SEED)
        others = (
            case.request(default_client, "torchscript", 0, ROWS, SEED),
            case.request(torch_export_client, "torch_export", 0, ROWS, SEED),
        )
    for other in others:
        for name, expected in first.items():
            assert np.allclose(expected, other[name], rtol=1e-3, atol=1e-3), name
