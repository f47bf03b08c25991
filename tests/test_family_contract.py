"""Contract of every family on every dataset that it is for, tested through the wire.

What an artifact declares is true: its operations work, and its parameters and inputs are accepted up to
their bounds. A request beyond a bound is rejected with the name of the field, the bounds and the value.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

import samovar
from samovar import tensors
from samovar.errors import from_rpc
from samovar.model import DataKind, ParameterType
from samovar.operations import OPERATIONS, parse_program_name
from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from tests.support.datasets import Pair, for_each_pair
from tests.support.live_server import SETTINGS, RunningServer, assert_idle, wait_until

pytestmark = [for_each_pair, pytest.mark.slow]

ROWS = 3
# Steps of a request where the number of steps is not the point.
FEW_STEPS = 12
SEED = 7

Array = NDArray[Any]
Inputs = Mapping[str, Array]


@pytest.fixture
def server(pair: Pair, request: pytest.FixtureRequest) -> RunningServer:
    running: RunningServer = request.getfixturevalue("default_server" if pair.is_default else "other_server")
    return running


@pytest.fixture
def client(server: RunningServer) -> Iterator[samovar.Client]:
    with samovar.Client(server.address, timeout=None) as connected:
        yield connected


@pytest.fixture
def stub(server: RunningServer) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.InferenceStub(channel)


@pytest.fixture
def model(pair: Pair, client: samovar.Client) -> samovar.Model:
    return client.model(pair.model)


def random_rows(spec: samovar.TensorSpec) -> Array:
    """Return `ROWS` rows of an input within its bounds."""
    rng, shape = np.random.default_rng(0), (ROWS, *spec.shape)
    if spec.dtype.kind == "f":
        # The bounds of float inputs are far beyond what a normal distribution gives.
        return rng.standard_normal(shape).astype(spec.dtype)
    assert spec.minimum is not None
    assert spec.maximum is not None
    return rng.integers(int(spec.minimum), int(spec.maximum), shape, endpoint=True).astype(spec.dtype)


def all_inputs(operation: samovar.Operation) -> dict[str, Array]:
    return {entry.tensor.name: random_rows(entry.tensor) for entry in operation.inputs}


def required_inputs(operation: samovar.Operation) -> dict[str, Array]:
    """Return one row of the inputs that are not optional; masks of known elements are all zero."""
    inputs = {
        entry.tensor.name: random_rows(entry.tensor)[:1] for entry in operation.inputs if not entry.optional
    }
    return {name: array * 0 if name == "known" else array for name, array in inputs.items()}


def few_steps(operation: samovar.Operation) -> dict[str, float]:
    """Return the parameter for the number of steps, where there is one, with a small value."""
    return {
        parameter.name: int(max(parameter.minimum, min(FEW_STEPS, parameter.maximum)))
        for parameter in operation.parameters
        if parameter.name == operation.steps.parameter
    }


def sample_operations(model: samovar.Model) -> Iterator[samovar.Operation]:
    return (operation for operation in model.operations.values() if rpc_name(operation) == "sample")


def rpc_name(operation: samovar.Operation) -> str:
    return parse_program_name(operation.name)[0]


def numeric_parameters(operation: samovar.Operation) -> Iterator[samovar.Parameter]:
    for parameter in operation.parameters:
        if parameter.type in (ParameterType.FLOAT, ParameterType.INTEGER):
            yield parameter


def parameter_to_proto(parameter: samovar.Parameter, value: float) -> pb.ParameterValue:
    if parameter.type is ParameterType.INTEGER:
        return pb.ParameterValue(integer_value=int(value))
    return pb.ParameterValue(float_value=value)


def request_outputs(
    client: samovar.Client, model: samovar.Model, operation: samovar.Operation, inputs: Inputs, **options: Any
) -> dict[str, Array]:
    """Return the outputs of an operation by name; check that they are finite and have the declared shapes."""
    rows = len(next(iter(inputs.values()), range(ROWS)))
    options = {"seed": SEED, "variant": operation.variant, **options}
    options["parameters"] = {**few_steps(operation), **options.get("parameters", {})}
    if rpc_name(operation) == "sample":
        result = client.sample(model.name, rows, inputs=inputs, **options)
    else:
        result = getattr(client, rpc_name(operation))(model.name, inputs, **options)
    outputs = dict(result.columns() if isinstance(result, samovar.Scores) else result.outputs)
    for spec in operation.outputs:
        if spec.name in outputs:
            assert outputs[spec.name].shape == (rows, *spec.shape), spec.name
            assert np.isfinite(outputs[spec.name]).all(), spec.name
    return outputs


def start_call(
    stub: pb_grpc.InferenceStub,
    model: samovar.Model,
    operation: str,
    inputs: Inputs | None = None,
    parameters: Mapping[str, pb.ParameterValue] | None = None,
    preview_every: int = 0,
) -> Any:
    """Send a request for an operation such as "sample:inpaint"; return the gRPC call."""
    name, variant = parse_program_name(operation)
    inputs = inputs or {}
    fields: dict[str, Any] = {
        "model": pb.ModelSelector(name=model.name),
        "variant": variant,
        "inputs": {name: tensors.pack(array) for name, array in inputs.items()},
        "parameters": parameters,
    }
    if name == "sample":
        rows = len(next(iter(inputs.values()), range(ROWS)))
        return stub.Sample(pb.SampleRequest(rows=rows, preview_every=preview_every, **fields))
    return getattr(stub, name.capitalize()).future(pb.TransformRequest(**fields))


def call_error(call: Any) -> grpc.RpcError:
    """Return the error with which a call ends."""
    error = call.exception()
    assert isinstance(error, grpc.RpcError)
    return error


def violations(
    stub: pb_grpc.InferenceStub,
    model: samovar.Model,
    operation: samovar.Operation,
    inputs: Inputs,
    parameters: Mapping[str, pb.ParameterValue] | None = None,
) -> dict[str, str]:
    """Return the reasons by field with which an invalid request is rejected."""
    error = from_rpc(call_error(start_call(stub, model, operation.name, inputs, parameters)))
    assert isinstance(error, samovar.InvalidRequest)
    return {violation.field: violation.description for violation in error.violations}


@pytest.fixture
def torch_export_client(pair: Pair, request: pytest.FixtureRequest) -> Iterator[samovar.Client | None]:
    """A client of the server that has the model as torch.export programs; None for other datasets."""
    if not pair.is_default:
        yield None
        return
    running: RunningServer = request.getfixturevalue("torch_export_server")
    with samovar.Client(running.address, timeout=None) as connected:
        yield connected


def test_formats_agree_on_every_operation(
    client: samovar.Client, torch_export_client: samovar.Client | None, model: samovar.Model
) -> None:
    """Outputs differ between formats by no more than docs/custom-models.md allows for golden rows."""
    clients = dict.fromkeys(model.formats, client)
    if torch_export_client:
        clients["torch_export"] = torch_export_client
    for operation in model.operations.values():
        first, *others = (
            request_outputs(connected, model, operation, all_inputs(operation), format=format)
            for format, connected in clients.items()
        )
        assert others
        for other in others:
            for name, expected in first.items():
                difference = np.abs(other[name].astype(np.float64) - expected.astype(np.float64)).max()
                assert difference <= tolerance(model.data_spec, name, expected), (operation.name, name)


def tolerance(spec: samovar.DataSpec, name: str, array: Array) -> float:
    if array.dtype.kind == "f":
        # The formats choose other kernels on a GPU, which sum in another order.
        share = 1e-4 if SETTINGS["device"] == "cpu" else 1e-3
        return share * max(1.0, float(np.abs(array).max()))
    return float(spec.kind is DataKind.IMAGE and name == spec.tensor.name)


def test_previews_show_unfinished_rows_and_change_no_result(
    client: samovar.Client, model: samovar.Model
) -> None:
    for operation in filter(lambda operation: operation.previewable, sample_operations(model)):
        options: dict[str, Any] = {
            "seed": SEED,
            "variant": operation.variant,
            "parameters": few_steps(operation),
            "inputs": required_inputs(operation),
        }
        with client.stream(model.name, 1, preview_every=1, **options) as stream:
            *previews, last = stream
        assert isinstance(last, samovar.Rows)
        assert previews
        previous_steps = 0
        for preview in previews:
            assert isinstance(preview, samovar.Preview)
            # A slow reader gets the latest preview only, so that step counts may skip numbers.
            (steps,) = preview.steps_done
            assert steps > previous_steps
            previous_steps = steps
            assert {name: array.shape for name, array in preview.outputs.items()} == {
                spec.name: (1, *spec.shape) for spec in operation.outputs
            }
        without_previews = client.sample(model.name, 1, **options)
        assert last.outputs[operation.outputs[0].name].tobytes() == without_previews.value.tobytes()


def test_samples_of_other_seed_or_index_differ(client: samovar.Client, model: samovar.Model) -> None:
    for operation in sample_operations(model):
        options: dict[str, Any] = {
            "variant": operation.variant,
            "parameters": few_steps(operation),
            "inputs": required_inputs(operation),
        }
        rows = [
            client.sample(model.name, first_row=index, seed=seed, **options).value.tobytes()
            for index, seed in ((0, 7), (1, 7), (0, 8))
        ]
        assert len(set(rows)) == 3, operation.name


def test_parameters_at_their_bounds_are_accepted(
    client: samovar.Client, stub: pb_grpc.InferenceStub, model: samovar.Model, server: RunningServer
) -> None:
    for operation in model.operations.values():
        one_row = {name: array[:1] for name, array in all_inputs(operation).items()}
        for parameter in numeric_parameters(operation):
            for value in (parameter.minimum, parameter.maximum):
                typed = int(value) if parameter.type is ParameterType.INTEGER else value
                if is_long_run(operation, parameter, typed):
                    assert_runs(stub, model, operation, one_row, parameter, server)
                    typed = 2 * int(parameter.default)
                request_outputs(client, model, operation, one_row, parameters={parameter.name: typed})


def is_long_run(operation: samovar.Operation, parameter: samovar.Parameter, value: float) -> bool:
    """Whether a parameter asks for more than twice the default number of steps."""
    return parameter.name == operation.steps.parameter and value > 2 * int(parameter.default)


def assert_runs(
    stub: pb_grpc.InferenceStub,
    model: samovar.Model,
    operation: samovar.Operation,
    inputs: Inputs,
    parameter: samovar.Parameter,
    server: RunningServer,
) -> None:
    """Request a row with the maximum of a parameter, wait until the row runs, and cancel the request."""
    value = parameter_to_proto(parameter, parameter.maximum)
    has_previews = operation.previewable and rpc_name(operation) == "sample"
    call = start_call(
        stub, model, operation.name, inputs, {parameter.name: value}, preview_every=int(has_previews)
    )
    if has_previews:
        next(call)
    else:
        wait_until(lambda: server.app.engine.num_running > 0 or call.done(), "the row does not run")
    call.cancel()
    assert call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.OK), call.details()
    assert_idle(server)


def test_parameters_beyond_their_bounds_are_rejected_with_name_bounds_and_value(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    for operation in model.operations.values():
        for parameter in numeric_parameters(operation):
            for bound, sign in ((parameter.minimum, -1), (parameter.maximum, 1)):
                value = bound + sign * smallest_excess(parameter, bound)
                settings = {parameter.name: parameter_to_proto(parameter, value)}
                found = violations(stub, model, operation, all_inputs(operation), settings)
                assert list(found) == [f"parameters[{parameter.name}]"]
                (description,) = found.values()
                assert_numbers(
                    description, "from {} to {}, got {}", parameter.minimum, parameter.maximum, value
                )


def smallest_excess(parameter: samovar.Parameter, bound: float) -> float:
    """Return 1 for an integer, and a hundredth of the bound's order of magnitude for a float."""
    if parameter.type is ParameterType.INTEGER:
        return 1
    return 10.0 ** math.floor(math.log10(abs(bound) or 1)) / 100


