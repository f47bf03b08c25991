"""Every operation answers on the device: values agree with a CPU, and bytes do not depend on the traffic."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

import samovar
from benchmarks import artifacts, load
from benchmarks.gpu.base import Check, Finding, Note, Verdict
from benchmarks.report import Result, Table
from benchmarks.servers import Server, samovar_server
from benchmarks.suites import determinism
from samovar._messages import CallOptions
from samovar.model import DataKind, ParameterType
from samovar.operations import parse_program_name
from server.runtime.onnx import has_cuda_provider

FORMATS = ("torchscript", "torch_export", "onnx")
ROWS = 8
STEPS = 2
SEED = 1
CONCURRENT_ROUNDS = 3
MAX_CONCURRENT_CALLS = 32
_MAX_WARNINGS = 10
TRAFFIC_ROWS = 2000
# Largest difference from a CPU: of floats, relative to the largest element or 1; of pixels, in levels.
FLOAT_TOLERANCE = 1e-3
PIXEL_LEVELS = 1
# Share of elements that must agree. A sampled token or an accepted proposal may differ where a number is
# close to its threshold, and then changes the rest of its row.
MIN_SHARE = 0.75
MIN_PIXEL_SHARE = 0.99

Array = NDArray[Any]
Answers = dict[tuple[str, str], Mapping[str, Array]]


def run(check: Check) -> Iterator[Finding]:
    """Compare operations in the first format, then bytes in traffic, then the other formats."""
    names = (artifacts.LSTM, artifacts.GAN) if check.is_rehearsal else tuple(artifacts.FAMILIES)
    models = artifacts.link(names, check.artifacts)
    first, *others = FORMATS
    formats = FORMATS if check.device == "cpu" or has_cuda_provider() else FORMATS[:-1]
    with ExitStack() as stack, ThreadPoolExecutor(4) as threads:

        def start(device: str, format_: str) -> Future[Server]:
            log = check.directory / f"{device}-{format_}.log"
            options = ("--device", device, "--formats", format_)
            return threads.submit(stack.enter_context, samovar_server(models, *options, log=log))

        began = time.monotonic()
        reference, server = (future.result() for future in (start("cpu", first), start(check.device, first)))
        yield Result(f"seconds to load {len(names)} models as {first}", f"{time.monotonic() - began:.0f}")
        # The other servers load while the first one is compared.
        starting = {format_: start(check.device, format_) for format_ in others if format_ in formats}
        expected = _ask_all(reference)
        yield from _guard(f"{first} is compared", _compare(server, expected, first, check.device))
        yield from _guard("requests at once are compared", _repeat_concurrently(server))
        yield from _guard("traffic is compared", _compare_traffic(check))
        for format_, future in starting.items():
            findings = _compare_when_ready(future, expected, format_, check.device)
            yield from _guard(f"{format_} is compared", findings)
    if skipped := set(FORMATS) - set(formats):
        yield Note(f"Skipped: {', '.join(skipped)}; this ONNX Runtime has no CUDA provider.")


def _guard(requirement: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings, and a verdict that fails if they end with an error: what follows is found anyway."""
    try:
        yield from findings
    except Exception as error:
        yield Verdict(requirement, False, f"{type(error).__name__}: {error}")


def _compare_when_ready(
    future: "Future[Server]", expected: Answers, format_: str, device: str
) -> Iterator[Finding]:
    yield from _compare(future.result(), expected, format_, device)


def _ask_all(server: Server) -> Answers:
    """Return the outputs of every operation of every model."""
    with samovar.Client(server.address, timeout=None) as client:
        return {
            (model.name, operation.name): _ask(client, model, operation)[0]
            for model in client.models()
            for operation in model.operations.values()
        }


