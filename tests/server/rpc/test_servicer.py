"""Inference service through a real server: responses, violations, errors, limits, chunks, cancellation."""

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from torch import Tensor, nn

import samovar
from export.artifacts import golden, writer
from export.graphs import program
from samovar import tensors
from samovar.v1 import inference_pb2 as pb
from samovar.v1 import inference_pb2_grpc as pb_grpc
from samovar.v1 import manifest_pb2
from tests.support.live_server import RunningServer, assert_idle, serving, wait_until

VAE, DIFFUSION = "digits-vae", "digits-diffusion"
IMAGES = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8) % 17


@pytest.fixture(scope="module")
def models(models_of: Callable[..., Path]) -> Path:
    """The models that the servers of single tests load."""
    return models_of(DIFFUSION, VAE)


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[pb_grpc.InferenceStub]:
    with grpc.insecure_channel(server.address) as channel:
        yield pb_grpc.InferenceStub(channel)


def selector(name: str = VAE, version: str = "", format: str = "") -> pb.ModelSelector:
    return pb.ModelSelector(name=name, version=version, format=format)


def code_and_violations(call: grpc.RpcError) -> tuple[grpc.StatusCode, dict[str, str]]:
    """Return the status code, and the violations by field."""
    status = rpc_status.from_call(call)
    assert status is not None, "the error carries no google.rpc.Status"
    violations = {}
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            violations = {v.field: v.description for v in bad_request.field_violations}
    return call.code(), violations


class Halve(nn.Module):
    """Default variant: halves the noise."""

    def forward(self, noise: Tensor) -> Tensor:
        return noise / 2


class Double(nn.Module):
    """Second variant: doubles the noise."""

    def forward(self, noise: Tensor) -> Tensor:
        return noise * 2


@pytest.fixture(scope="module")
def two_variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[samovar.Client]:
    """A client of a model with two variants of sample and a reason for not supporting score."""
    point = program.TensorSpec("point", shape=(2,), doc="a point")
    noise = program.Noise("noise", "normal", (2,), 0)
    usual = program.Program("sample", Halve(), (point,), "halve the noise", noise=(noise,))
    other = program.Program("sample", Double(), (point,), "double it", noise=(noise,), variant="double")
    model = writer.Model(
        name="two-variants",
        family="toy",
        description="noise, halved or doubled",
        data_spec=program.DataSpec("vector", point),
        programs=(usual, other),
        examples=(golden.Example("sample"), golden.Example("sample:double")),
        unsupported_operations={"score": "its density is unknown"},
    )
    models = tmp_path_factory.mktemp("variants")
    for variant in (usual, other):
        variant.readout.eval()
    writer.write(model, models / model.name / "1")
    with serving(models) as running, samovar.Client(running.address) as connected:
        yield connected


def test_sample_variant_runs_its_own_program(two_variants: samovar.Client) -> None:
    usual = two_variants.sample("two-variants", 3, seed=5).value
    other = two_variants.sample("two-variants", 3, seed=5, variant="double").value
    assert np.array_equal(other, 4 * usual)


def test_unknown_variant_is_rejected_by_client_with_known_ones(two_variants: samovar.Client) -> None:
    with pytest.raises(samovar.InvalidRequest, match="unknown variant 'triple'"):
        two_variants.sample("two-variants", variant="triple")


def test_unknown_variant_is_rejected_by_server(
    two_variants: samovar.Client, stub: pb_grpc.InferenceStub
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(pb.SampleRequest(model=selector(), rows=1, variant="magic")))
    code, violations = code_and_violations(raised.value)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert violations["variant"] == "unknown variant 'magic' of sample; expected one of: inpaint"


def test_unsupported_operation_is_rejected_with_its_reason(two_variants: samovar.Client) -> None:
    with pytest.raises(samovar.UnsupportedOperation, match="its density is unknown; it supports sample"):
        two_variants.score("two-variants", np.zeros((1, 2), np.float32))


