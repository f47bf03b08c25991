"""Tests of the synchronous client against the fake server."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samovar import (
    Cancelled,
    Client,
    Determinism,
    InvalidRequest,
    ModelNotFound,
    Preview,
    Rows,
    ScoreKind,
    ServerError,
    Timings,
    Unavailable,
)
from samovar.result import ReorderBuffer
from samovar.v1 import inference_pb2 as pb
from tests.support.fake_server import COUNTER, UNAVAILABLE, FakeServer, FakeService, images, model_message


def test_sample_returns_rows_in_order(client: Client) -> None:
    result = client.sample("counter", 7, seed=5, first_row=2)
    assert result.value.tolist() == images(5, np.arange(2, 9)).tolist()
    assert list(result.outputs) == ["image", "count"]
    assert result.outputs["count"].tolist() == list(range(2, 9))


def test_result_has_run_info_and_timings(client: Client) -> None:
    result = client.sample("counter", seed=5, format="torchscript")
    assert result.run.artifact_sha256 == "counter-2"
    assert (result.run.version, result.run.format, result.run.seed, result.run.steps) == (
        "2",
        "torchscript",
        5,
        4,
    )
    assert result.run.determinism is Determinism.BITWISE
    assert result.timings == Timings(queue=0.5, run=1.0, compute=0.5)


def test_parameters_are_encoded_by_python_type(client: Client, service: FakeService) -> None:
    parameters = {"steps": np.int32(3), "scale": 0.5, "greedy": True, "order": "down"}
    client.sample("counter", parameters=parameters)  # type: ignore[arg-type]
    (request,) = service.requests
    assert isinstance(request, pb.SampleRequest)
    assert {name: value.WhichOneof("value") for name, value in request.parameters.items()} == {
        "steps": "integer_value",
        "scale": "float_value",
        "greedy": "boolean_value",
        "order": "choice_value",
    }


def test_sample_sends_inputs(client: Client) -> None:
    result = client.sample("counter", 3, seed=0, inputs={"label": 2})
    assert result.value.tolist() == images(0, np.arange(3), label=2).tolist()


def test_sample_without_seed_draws_new_seed(client: Client) -> None:
    seeds = {client.sample("counter").run.seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize("options", [{"seed": -1}, {"seed": 2**64}, {"first_row": 2**32}, {"seed": 1.5}])
def test_option_out_of_range_is_rejected(client: Client, options: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match=rf"{next(iter(options))}: expected an integer"):
        client.sample("counter", **options)  # type: ignore[arg-type]


def test_unknown_option_raises_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="unknown option 'sed'; expected one of: version, format, seed"):
        client.sample("counter", sed=1)  # type: ignore[call-arg]


def test_stream_yields_previews_and_finished_rows(client: Client) -> None:
    with client.stream("counter", 6, seed=0, preview_every=2) as stream:
        events = list(stream)
    preview, *finished = events
    assert isinstance(preview, Preview)
    assert preview.steps_done.tolist() == [2] * 6
    assert preview.outputs["image"][:, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert all(isinstance(event, Rows) for event in finished)
    assert [event.indices.tolist() for event in finished] == [[5, 4], [3, 2], [1, 0]]
    assert stream.run.seed == 0
    assert stream.timings.run == 1.0


def test_ordered_stream_yields_rows_in_order(client: Client) -> None:
    with client.stream("counter", 6, seed=0, first_row=10, ordered=True) as stream:
        (event,) = stream
    assert event.indices.tolist() == list(range(10, 16))
    assert event.outputs["image"].tolist() == images(0, np.arange(10, 16)).tolist()
    assert stream.timings.run == 1.0


@given(st.permutations(range(12)), st.integers(1, 5), st.integers(0, 9))
def test_reorder_buffer_releases_rows_up_to_the_first_missing(
    order: list[int], size: int, first_row: int
) -> None:
    buffer, seen = ReorderBuffer(first_row), set[int]()
    released: list[int] = []
    for start in range(0, len(order), size):
        indices = first_row + np.array(order[start : start + size])
        seen |= set(indices.tolist())
        ready = buffer.push(Rows(indices, {"square": indices**2}))
        if ready is not None:
            assert (ready.outputs["square"] == ready.indices**2).all()
            released += ready.indices.tolist()
        missing = next(index for index in range(first_row, first_row + 13) if index not in seen)
        assert released == list(range(first_row, missing))


def test_stream_run_before_first_event_raises(client: Client) -> None:
    with client.stream("counter") as stream, pytest.raises(ServerError, match="before the first event"):
        _ = stream.run


def test_stream_exit_cancels_call(client: Client, service: FakeService) -> None:
    service.blocks = True
    with client.stream("counter", 6, seed=0) as stream:
        assert next(stream).indices.tolist() == [5, 4]
    assert service.cancelled.wait(500)
    with pytest.raises(Cancelled):
        next(stream)


def test_stream_cancel_from_another_thread_cancels_call(client: Client, service: FakeService) -> None:
    service.blocks = True
    with client.stream("counter", 6) as stream:
        next(stream)
        threading.Thread(target=stream.cancel).start()
        with pytest.raises(Cancelled):
            next(stream)
    assert service.cancelled.wait(500)


def test_transforms_return_rows_in_order(client: Client) -> None:
    rows = images(0, np.arange(5))
    assert client.reconstruct("counter", rows).value.tolist() == rows.tolist()
    latents = client.encode("counter", rows.astype(np.int64)).value
    assert latents.tolist() == [[float(i), float(-i)] for i in range(5)]
    assert client.decode("counter", {"latent": latents.astype(np.float64)}).value.tolist() == rows.tolist()
    assert client.classify("counter", rows).value.argmax(axis=1).tolist() == [0, 1, 2, 0, 1]


def test_scores_have_meaning_and_errors(client: Client) -> None:
    scores = client.score("counter", images(0, np.arange(3)), parameters={"draws": 20})
    assert scores.kind is ScoreKind.LOWER_BOUND
    assert (scores.dimensions, scores.coordinate_space, scores.draws) == (48, "integers 0..16", 20)
    assert scores.value.tolist() == scores.nats.tolist() == [-0.0, -48.125, -96.25]
    assert scores.bits_per_dimension == pytest.approx(-scores.nats / (48 * np.log(2)))
    assert scores.standard_error is not None
    assert scores.standard_error.tolist() == [0.5] * 3
    assert list(scores.outputs) == ["brightness"]


def test_request_above_message_limit_is_split() -> None:
    """The server rejects messages above 128 KiB; 4000 rows are 192,000 bytes."""
    with FakeServer(FakeService(max_message_bytes=128 * 1024)) as server, Client(server.address) as client:
        rows = images(3, np.arange(4000))
        scores = client.score("counter", rows, first_row=8)
    parts = [request for request in server.service.requests if isinstance(request, pb.TransformRequest)]
    assert len(parts) > 1
    assert len({part.seed for part in parts}) == 1
    assert {part.model.version for part in parts} == {"2"}
    sizes = [part.inputs["image"].shape[0] for part in parts]
    assert [part.first_row for part in parts] == [8 + sum(sizes[:index]) for index in range(len(parts))]
    expected = -rows.sum(axis=(1, 2), dtype=np.int64) - np.arange(8, 4008) / 8
    assert scores.nats.tolist() == expected.tolist()
    assert scores.timings.run == len(parts)


def test_unavailable_server_is_retried_with_equal_request(client: Client, service: FakeService) -> None:
    service.errors = [UNAVAILABLE, UNAVAILABLE]
    result = client.reconstruct("counter", images(0, np.arange(2)))
    assert len(service.requests) == 3
    assert len({request.SerializeToString(deterministic=True) for request in service.requests}) == 1
    assert len(result.value) == 2


def test_streams_and_large_requests_are_retried(client: Client, service: FakeService) -> None:
    service.errors = [UNAVAILABLE]
    assert len(client.sample("counter", 3).value) == 3
    service.errors = [UNAVAILABLE]
    rows = np.zeros((50_000, 8, 6), np.uint8)
    assert len(client.reconstruct("counter", rows).value) == len(rows)


def test_server_that_stays_unavailable_raises_after_five_attempts(
    client: Client, service: FakeService
) -> None:
    service.errors = [UNAVAILABLE] * 9
    with pytest.raises(Unavailable, match="loading"):
        client.sample("counter")
    assert len(service.requests) == 5


def test_model_is_cached_between_calls(client: Client, service: FakeService) -> None:
    for _ in range(3):
        client.sample("counter")
    assert service.num_get_model == 1


def test_model_is_fetched_again_after_another_artifact_responds(client: Client, service: FakeService) -> None:
    client.sample("counter")
    service.models[0] = model_message(COUNTER, 3, 3)
    assert client.sample("counter").run.version == "3"
    client.sample("counter")
    assert service.num_get_model == 2


def test_model_is_fetched_again_after_invalid_request(client: Client, service: FakeService) -> None:
    client.sample("counter")
    with pytest.raises(InvalidRequest):
        client.sample("counter", inputs={"color": 1})
    client.sample("counter")
    assert service.num_get_model == 2


def test_model_description_is_complete(client: Client) -> None:
    model = client.model("counter")
    assert (model.name, model.version, model.is_default, model.formats) == (
        "counter",
        "2",
        True,
        ("onnx", "torchscript"),
    )
    sample = model.operations["sample"]
    assert [(parameter.name, parameter.type, parameter.default) for parameter in sample.parameters] == [
        ("steps", "integer", 4),
        ("scale", "float", 1.0),
        ("greedy", "boolean", False),
        ("order", "choice", "up"),
    ]
    assert str(sample.inputs[0].tensor) == "int64[]"
    assert (sample.inputs[0].tensor.maximum, sample.outputs[1].maximum) == (3.0, None)
    assert [str(output) for output in sample.outputs] == ["uint8[8, 6]", "int64[]"]
    assert model.quality[0].standard_error == 0.01
    assert model.quality[0].reference_value is None
    assert model.provenance.created.year == 2023
    assert client.model("counter", version="1").is_default is False
    with pytest.raises(ModelNotFound):
        client.model("counter", version="4")


def test_models_are_listed_over_pages(server: FakeServer, client: Client) -> None:
    server.service.page_size = 1
    assert [(model.name, model.version) for model in client.models()] == [
        ("counter", "2"),
        ("counter", "1"),
        ("speaker", "1"),
    ]


def test_server_info_has_limits(client: Client) -> None:
    info = client.server_info()
    assert (info.version, info.device, info.max_batch_rows) == ("9.9", "abacus", 4)
