"""The script that exercises the table of operations, over every family, and over models that do not pass."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor, nn

from export.artifacts import golden, writer
from export.graphs import program
from tests.support.live_server import RunningServer, serving
from tests.support.run_example import run_conformance

# Of the table of operations, a line for each cell that no other test here would miss.
CELLS = (
    r"digits-cnn +classify +top_k=3 ",
    r"digits-vae +sample +temperature=0\.5 ",
    r"digits-vae +encode\+decode +interpolate rows by slerp .* change",
    r"digits-vae +encode\+decode +edit rows by an attribute vector .* moved",
    r"digits-vae +sample:inpaint +given every other element ",
    r"digits-vae +score +draws=\d+ .* lower bound ",
    r"digits-gan +sample +with latent\+label ",
    r"digits-gan +sample +truncation=0\.5 ",
    r"digits-gan +decode +interpolate draws by slerp .* change",
    r"digits-gan +decode +edit draws by a direction .* moved",
    r"digits-gan +score +refused: .* a GAN has no likelihood",
    r"digits-realnvp +encode\+decode +interpolate rows by lerp ",
    r"digits-realnvp +encode\+decode +edit rows by an attribute vector ",
    r"digits-pixelcnn +sample +given a raster prefix ",
    r"digits-ebm +sample:langevin +noise_scale=0\.5 ",
    r"digits-ebm +sample +step_size=0\.002",
    r"digits-ebm +sample +start=given, with image ",
    r"digits-diffusion +sample +eta=0\.5 .*heeded beside sampler=ddim",
    r"digits-diffusion +sample:guided +guidance=1 ",
    r"digits-diffusion +sample:edit +strength=0\.255 ",
    r"digits-diffusion +encode\+decode +interpolate rows by slerp .* change",
    r"digits-diffusion +sample +\d+ requests at the same time .* with the bytes they have alone",
    r"text-lstm +sample +top_p=0 for any seed .* same words",
    r"text-lstm +sample +stop at a word .* same words",
    r"text-lstm +sample +stream token by token .* \d+ pieces",
    r"all models +all operations +\d+ requests at the same time .* with the bytes they have alone",
)


@pytest.fixture
def server(default_server: RunningServer) -> RunningServer:
    """The real server, instead of the fake one of the other client tests."""
    return default_server


def test_every_cell_of_the_table_of_operations_is_exercised(server: RunningServer) -> None:
    said = run_conformance(server, "--steps", 12).stdout
    missing = [cell for cell in CELLS if not re.search(f"^{cell}", said, re.MULTILINE)]
    assert not missing, said
    assert "FAILED" not in said
    found = re.search(r"^(\d+) of \1 answers right, (\d+) of \2 refusals, \d+ models$", said, re.MULTILINE)
    assert found, said


class IgnoresParameter(nn.Module):
    """What changes nothing by its setting."""

    def forward(self, noise: Tensor, scale: Tensor) -> Tensor:
        return noise + 0 * scale[:, None]


@pytest.fixture(scope="module")
def odd(models_of: Callable[..., Path]) -> Iterator[RunningServer]:
    """A server with an untrained writer of music, and a model that heeds no setting and gives no reasons."""
    models = models_of("pitches-lstm", formats=("onnx",))
    point = program.TensorSpec("point", shape=(2,), doc="a point")
    sample = program.Program(
        "sample",
        IgnoresParameter().eval(),
        (point,),
        "the noise",
        parameters=(program.Parameter("scale", "float", 1.0, 0.0, 2.0, doc="of nothing"),),
        noise=(program.Noise("noise", "normal", (2,), 0),),
    )
    heedless = writer.Model(
        name="heedless",
        family="toy",
        description="noise",
        data_spec=program.DataSpec("vector", point),
        programs=(sample,),
        examples=(golden.Example("sample"),),
    )
    writer.write(heedless, models / heedless.name / "1")
    with serving(models) as running:
        yield running


def test_music_is_played(odd: RunningServer) -> None:
    said = run_conformance(odd, "pitches-lstm").stdout
    assert re.search(r"^pitches-lstm +sample +MIDI bytes .* format 1$", said, re.MULTILINE), said


def test_what_is_not_heeded_and_not_explained_fails(odd: RunningServer) -> None:
    ended = run_conformance(odd, "heedless")
    assert ended.returncode == 1
    assert "FAILED: scale makes no difference in 1 ways to ask" in ended.stdout
    assert re.search(r"^heedless +score +FAILED, without a reason: ", ended.stdout, re.MULTILINE)
    assert "0 of 6 refusals" in ended.stdout