def test_reason_of_unsupported_operation_is_sent(stub: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Energy(pb.TransformRequest(model=selector()))
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "an integral without a closed form" in (raised.value.details() or "")


def test_invalid_request_lists_every_violation_with_expected_and_given(stub: pb_grpc.InferenceStub) -> None:
    request = pb.SampleRequest(
        model=selector(DIFFUSION),
        rows=0,
        parameters={
            "steps": pb.ParameterValue(float_value=2.5),
            "eta": pb.ParameterValue(float_value=7.0),
            "sampler": pb.ParameterValue(choice_value="magic"),
            "magic": pb.ParameterValue(boolean_value=True),
        },
        inputs={"picture": tensors.pack(IMAGES)},
    )
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(request))
    code, violations = code_and_violations(raised.value)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(violations) == {
        "rows", "parameters[steps]", "parameters[eta]", "parameters[sampler]", "parameters[magic]",
        "inputs[picture]",
    }  # fmt: skip
    assert violations["rows"].startswith("expected 1 to ")
    assert violations["rows"].endswith("got 0")
    assert violations["parameters[eta]"] == "expected a float from 0 to 1, got 7"
    assert "got a float" in violations["parameters[steps]"]
    assert "dpmpp2m" in violations["parameters[sampler]"]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (pb.Tensor(), "expected a known dtype"),
        (pb.Tensor(dtype=manifest_pb2.DATA_TYPE_UINT8, shape=[3, 8, 8], data=b"\0" * 191), "got 191"),
        (pb.Tensor(dtype=manifest_pb2.DATA_TYPE_UINT8, shape=[-1, 8, 8]), "without negative axes"),
        (pb.Tensor(dtype=manifest_pb2.DATA_TYPE_UINT8, shape=[0, 8, 8]), "expected at least 1 row, got 0"),
        (
            pb.Tensor(dtype=manifest_pb2.DATA_TYPE_UINT8, shape=[1] * 100, data=b"\0"),
            "that NumPy supports",
        ),
        (
            pb.Tensor(dtype=manifest_pb2.DATA_TYPE_UINT8, shape=[2**63 - 1, 2**63 - 1, 0]),
            "that NumPy supports",
        ),
        (
            pb.Tensor(dtype=manifest_pb2.DataType.ValueType(99), shape=[1], data=b"\0"),
            "expected a known dtype, got 99",
        ),
        (
            tensors.pack(IMAGES.astype(np.float32)),
            "expected uint8[rows, 8, 8] from 0 to 16, got float32[3, 8, 8]",
        ),
        (tensors.pack(IMAGES[0]), "got uint8[8, 8]"),
        (tensors.pack(IMAGES.reshape(3, 64)), "got uint8[3, 64]"),
        (tensors.pack(IMAGES + np.uint8(1)), "got 1 to 17"),
        (tensors.pack(np.array(3, np.uint8)), "got uint8[]"),
    ],
)
def test_invalid_tensor_is_rejected_with_its_violation(
    stub: pb_grpc.InferenceStub, tensor: pb.Tensor, expected: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Reconstruct(pb.TransformRequest(model=selector(), inputs={"image": tensor}))
    code, violations = code_and_violations(raised.value)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert expected in "; ".join(violations.values())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_input_is_rejected(stub: pb_grpc.InferenceStub, value: float) -> None:
    latent = tensors.pack(np.full((2, 16), value, np.float32))
    with pytest.raises(grpc.RpcError) as raised:
        stub.Decode(pb.TransformRequest(model=selector(), inputs={"latent": latent}))
    assert "expected finite numbers" in code_and_violations(raised.value)[1]["inputs[latent]"]


def test_a_thousand_violations_are_truncated_to_fit_into_metadata(stub: pb_grpc.InferenceStub) -> None:
    wrong = {f"{number}-{'x' * 300}": pb.ParameterValue(float_value=1.0) for number in range(1000)}
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(pb.SampleRequest(model=selector(), rows=1, parameters=wrong)))
    code, violations = code_and_violations(raised.value)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert violations["*"] == f"and {1000 - len(violations) + 1} more"