def _ask(
    client: samovar.Client, model: samovar.Model, operation: samovar.Operation, **options: Any
) -> tuple[Mapping[str, Array], bool]:
    """Return the outputs of an operation, and whether the server reports them as BITWISE."""
    name, variant = parse_program_name(operation.name)
    inputs = {item.tensor.name: _input_rows(item.tensor) for item in operation.inputs if not item.optional}
    settings: CallOptions = {
        "seed": SEED,
        "variant": variant,
        "parameters": _few_steps(operation),
        "timeout": None,
    }
    settings |= options  # type: ignore[typeddict-item]
    if name == "sample":
        result: Any = client.sample(model.name, ROWS, inputs=inputs, **settings)
    else:
        result = getattr(client, name)(model.name, inputs, **settings)
    outputs = result.columns() if isinstance(result, samovar.Scores) else result.outputs
    return outputs, result.run.determinism is samovar.Determinism.BITWISE


def _few_steps(operation: samovar.Operation) -> dict[str, bool | int | float | str]:
    steps = operation.steps
    return {
        parameter.name: max(int(parameter.minimum), STEPS * steps.units_per_step)
        for parameter in operation.parameters
        if parameter.name == steps.parameter and parameter.type is ParameterType.INTEGER
    }


def _input_rows(spec: samovar.TensorSpec) -> Array:
    random, shape = np.random.default_rng(SEED), (ROWS, *spec.shape)
    if spec.dtype.kind == "f":
        return np.clip(random.standard_normal(shape), spec.minimum, spec.maximum).astype(spec.dtype)
    low = 0 if spec.minimum is None else int(spec.minimum)
    high = low + 1 if spec.maximum is None else int(spec.maximum)
    return random.integers(low, high + 1, shape).astype(spec.dtype)


def _compare(server: Server, expected: Answers, format_: str, device: str) -> Iterator[Finding]:
    """Compare every operation with the CPU's answer; return a verdict, the failures and a table."""
    rows, failures, kinds = [], list[str](), Counter[str]()
    with samovar.Client(server.address, timeout=None) as client:
        served = {model.name: model for model in client.models()}
        for (name, operation), outputs in expected.items():
            try:
                model = served[name]
                answer, is_bitwise = _ask(client, model, model.operations[operation])
                problem, agreement = _agreement(model, outputs, answer)
            except Exception as error:  # the other operations are compared anyway
                problem, agreement, is_bitwise = f"{type(error).__name__}: {error}", "–", False
            determinism_ = "bitwise" if is_bitwise else "seeded"
            kinds[determinism_] += 1
            rows.append((name, operation, agreement, determinism_))
            if problem:
                failures.append(f"{name} {operation}: {problem}")
    requirement = (
        f"every operation as {format_} on {device} agrees with TorchScript on the CPU: floats within "
        f"{FLOAT_TOLERANCE:g} of the largest, {MIN_PIXEL_SHARE:.0%} of pixels within {PIXEL_LEVELS} level, "
        f"{MIN_SHARE:.0%} of tokens and labels"
    )
    detail = "; ".join(failures) or f"{len(rows)} operations, {kinds['bitwise']} bitwise"
    yield Verdict(requirement, not failures, detail)
    yield from _read_log(server, format_, device)
    columns = ("model", "operation", "agreement with the CPU", "determinism")
    yield Table(f"gpu-answers-{format_}", f"operations as {format_}", columns, rows)


def _read_log(server: Server, format_: str, device: str) -> Iterator[Finding]:
    """Yield whether every program uses CUDA graphs, and the warnings of the server."""
    assert server.log is not None
    lines = server.log.read_text().splitlines()
    if device != "cpu":
        without = [line for line in lines if "as a CUDA graph" in line or "not use CUDA graphs" in line]
        yield Verdict(f"every program as {format_} uses CUDA graphs", not without, "; ".join(without))
    warnings = [line for line in lines if " WARNING " in line or " ERROR " in line]
    if warnings:
        yield Note(f"Warnings of the server of {format_}: {'; '.join(warnings[:_MAX_WARNINGS])}")