def assert_numbers(text: str, pattern: str, *numbers: float) -> None:
    """Check that a text ends with a pattern whose braces stand for these numbers."""
    found = re.search(pattern.replace("{}", r"(-?[\d.]+(?:e[-+]?\d+)?)") + "$", text)
    assert found, text
    assert [float(number) for number in found.groups()] == pytest.approx(numbers, rel=1e-3), text


def test_inputs_at_their_bounds_are_accepted(client: samovar.Client, model: samovar.Model) -> None:
    for operation in model.operations.values():
        for entry in operation.inputs:
            for bound in (entry.tensor.minimum, entry.tensor.maximum):
                if bound is not None:
                    rows = np.full((ROWS, *entry.tensor.shape), bound, entry.tensor.dtype)
                    inputs = {**all_inputs(operation), entry.tensor.name: rows}
                    request_outputs(client, model, operation, inputs)


def test_inputs_of_wrong_shape_or_beyond_their_bounds_are_rejected(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    for operation in model.operations.values():
        inputs = all_inputs(operation)
        for entry in operation.inputs:
            spec, field = entry.tensor, f"inputs[{entry.tensor.name}]"
            for wrong in (inputs[spec.name][..., None], inputs[spec.name].astype(np.int32)):
                found = violations(stub, model, operation, {**inputs, spec.name: wrong})
                assert list(found) == [field]
                assert found[field].startswith(f"expected {spec.dtype.name}[rows")
                assert found[field].endswith(f"got {wrong.dtype.name}{list(wrong.shape)}")
            for value in values_beyond_bounds(spec):
                rows = inputs[spec.name].copy()
                rows.reshape(-1)[-1] = value
                found = violations(stub, model, operation, {**inputs, spec.name: rows})
                assert list(found) == [field]
                span = "from {} to {}" if spec.minimum is not None else "to {}"
                bounds = [bound for bound in (spec.minimum, spec.maximum) if bound is not None]
                assert_numbers(
                    found[field],
                    f"expected elements {span}, got {{}} to {{}}",
                    *bounds,
                    float(rows.min()),
                    float(rows.max()),
                )


def values_beyond_bounds(spec: samovar.TensorSpec) -> Iterator[float]:
    """Yield the values next to the bounds that the dtype can hold, and a large one for floats."""
    is_float = spec.dtype.kind == "f"
    limits: Any = np.finfo(spec.dtype) if is_float else np.iinfo(spec.dtype)
    if spec.minimum is not None and spec.minimum - 1 >= limits.min:
        yield spec.minimum - 1
    if spec.maximum is not None and spec.maximum + 1 <= limits.max:
        yield from (spec.maximum + 1, 1e30) if is_float else (spec.maximum + 1,)


def test_unsupported_operations_are_rejected_with_the_reason(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    missing = set(OPERATIONS) - set(model.operations)
    assert missing == set(model.unsupported_operations)
    for name in missing:
        error = call_error(start_call(stub, model, name))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert model.unsupported_operations[name] in str(from_rpc(error))