@pytest.mark.parametrize("character", ["x", "%", "é", "\N{HOT BEVERAGE}", "\N{GRINNING FACE}"])
def test_errors_with_long_names_keep_their_status_code(stub: pb_grpc.InferenceStub, character: str) -> None:
    """Errors are sent in headers, where a character may take twelve bytes."""
    name = character * 3000
    wrong = {f"{number}{name}": pb.ParameterValue(float_value=1.0) for number in range(20)}
    inputs = {f"{number}{name}": tensors.pack(IMAGES) for number in range(20)}
    calls: list[tuple[Callable[[], object], grpc.StatusCode]] = [
        (lambda: stub.GetModel(pb.GetModelRequest(model=selector(name))), grpc.StatusCode.NOT_FOUND),
        (lambda: stub.Decode(pb.TransformRequest(model=selector(version=name))), grpc.StatusCode.NOT_FOUND),
        (
            lambda: list(stub.Sample(pb.SampleRequest(model=selector(), rows=1, variant=name))),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            lambda: list(stub.Sample(pb.SampleRequest(model=selector(), rows=0, parameters=wrong))),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            lambda: stub.Score(pb.TransformRequest(model=selector(), inputs=inputs)),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ]
    for call, code in calls:
        with pytest.raises(grpc.RpcError) as raised:
            call()
        assert raised.value.code() == code, raised.value.details()
        assert character * 10 in (raised.value.details() or "")
        assert rpc_status.from_call(raised.value) is not None


def test_violation_shows_given_number_exactly(stub: pb_grpc.InferenceStub) -> None:
    request = pb.SampleRequest(
        model=selector(DIFFUSION),
        rows=1,
        parameters={
            "eta": pb.ParameterValue(float_value=1.0000001),
            "steps": pb.ParameterValue(integer_value=2**53 + 1),
        },
        inputs={"label": tensors.pack(np.array([16_777_217]))},
    )
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(request))
    violations = code_and_violations(raised.value)[1]
    assert violations["parameters[eta]"] == "expected a float from 0 to 1, got 1.0000001"
    assert violations["parameters[steps]"] == "expected an integer from 1 to 200, got 9007199254740993"
    assert violations["inputs[label]"] == "expected elements from 0 to 10, got 16777217 to 16777217"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1e300, "1e+300"), (-0.1, "-0.1"), (2.0**60, "1.152921504606847e+18")],
)
def test_violation_shows_numbers_without_padding(
    stub: pb_grpc.InferenceStub, value: float, shown: str
) -> None:
    request = pb.SampleRequest(
        model=selector(DIFFUSION), rows=1, parameters={"eta": pb.ParameterValue(float_value=value)}
    )
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(request))
    assert code_and_violations(raised.value)[1]["parameters[eta]"].endswith(f"got {shown}")


def test_undecodable_request_is_rejected_as_invalid(server: RunningServer) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/samovar.v1.Inference/Decode")
        with pytest.raises(grpc.RpcError) as raised:
            call(b"\xff\xff\xff")
    code, violations = code_and_violations(raised.value)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "request" in violations


def test_missing_input_is_reported(stub: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        stub.Score(pb.TransformRequest(model=selector()))
    assert code_and_violations(raised.value)[1] == {
        "inputs[image]": "expected uint8[rows, 8, 8] from 0 to 16, got nothing"
    }


def test_row_index_above_limit_is_rejected(stub: pb_grpc.InferenceStub) -> None:
    last = pb.SampleRequest(model=selector(), rows=1, first_row=2**32 - 1, seed=1)
    assert len(list(stub.Sample(last))) == 1
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(pb.SampleRequest(model=selector(), rows=2, first_row=2**32 - 1)))
    assert "2^32" in code_and_violations(raised.value)[1]["first_row"]


def test_preview_of_program_without_previews_is_rejected(stub: pb_grpc.InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(pb.SampleRequest(model=selector(), rows=1, preview_every=1)))
    assert "preview_every" in code_and_violations(raised.value)[1]