def _agreement(
    model: samovar.Model, expected: Mapping[str, Array], found: Mapping[str, Array]
) -> tuple[str, str]:
    """Return what is wrong with an answer, or "", and a description of the largest difference."""
    problems, notes = [], []
    for name, reference in expected.items():
        array = found[name]
        if (array.shape, array.dtype) != (reference.shape, reference.dtype):
            return f"{name} is {array.dtype}{list(array.shape)}", "–"
        difference = np.abs(array.astype(np.float64) - reference.astype(np.float64))
        if array.dtype.kind == "f":
            error = float(difference.max() / max(1.0, float(np.abs(reference).max())))
            # A row that took another branch differs by more; the others must agree.
            scale = max(1.0, float(np.abs(reference).max()))
            share = float((difference.reshape(len(array), -1).max(1) <= FLOAT_TOLERANCE * scale).mean())
            notes.append(f"{name} ±{error:.1e}" + (f" in {share:.0%} of rows" if share < 1 else ""))
            required = MIN_SHARE if _may_branch(model) else 1.0
        else:
            is_pixel = model.data_spec.kind is DataKind.IMAGE and name == model.data_spec.tensor.name
            share = float((difference <= (PIXEL_LEVELS if is_pixel else 0)).mean())
            notes.append(f"{name} {share:.1%} equal")
            required = MIN_PIXEL_SHARE if is_pixel and not _may_branch(model) else MIN_SHARE
        if share < required:
            problems.append(f"{name}: {notes[-1]}")
    return "; ".join(problems), ", ".join(notes)


def _may_branch(model: samovar.Model) -> bool:
    """Return whether rows compare random numbers with probabilities: tokens, pixels one by one, and MALA."""
    return model.name in (artifacts.LSTM, artifacts.PIXELCNN, artifacts.EBM)


def _repeat_concurrently(server: Server) -> Iterator[Finding]:
    """Ask for all operations at once, several times, and compare the bytes with single requests."""
    with samovar.Client(server.address, timeout=None) as client:
        programs = [(model, item) for model in client.models() for item in model.operations.values()]
        alone = [_ask(client, model, operation) for model, operation in programs]
        with ThreadPoolExecutor(MAX_CONCURRENT_CALLS) as threads:
            rounds = [
                threads.submit(_ask, client, model, operation)
                for _ in range(CONCURRENT_ROUNDS)
                for model, operation in programs
            ]
            answers = [future.result() for future in rounds]
    different = [
        f"{model.name} {operation.name}"
        for (model, operation), (single, is_bitwise), (outputs, _) in zip(
            programs * CONCURRENT_ROUNDS, alone * CONCURRENT_ROUNDS, answers, strict=True
        )
        if is_bitwise and not _has_same_bytes(single, outputs)
    ]
    detail = ", ".join(sorted(set(different))) or f"{len(answers)} requests at once"
    yield Verdict("bitwise operations have the same bytes alone and at once", not different, detail)


def _has_same_bytes(left: Mapping[str, Array], right: Mapping[str, Array]) -> bool:
    return all(array.tobytes() == right[name].tobytes() for name, array in left.items())


def _compare_traffic(check: Check) -> Iterator[Finding]:
    """Compare rows in random traffic with the same rows alone on a server that was started again."""
    kinds = determinism.KINDS[2:3] if check.is_rehearsal else determinism.KINDS
    models = artifacts.link([kind.model for kind in kinds], check.artifacts)
    options = ("--device", check.device, "--formats", FORMATS[0])
    with load.start_clients() as clients:
        rows = determinism.compare_traffic(
            clients, models, kinds, 60 if check.is_rehearsal else TRAFFIC_ROWS, *options
        )
    *_, (_, compared, equal, *_) = rows
    requirement = "rows in traffic have the bytes that they have alone, on a server that was started again"
    yield Verdict(requirement, equal == compared, f"{equal} of {compared}")
    columns = ("model", "rows", "equal rows", "cancelled requests", "discarded row steps")
    yield Table("gpu-determinism", "rows in random traffic", columns, rows)
