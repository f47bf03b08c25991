"""A GPU: memory, CUDA graphs, and a device that is lost. Run with `--device cuda`; see docs/gpu.md."""

import asyncio
import gc
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import samovar
from server.app import App
from server.config import Config
from server.core.errors import ModelFailed
from server.core.request import Request
from server.core.spec import GraphSpec
from server.engine.engine import Engine
from server.engine.scheduler import Scheduler
from server.execution.noise.device import check_kernel, find_kernel
from server.execution.program_runner import ProgramRunner
from server.models.repository import Repository
from server.runtime import RUNTIMES, Device, device_context
from tests.support import programs
from tests.support.live_server import SETTINGS, assert_idle, scrape, serving
from tests.support.programs import KEY, Reader, RecordingObserver, admit, request

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("config.getoption('--device') == 'cpu'", reason="needs a GPU: pytest --device cuda"),
]

Tensors = Sequence[torch.Tensor]
MEBIBYTE = 1 << 20
ROW_BYTES = 256 * MEBIBYTE
# A program of many steps, one whose rows end early, and one without steps.
MODELS = ("digits-diffusion", "text-lstm", "digits-gan")
STEPS = {"digits-diffusion": {"steps": 7}, "text-lstm": {"tokens": 20}, "digits-gan": {}}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def device() -> Iterator[torch.device]:
    device = Device(SETTINGS["device"]).torch
    with device_context(device):
        yield device


def test_kernel_draws_the_numbers_of_the_host(device: torch.device) -> None:
    draw = find_kernel(device)
    assert draw is not None
    check_kernel(draw, device)


def walk_with_scratch_memory(inputs: Tensors) -> Tensors:
    """Take a step of the walk, with ROW_BYTES of memory for each row."""
    scratch = torch.zeros(len(inputs[0]) * ROW_BYTES, dtype=torch.uint8, device=inputs[0].device)
    (total,) = programs.walk(inputs)
    return [total + scratch[0]]


def run_walk(buckets: Sequence[int]) -> tuple[list[bytes], int]:
    """Return the bytes of eight rows of three steps, and how many batches did not fit into memory."""
    graphs = {**programs.GRAPHS, "walk": walk_with_scratch_memory}
    runner = ProgramRunner(programs.WALK, graphs, buckets, Device(SETTINGS["device"]))
    admit(runner, *(request(steps=3, seed=seed) for seed in range(8)))
    values, num_oom = dict[int, bytes](), 0
    while runner.num_active:
        result = runner.advance()
        num_oom += result.num_oom
        values |= {readout.request.seed: readout.rows.outputs["value"].tobytes() for readout in result.wait()}
    return [values[seed] for seed in range(8)], num_oom


def test_batch_that_does_not_fit_into_memory_is_halved(device: torch.device) -> None:
    expected, num_oom = run_walk((1, 2, 4, 8))
    assert num_oom == 0
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    limit = torch.cuda.memory_reserved(device) + 6 * ROW_BYTES
    torch.cuda.set_per_process_memory_fraction(limit / total, device)
    try:
        values, num_oom = run_walk((1, 2, 4, 8))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert num_oom == 1
    assert values == expected


def test_dropped_models_return_their_memory(models_of: Callable[..., Path], device: torch.device) -> None:
    models = models_of(*MODELS)

    def load() -> None:
        repository = Repository(Device(SETTINGS["device"], cuda_graphs=True), ("torchscript",), 32)
        for name in MODELS:
            repository.load(models / name / "1")
        assert torch.cuda.memory_allocated(device) > before

    def release() -> int:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(device)

    before = release()
    load()  # also what libraries keep for the whole process, such as workspaces
    kept = release()
    for _ in range(2):
        load()
    assert release() <= kept + MEBIBYTE


def walk_with_nan(inputs: Tensors) -> Tensors:
    """Take a step of the walk, which is not finite for rows with a scale of 9."""
    (total,) = programs.walk(inputs)
    return [torch.where(inputs[2][:, None] == 9, torch.nan, total)]


def run_engine(device: torch.device, submitted: Sequence[Request]) -> list[Reader]:
    """Run requests of the walk on the GPU, in one engine and at the same time."""
    settings = Device(SETTINGS["device"])
    runner = ProgramRunner(programs.WALK, {**programs.GRAPHS, "walk": walk_with_nan}, (4, 8, 16), settings)
    context = device_context(device)
    engine = Engine(Scheduler(), RecordingObserver(), pipeline_depth=1, device_context=context)
    engine.add(KEY, runner)
    readers = [Reader() for _ in submitted]
    for queued, reader in zip(submitted, readers, strict=True):
        engine.submit(queued, reader.deliver)
    engine.start()
    for reader in readers:
        reader.wait()
    engine.stop()
    return readers