@pytest.mark.parametrize(
    ("model", "method"),
    [(DIFFUSION, "Energy"), (DIFFUSION, "Classify"), ("digits-gan", "Score"), ("digits-gan", "Encode")],
)
def test_unsupported_operation_lists_supported_ones(
    stub: pb_grpc.InferenceStub, model: str, method: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        getattr(stub, method)(pb.TransformRequest(model=selector(model)))
    status = rpc_status.from_call(raised.value)
    assert status is not None
    assert status.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("UNSUPPORTED_OPERATION", "samovar")
    assert "sample" in info.metadata["supported"].split(",")


@pytest.mark.parametrize(
    ("selected", "listed"),
    [
        (selector("nothing"), "digits-vae"),
        (selector("../digits-vae"), "digits-vae"),
        (selector(""), "digits-vae"),
        (selector(version="9"), "expected one of: 1"),
        (selector(format="cuneiform"), "onnx, torchscript"),
    ],
)
def test_unknown_model_version_or_format_lists_known_ones(
    stub: pb_grpc.InferenceStub, selected: pb.ModelSelector, listed: str
) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        list(stub.Sample(pb.SampleRequest(model=selected, rows=1)))
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND
    assert listed in (raised.value.details() or "")


def test_small_response_is_one_message(stub: pb_grpc.InferenceStub) -> None:
    messages = list(stub.Sample(pb.SampleRequest(model=selector(), rows=5, seed=3)))
    assert sum(len(message.rows.indices) for message in messages) == 5
    run = messages[0].run
    assert len(run.artifact_sha256) == 64
    assert (run.version, run.format, run.seed, run.steps) == ("1", "onnx", 3, 0)
    assert messages[-1].HasField("timings")
    assert all(not message.HasField("run") for message in messages[1:])


def test_drawn_seed_is_returned_and_reproduces_the_rows(client: samovar.Client) -> None:
    first = client.sample(VAE, 4)
    again = client.sample(VAE, 4, seed=first.run.seed)
    assert np.array_equal(first.value, again.value)


def test_large_sample_is_streamed_in_chunks(stub: pb_grpc.InferenceStub) -> None:
    messages = list(stub.Sample(pb.SampleRequest(model=selector(), rows=40_000, seed=3)))
    assert len(messages) > 1
    assert max(message.ByteSize() for message in messages) < 2 << 20
    assert sorted(index for message in messages for index in message.rows.indices) == list(range(40_000))


def test_previews_arrive_before_their_rows(client: samovar.Client) -> None:
    with client.stream(DIFFUSION, 3, seed=1, preview_every=2, parameters={"steps": 7}) as stream:
        events = list(stream)
    previews = [event for event in events if isinstance(event, samovar.Preview)]
    assert [list(preview.steps_done) for preview in previews] == [[2] * 3, [4] * 3, [6] * 3]
    plain = client.sample(DIFFUSION, 3, seed=1, parameters={"steps": 7})
    finished = [event for event in events if isinstance(event, samovar.Rows)]
    assert np.array_equal(finished[0].outputs["image"], plain.value)


def test_score_has_kind_draws_and_standard_error(client: samovar.Client) -> None:
    scores = client.score(VAE, IMAGES, seed=1, parameters={"draws": 25})
    assert scores.kind == samovar.ScoreKind.LOWER_BOUND
    assert scores.draws == 25
    assert scores.standard_error is not None
    assert scores.bits_per_dimension is not None
    assert np.allclose(scores.bits_per_dimension, -scores.nats / (64 * np.log(2)))


def test_input_with_one_row_applies_to_every_row(client: samovar.Client) -> None:
    same = client.sample(DIFFUSION, 4, seed=1, inputs={"label": np.array([3])}, parameters={"steps": 2})
    each = client.sample(DIFFUSION, 4, seed=1, inputs={"label": np.full(4, 3)}, parameters={"steps": 2})
    assert np.array_equal(same.value, each.value)


def test_timings_are_plausible(client: samovar.Client) -> None:
    timings = client.sample(DIFFUSION, 4, parameters={"steps": 10}).timings
    assert 0 <= timings.queue < 60
    assert 0 < timings.compute <= timings.run < 60


def test_models_are_listed_in_pages_by_name(stub: pb_grpc.InferenceStub) -> None:
    first = stub.ListModels(pb.ListModelsRequest(page_size=1))
    second = stub.ListModels(pb.ListModelsRequest(page_size=1, page_token=first.next_page_token))
    names = [page.models[0].manifest.name for page in (first, second)]
    assert names == sorted(names)
    assert len(set(names)) == 2
    assert all(not model.manifest.golden_rows for model in first.models)
    with pytest.raises(grpc.RpcError) as raised:
        stub.ListModels(pb.ListModelsRequest(page_size=-1, page_token="0" * 5000))
    assert set(code_and_violations(raised.value)[1]) == {"page_size", "page_token"}


def test_passed_deadline_is_deadline_exceeded_and_frees_rows(
    client: samovar.Client, server: RunningServer
) -> None:
    with pytest.raises(samovar.DeadlineExceeded):
        client.sample(DIFFUSION, 50_000, timeout=0.2, parameters={"steps": 200})
    assert_idle(server)


def test_cancelled_call_frees_its_rows(client: samovar.Client, server: RunningServer) -> None:
    with client.stream(DIFFUSION, 5_000, preview_every=1, parameters={"steps": 200}) as stream:
        next(iter(stream))
        assert server.app.engine.num_running > 0
    assert_idle(server)


def test_slow_reader_pauses_its_request(server: RunningServer) -> None:
    engine = server.app.engine
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65_536)]
    with grpc.insecure_channel(server.address, narrow) as channel:
        call = pb_grpc.InferenceStub(channel).Sample(pb.SampleRequest(model=selector(), rows=100_000, seed=1))
        next(call)
        wait_until(lambda: engine.num_queued > 0 and engine.num_running == 0, "the engine did not pause")
        assert sum(len(message.rows.indices) for message in call) > 50_000
    assert_idle(server)


