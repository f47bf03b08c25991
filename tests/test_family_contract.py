"""The contract that every family keeps on every data set that it is for, through the wire.

Whatever an artifact declares is true: its operations work, their parameters and inputs up to their
bounds, and beyond them a request is refused with the field, the bounds and what was given.
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
from export.graphs.program import OPERATIONS
from samovar import tensors
from samovar.errors import from_rpc
from samovar.model import ParameterType, ValueKind
from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from tests.support.datasets import Pair, each_pair
from tests.support.live_server import RunningServer

pytestmark = [each_pair, pytest.mark.timeout(600)]

ROWS, BRIEF = 3, 12
Array = NDArray[Any]


@pytest.fixture
def address(pair: Pair, request: pytest.FixtureRequest) -> str:
    running: RunningServer = request.getfixturevalue("server" if pair.is_usual else "other_server")
    return running.address


@pytest.fixture
def client(address: str) -> Iterator[samovar.Client]:
    with samovar.Client(address, timeout=None) as connected:
        yield connected


@pytest.fixture
def stub(address: str) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(address) as channel:
        yield pb_grpc.InferenceStub(channel)


@pytest.fixture
def model(pair: Pair, client: samovar.Client) -> samovar.Model:
    return client.model(pair.model)


def drawn(spec: samovar.TensorSpec) -> Array:
    """Rows within the bounds of an input."""
    chance, shape = np.random.default_rng(0), (ROWS, *spec.shape)
    if spec.dtype.kind == "f":
        # All bounds of floats lie beyond what is drawn.
        return chance.standard_normal(shape).astype(spec.dtype)
    assert spec.minimum is not None
    assert spec.maximum is not None
    return chance.integers(int(spec.minimum), int(spec.maximum), shape, endpoint=True).astype(spec.dtype)


def inputs_of(operation: samovar.Operation) -> dict[str, Array]:
    return {each.tensor.name: drawn(each.tensor) for each in operation.inputs}


def brief(operation: samovar.Operation) -> dict[str, float]:
    """Few steps, where a request may say how many."""
    steps = {each.name: each for each in operation.parameters if each.name == operation.steps.parameter}
    return {name: int(max(each.minimum, min(BRIEF, each.maximum))) for name, each in steps.items()}


def numbers(operation: samovar.Operation) -> Iterator[samovar.Parameter]:
    for parameter in operation.parameters:
        if parameter.type in (ParameterType.FLOAT, ParameterType.INTEGER):
            yield parameter


def as_typed(parameter: samovar.Parameter, value: float) -> float:
    return int(value) if parameter.type is ParameterType.INTEGER else value


def ask(
    client: samovar.Client,
    model: samovar.Model,
    operation: samovar.Operation,
    inputs: Mapping[str, Array],
    **settings: Any,
) -> dict[str, Array]:
    """The outputs by name, of the declared shapes and finite, of as many rows as the inputs have."""
    rows = len(next(iter(inputs.values()), range(ROWS)))
    name, options = operation.name.partition(":")[0], {"seed": 7, "method": operation.variant, **settings}
    options["parameters"] = {**brief(operation), **options.get("parameters", {})}
    if name == "sample":
        result = client.sample(model.name, rows, inputs=inputs, **options)
    else:
        result = getattr(client, name)(model.name, inputs, **options)
    outputs = dict(result.columns() if isinstance(result, samovar.Scores) else result.outputs)
    for spec in operation.outputs:
        if spec.name in outputs:
            assert outputs[spec.name].shape == (rows, *spec.shape), spec.name
            assert np.isfinite(outputs[spec.name]).all(), spec.name
    return outputs


def send(stub: pb_grpc.InferenceStub, name: str, **settings: Any) -> None:
    """A request and the whole of its answer."""
    if name == "sample":
        list(stub.Sample(pb.SampleRequest(rows=ROWS, **settings)))
    else:
        getattr(stub, name.capitalize())(pb.TransformRequest(**settings))


def refusal(
    stub: pb_grpc.InferenceStub,
    model: samovar.Model,
    operation: samovar.Operation,
    inputs: Mapping[str, Array],
    parameters: Mapping[str, pb.ParameterValue] | None = None,
) -> dict[str, str]:
    """What is said of each field of a request that has to be refused as invalid."""
    packed = {name: tensors.pack(array) for name, array in inputs.items()}
    with pytest.raises(grpc.RpcError) as raised:
        send(
            stub,
            operation.name.partition(":")[0],
            model=pb.ModelSelector(name=model.name),
            method=operation.variant,
            inputs=packed,
            parameters=parameters,
        )
    error = from_rpc(raised.value)
    assert isinstance(error, samovar.InvalidRequest)
    return {each.field: each.description for each in error.violations}


def test_formats_agree_on_every_operation(client: samovar.Client, model: samovar.Model) -> None:
    """As far as docs/custom-models.md says that golden rows may differ."""
    for operation in model.operations.values():
        first, *others = (
            ask(client, model, operation, inputs_of(operation), format=format) for format in model.formats
        )
        assert others
        for other in others:
            for name, expected in first.items():
                apart = np.abs(other[name].astype(np.float64) - expected.astype(np.float64)).max()
                assert apart <= tolerance(model.data_spec, name, expected), (operation.name, name)


def tolerance(value: samovar.DataSpec, name: str, array: Array) -> float:
    if array.dtype.kind == "f":
        return 1e-4 * max(1.0, float(np.abs(array).max()))
    return float(value.kind is ValueKind.IMAGE and name == value.tensor.name)


def test_previews_are_readouts_on_the_way_and_change_nothing(
    client: samovar.Client, model: samovar.Model
) -> None:
    """Images that take shape, states of a chain, texts as far as they are written."""
    samples = (each for each in model.operations.values() if each.name.startswith("sample"))
    for operation in (each for each in samples if each.previewable):
        settings: dict[str, Any] = {
            "seed": 7,
            "method": operation.variant,
            "parameters": brief(operation),
            "inputs": free(operation),
        }
        with client.stream(model.name, 1, preview_every=1, **settings) as stream:
            *previews, last = stream
        assert isinstance(last, samovar.Rows)
        assert previews
        done = 0
        for preview in previews:
            assert isinstance(preview, samovar.Preview)
            # A reader that lags behind gets the newest.
            (steps,) = preview.steps_done
            assert steps > done
            done = steps
            assert {name: array.shape for name, array in preview.outputs.items()} == {
                spec.name: (1, *spec.shape) for spec in operation.outputs
            }
        alone = client.sample(model.name, 1, **settings)
        assert last.outputs[operation.outputs[0].name].tobytes() == alone.value.tobytes()


def test_another_seed_or_index_is_another_row(client: samovar.Client, model: samovar.Model) -> None:
    for operation in model.operations.values():
        if operation.name.startswith("sample"):
            settings: dict[str, Any] = {
                "method": operation.variant,
                "parameters": brief(operation),
                "inputs": free(operation),
            }
            rows = [
                client.sample(model.name, first_row=index, seed=seed, **settings).value.tobytes()
                for index, seed in ((0, 7), (1, 7), (0, 8))
            ]
            assert len(set(rows)) == 3, operation.name


def free(operation: samovar.Operation) -> dict[str, Array]:
    """One row of the inputs that are needed, of which nothing is known to stay."""
    needed = {each.tensor.name: drawn(each.tensor)[:1] for each in operation.inputs if not each.optional}
    return {name: array * 0 if name == "known" else array for name, array in needed.items()}


def test_numbers_up_to_their_bounds_are_taken(client: samovar.Client, model: samovar.Model) -> None:
    for operation in model.operations.values():
        for parameter in numbers(operation):
            for bound in (parameter.minimum, parameter.maximum):
                one = {name: array[:1] for name, array in inputs_of(operation).items()}
                setting = {parameter.name: as_typed(parameter, bound)}
                ask(client, model, operation, one, parameters=setting)


def test_numbers_beyond_their_bounds_are_refused_by_name_bound_and_value(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    for operation in model.operations.values():
        for parameter in numbers(operation):
            for bound, sign in ((parameter.minimum, -1), (parameter.maximum, 1)):
                given = bound + sign * least_step(parameter, bound)
                value = (
                    pb.ParameterValue(integer_value=int(given))
                    if parameter.type is ParameterType.INTEGER
                    else pb.ParameterValue(float_value=given)
                )
                said = refusal(stub, model, operation, inputs_of(operation), {parameter.name: value})
                assert list(said) == [f"parameters[{parameter.name}]"]
                (description,) = said.values()
                assert_says(description, "from {} to {}, got {}", parameter.minimum, parameter.maximum, given)


def least_step(parameter: samovar.Parameter, bound: float) -> float:
    """1 of an integer; of other numbers a hundredth of their order of magnitude."""
    if parameter.type is ParameterType.INTEGER:
        return 1
    return 10.0 ** math.floor(math.log10(abs(bound) or 1)) / 100


def assert_says(text: str, pattern: str, *numbers: float) -> None:
    """A text ends in a pattern with these numbers in the place of its braces."""
    found = re.search(pattern.replace("{}", r"(-?[\d.]+(?:e[-+]?\d+)?)") + "$", text)
    assert found, text
    assert [float(number) for number in found.groups()] == pytest.approx(numbers, rel=1e-3), text


def test_inputs_up_to_their_bounds_are_taken(client: samovar.Client, model: samovar.Model) -> None:
    for operation in model.operations.values():
        for entry in operation.inputs:
            for bound in (entry.tensor.minimum, entry.tensor.maximum):
                if bound is not None:
                    extreme = np.full((ROWS, *entry.tensor.shape), bound, entry.tensor.dtype)
                    ask(client, model, operation, {**inputs_of(operation), entry.tensor.name: extreme})


def test_inputs_of_other_shapes_or_beyond_their_bounds_are_refused(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    """Masks, labels, images, points and sequences alike."""
    for operation in model.operations.values():
        whole = inputs_of(operation)
        for entry in operation.inputs:
            spec, where = entry.tensor, f"inputs[{entry.tensor.name}]"
            for wrong in (whole[spec.name][..., None], whole[spec.name].astype(np.int32)):
                said = refusal(stub, model, operation, {**whole, spec.name: wrong})
                assert list(said) == [where]
                assert said[where].startswith(f"expected {spec.dtype.name}[rows")
                assert said[where].endswith(f"got {wrong.dtype.name}{list(wrong.shape)}")
            for beyond in outside(spec):
                given = whole[spec.name].copy()
                given.reshape(-1)[-1] = beyond
                said = refusal(stub, model, operation, {**whole, spec.name: given})
                assert list(said) == [where]
                span = "from {} to {}" if spec.minimum is not None else "to {}"
                bounds = [bound for bound in (spec.minimum, spec.maximum) if bound is not None]
                assert_says(
                    said[where],
                    f"expected elements {span}, got {{}} to {{}}",
                    *bounds,
                    float(given.min()),
                    float(given.max()),
                )


def outside(spec: samovar.TensorSpec) -> Iterator[float]:
    """Numbers of the input's type that are just out of bounds, and of floats the largest."""
    is_float = spec.dtype.kind == "f"
    limits: Any = np.finfo(spec.dtype) if is_float else np.iinfo(spec.dtype)
    if spec.minimum is not None and spec.minimum - 1 >= limits.min:
        yield spec.minimum - 1
    if spec.maximum is not None and spec.maximum + 1 <= limits.max:
        yield from (spec.maximum + 1, 1e30) if is_float else (spec.maximum + 1,)


def test_what_a_model_lacks_is_refused_with_the_reason(
    stub: pb_grpc.InferenceStub, model: samovar.Model
) -> None:
    lacking = set(OPERATIONS) - set(model.operations)
    assert lacking == set(model.unsupported_operations)
    for name in lacking:
        with pytest.raises(grpc.RpcError) as raised:
            send(stub, name, model=pb.ModelSelector(name=model.name))
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert model.unsupported_operations[name] in str(from_rpc(raised.value))