def test_rows_of_an_engine_have_the_bytes_that_they_have_alone(device: torch.device) -> None:
    submitted = [request(rows=rows, steps=steps, seed=rows) for rows, steps in ((1, 9), (20, 3), (5, 30))]
    together = run_engine(device, submitted)
    for queued, reader in zip(submitted, together, strict=True):
        (alone,) = run_engine(device, [queued])
        assert reader.rows() == alone.rows()
        assert len(reader.rows()) == queued.rows


def test_nonfinite_rows_fail_only_their_request(device: torch.device) -> None:
    fine = request(rows=6, steps=5, seed=3)
    broken, other = run_engine(device, [request(rows=3, steps=5, parameters={"scale": 9.0}), fine])
    assert isinstance(broken.error(), ModelFailed)
    (alone,) = run_engine(device, [fine])
    assert other.rows() == alone.rows()


def test_cancelled_chain_frees_its_slots(models_of: Callable[..., Path]) -> None:
    with (
        serving(models_of("digits-diffusion"), formats=("torchscript",)) as server,
        samovar.Client(server.address) as client,
    ):
        with client.stream("digits-diffusion", 40, parameters={"steps": 200}, preview_every=1) as stream:
            assert isinstance(next(iter(stream)), samovar.Preview)
        assert_idle(server)
        assert len(client.sample("digits-diffusion", 2, parameters={"steps": 2}).value) == 2


@pytest.fixture(scope="module")
def rows(models_of: Callable[..., Path]) -> dict[bool, dict[str, bytes]]:
    """The bytes of rows of each model, with CUDA graphs and without."""
    models, found = models_of(*MODELS), dict[bool, dict[str, bytes]]()
    for uses_graphs in (True, False):
        with (
            serving(models, formats=("torchscript",), cuda_graphs=uses_graphs) as server,
            samovar.Client(server.address) as client,
        ):
            assert client.server_info().cuda_graphs is uses_graphs
            found[uses_graphs] = {
                name: client.sample(name, 40, seed=5, parameters=STEPS[name]).value.tobytes()
                for name in MODELS
            }
    return found


@pytest.mark.parametrize("model", MODELS)
def test_cuda_graphs_change_no_bit(rows: dict[bool, dict[str, bytes]], model: str) -> None:
    assert rows[True][model] == rows[False][model]


def test_metrics_show_the_memory_of_the_gpu(models_of: Callable[..., Path]) -> None:
    with serving(models_of("digits-gan"), formats=("torchscript",)) as server:
        metrics = scrape(server)
    total = metrics["samovar_gpu_memory_total_bytes", ()]
    assert 0 < metrics["samovar_torch_memory_bytes", ("allocated",)] <= total
    assert 0 < metrics["samovar_gpu_memory_used_bytes", ()] <= total


# This value in an input breaks the GPU in the server below.
BREAKING = 3.25


def test_server_that_loses_its_gpu_fails_requests_and_exits(
    models_of: Callable[..., Path], tmp_path: Path
) -> None:
    """A failed assertion in a kernel makes the GPU unusable for the whole process."""
    command = [sys.executable, "-m", "tests.gpu.test_cuda", str(models_of("digits-gan")), SETTINGS["device"]]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        address = next(found[1] for line in process.stdout if (found := re.search(r"--address (\S+)", line)))
        with samovar.Client(address, options=(("grpc.enable_retries", 0),)) as client:
            operation = client.model("digits-gan").operations["decode"]
            inputs = {
                item.tensor.name: np.zeros((2, *item.tensor.shape), item.tensor.dtype)
                for item in operation.inputs
            }
            assert len(client.decode("digits-gan", inputs).value) == 2
            breaking = {name: rows + BREAKING for name, rows in inputs.items() if rows.dtype.kind == "f"}
            with pytest.raises(samovar.Unavailable):
                client.decode("digits-gan", {**inputs, **breaking})
        assert process.wait(100) != 0
    finally:
        process.kill()
        process.communicate()


class BreakingGraph:
    """A TorchScript graph that reads beyond a table on the GPU if an input holds BREAKING."""

    def __init__(self, path: Path, spec: GraphSpec, device: Device) -> None:
        self._graph = RUNTIMES["torchscript"](path, spec, device)

    def __call__(self, inputs: Tensors) -> Tensors:
        is_breaking = torch.stack([(x == BREAKING).any() for x in inputs if x.is_floating_point()]).any()
        table = torch.zeros(1, device=is_breaking.device)
        table[(is_breaking.to(torch.int64) * 10**6).reshape(1)]
        return self._graph(inputs)


async def _serve(models: str, device: str) -> None:
    settings = {**SETTINGS, "device": device, "formats": ("torchscript",), "cuda_graphs": False}
    await App(Config(models=Path(models), **settings), {"torchscript": BreakingGraph}).run()


if __name__ == "__main__":
    asyncio.run(_serve(*sys.argv[1:]))
