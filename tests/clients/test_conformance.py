"""Tests of the conformance suite, on every family and on models that fail it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from export.artifacts import golden, writer
from export.graphs import program
from tests.support.live_server import RunningServer, serving
from tests.support.run_example import run_conformance

# Lines that the suite must print: one for each kind of check.
EXPECTED_LINES = (
    r"digits-cnn +classify +top_k=3 ",
    r"digits-vae +sample +temperature=0\.5 ",
    r"digits-vae +encode\+decode +interpolate rows by slerp .* of elements change",
    r"digits-vae +encode\+decode +edit rows by an attribute vector .* of elements change",
    r"digits-vae +sample:inpaint +known every other element ",
    r"digits-vae +score +draws=\d+ .* lower bound ",
    r"digits-gan +sample +with latent\+label ",
    r"digits-gan +sample +truncation=0\.5 ",
    r"digits-gan +decode +interpolate latents by slerp .* of elements change",
    r"digits-gan +decode +edit latents by a direction .* of elements change",
    r"digits-gan +score +rejected: .* a GAN has no likelihood",
    r"digits-realnvp +encode\+decode +interpolate rows by lerp ",
    r"digits-realnvp +encode\+decode +edit rows by an attribute vector ",
    r"digits-pixelcnn +sample +known raster prefix ",
    r"digits-ebm +sample:langevin +noise_scale=0\.5 ",
    r"digits-ebm +sample +step_size=0\.002",
    r"digits-ebm +sample +start=given, with image ",
    r"digits-diffusion +sample +eta=0\.5 .*has an effect with sampler=ddim",
    r"digits-diffusion +sample:guided +guidance=1 ",
    r"digits-diffusion +sample:edit +strength=0\.255 ",
    r"digits-diffusion +encode\+decode +interpolate rows by slerp .* of elements change",
    r"digits-diffusion +sample +\d+ concurrent requests .* bitwise equal to single requests",
    r"text-lstm +sample +top_p=0 with two seeds .* equal text",
    r"text-lstm +sample +stop at a token .* equal text",
    r"text-lstm +sample +stream token by token .* \d+ chunks",
    r"all models +all operations +\d+ concurrent requests .* bitwise equal to single requests",
)


@pytest.fixture
def server(default_server: RunningServer) -> RunningServer:
    """Return a real server in place of the fake one of the other client tests."""
    return default_server


def test_conformance_suite_checks_every_operation_of_every_family(server: RunningServer) -> None:
    output = run_conformance(server, "--steps", 12).stdout
    missing = [line for line in EXPECTED_LINES if not re.search(f"^{line}", output, re.MULTILINE)]
    assert not missing, output
    assert "FAILED" not in output
    summary = r"^(\d+) of \1 answers correct, (\d+) of \2 rejections, \d+ models$"
    assert re.search(summary, output, re.MULTILINE), output


class IgnoresParameter(nn.Module):
    """A program whose parameter has no effect."""

    def forward(self, noise: Tensor, scale: Tensor) -> Tensor:
        return noise + 0 * scale[:, None]


@pytest.fixture(scope="module")
def edge_case_server(models_of: Callable[..., Path]) -> Iterator[RunningServer]:
    """Return a server with an untrained model of music, and a model that violates the contract."""
    models = models_of("pitches-lstm", formats=("onnx",))
    point = program.TensorSpec("point", shape=(2,), doc="a point")
    sample = program.Program(
        "sample",
        IgnoresParameter().eval(),
        (point,),
        "the noise",
        parameters=(program.Parameter("scale", "float", 1.0, 0.0, 2.0, doc="without effect"),),
        noise=(program.Noise("noise", "normal", (2,), 0),),
    )
    model = writer.Model(
        name="ignores-scale",
        family="toy",
        description="noise",
        data_spec=program.DataSpec("vector", point),
        programs=(sample,),
        examples=(golden.Example("sample"),),
    )
    writer.write(model, models / model.name / "1", formats=("onnx",))
    with serving(models) as server:
        yield server


def test_conformance_suite_checks_midi_of_music_model(edge_case_server: RunningServer) -> None:
    output = run_conformance(edge_case_server, "pitches-lstm").stdout
    assert re.search(r"^pitches-lstm +sample +MIDI file .* format 1$", output, re.MULTILINE), output


def test_conformance_suite_fails_ignored_parameter_and_missing_reason(
    edge_case_server: RunningServer,
) -> None:
    completed = run_conformance(edge_case_server, "ignores-scale")
    assert completed.returncode == 1
    assert "FAILED: scale has no effect in 1 requests" in completed.stdout
    assert re.search(
        r"^ignores-scale +score +FAILED: expected a reason; got: ", completed.stdout, re.MULTILINE
    )
    assert "0 of 6 rejections" in completed.stdout