def test_response_above_message_limit_is_rejected_before_computing(models: Path) -> None:
    with (
        serving(models, formats=("onnx",), max_message_mib=1) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.InferenceStub(channel)
        latents = tensors.pack(np.zeros((16_384, 16), np.float32)[:15_000])
        assert stub.Decode(pb.TransformRequest(model=selector(), inputs={"latent": latents})).outputs
        images = tensors.pack(np.zeros((10_000, 8, 8), np.uint8))
        with pytest.raises(grpc.RpcError) as raised:
            stub.Encode(pb.TransformRequest(model=selector(), inputs={"image": images}))
        assert "first_row" in code_and_violations(raised.value)[1]["inputs"]


def test_client_splits_request_above_message_limit(models: Path, client: samovar.Client) -> None:
    images = np.arange(20_000 * 64, dtype=np.uint32).astype(np.uint8).reshape(-1, 8, 8) % 17
    with (
        serving(models, formats=("onnx",), max_message_mib=1) as server,
        samovar.Client(server.address) as small,
    ):
        parameters = {"latent": "draw"}
        split = small.reconstruct(VAE, images, seed=5, parameters=parameters)
    whole = client.reconstruct(VAE, images, seed=5, parameters=parameters)
    assert np.array_equal(split.value, whole.value)


def test_request_above_queue_limit_is_rejected_with_retry_delay(models: Path) -> None:
    with (
        serving(models, formats=("onnx",), max_queued_rows=200) as server,
        samovar.Client(server.address) as client,
    ):
        long = {"steps": 200}
        with client.stream(DIFFUSION, 200, preview_every=1, parameters=long) as stream:
            next(iter(stream))
            with pytest.raises(samovar.Overloaded) as refused:
                client.sample(DIFFUSION, 200)
            assert refused.value.retry_delay
        wait_until(lambda: server.app.engine.num_queued == 0, "rows are left in the engine")
        assert len(client.sample(DIFFUSION, 200, parameters={"steps": 1}).value) == 200
        with pytest.raises(samovar.InvalidRequest):
            client.sample(DIFFUSION, 201)
