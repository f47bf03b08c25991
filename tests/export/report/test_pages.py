"""Report pages: true to their artifact, beside comparable figures only, and sufficient to themselves."""

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import custom_model, pipeline
from export.__main__ import main
from export.artifacts import reader
from export.datasets import chorales, loading
from export.families import FAMILIES
from export.probability import importance_weighting
from export.report import baselines, charts, pages, sections, snippets
from samovar.v1 import manifest_pb2

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SHARED = (
    *("digits-vae", "digits-pixelcnn", "digits-gan", "digits-diffusion", "digits-realnvp", "digits-ebm"),
    "text-lstm",
)
_VOID = {"meta", "img", "br", "path", "use", "input"}


class Document(HTMLParser):
    """A page taken apart; an element that is closed by another's end is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.html = path, path.read_text()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(self.html)
        self.close()
        assert not self._open

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    @property
    def titles(self) -> list[str]:
        return re.findall(r"<h3>(.*?)</h3>", self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def shelf(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained artifacts, one that was trained and measured, and one of no family."""
    shelf = tmp_path_factory.mktemp("shelf")
    for name in SHARED:
        (shelf / name).symlink_to(models / name)
    family, digits = FAMILIES["mlp"].load(), loading.load("digits")
    pipeline.run(
        pipeline.TrainingJob(family, digits, shelf, preset="tiny", steps=20, formats=("torchscript",))
    )
    custom_model.write(EXAMPLES / "galaxy.py", shelf, formats=("torchscript",))
    return shelf


@pytest.fixture(scope="module")
def documents(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Document]:
    out = tmp_path_factory.mktemp("report") / "new"
    assert main(["report", "--models", str(shelf), "-o", str(out)]) == 0
    return {path.stem: Document(path) for path in out.iterdir()}


def test_every_artifact_has_a_page_and_its_digest(pages: dict[str, Document], shelf: Path) -> None:
    names = {"digits-mlp", "galaxy", *SHARED}
    assert set(pages) == {"index", *(f"{name}-1" for name in names)}
    for name in names:
        assert reader.sha256((shelf / name / "1" / "manifest.json").read_bytes()) in pages[f"{name}-1"].text


def test_pages_are_sufficient_to_themselves(pages: dict[str, Document]) -> None:
    for page in pages.values():
        assert not page.tags & {"script", "link", "iframe", "object"}
        assert not re.search(r"https?:|//\w", re.sub(r"base64,[^\"]*", "", page.html))
        assert len(page.ids) == len(set(page.ids))
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.ids
            elif not link.startswith("data:image/png;base64,"):
                assert (page.path.parent / link).is_file()


def test_the_index_leads_to_every_page(pages: dict[str, Document]) -> None:
    index = pages["index"]
    assert {link for link in index.links if link.endswith(".html")} == {f"{name}.html" for name in pages} - {
        "index.html"
    }


def test_every_figure_of_quality_is_there_with_all_that_it_is_read_beside(
    pages: dict[str, Document], shelf: Path
) -> None:
    page, figures = pages["digits-mlp-1"], reader.read(shelf / "digits-mlp" / "1").quality
    assert len(figures) == 4
    for figure in figures:
        value = f"{figure.value:.3f} ± {figure.standard_error:.3f}"
        assert f"{figure.name} {figure.doc} {value} {figure.unit}".strip() in page.text
    assert "three convolutions, 90,506 parameters 0.984 ± 0.006" in page.text
    assert {"Loss", "samples.png", "Calibration"} <= set(page.titles)


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("digits-vae", {"Samples", "Completed by sample:inpaint", "Reconstructions", "Between two"}),
        ("digits-pixelcnn", {"Completed by sample", "Distribution of the score", "Calibration"}),
        ("digits-gan", {"Samples", "Between two"}),
        (
            "digits-diffusion",
            {"Samples, guided", "Completed by sample:inpaint", "Changed by sample:edit", "Between two"},
        ),
        ("digits-realnvp", {"Samples", "Reconstructions", "Between two", "Distribution of the score"}),
        ("digits-ebm", {"Samples, langevin", "Completed by sample", "Distribution of the score"}),
        ("text-lstm", {"Test rows", "Samples", "Distribution of the score"}),
        ("galaxy", {"Samples", "Between two", "Density", "Distribution of the score"}),
    ],
)
def test_what_a_model_can_do_is_shown(pages: dict[str, Document], name: str, titles: set[str]) -> None:
    assert titles <= set(pages[f"{name}-1"].titles)


def test_a_density_in_closed_form_adds_up(pages: dict[str, Document]) -> None:
    mass = re.search(r"By score, exact. It adds up to ([\d.]+)", pages["galaxy-1"].text)
    assert mass is not None
    assert 0.98 < float(mass[1]) < 1.01


def test_programs_are_told_with_their_settings_and_lines_to_copy(pages: dict[str, Document]) -> None:
    text = pages["digits-vae-1"].text
    for told in (
        "samovar sample digits-vae --method inpaint -n 16 --seed 7 --input image=image.npy",
        'client.score("digits-vae", image)',
        'inputs={"image": image, "known": known}, method="inpaint")',
        "parameter temperature 0..2, else 1 standard deviation of the latents",
        "pixels mean | draw, else draw",
        f"Steps: draws / {importance_weighting.DRAWS_PER_STEP}.",
        "lower bound, 64 dimensions, integers 0..16",
        "it has learned no labels",
    ):
        assert told in text


def test_where_the_data_is_not_at_hand_the_page_says_so(pages: dict[str, Document]) -> None:
    assert "there are no test rows here" in pages["galaxy-1"].text
    assert "Test rows" not in pages["galaxy-1"].titles
    assert "there are no test rows here" not in pages["digits-vae-1"].text


def test_a_manifest_that_was_changed_is_told_of(shelf: Path, tmp_path: Path) -> None:
    changed = tmp_path / "models" / "galaxy" / "1"
    changed.mkdir(parents=True)
    for path in (shelf / "galaxy" / "1").iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps({**manifest, "description": "<b>Bold & new</b>"}))
    pages.write([changed], tmp_path, pages.DatasetIndex(), changed.parent)
    page = Document(tmp_path / "galaxy-1.html")
    assert "The manifest is not the one that was sealed" in page.text
    assert "<b>Bold & new</b>" in page.text
    assert "<b>Bold" not in page.html


def test_a_name_that_there_is_not_is_one_line(shelf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nothing", "--models", str(shelf)]) == 1
    assert "digits-realnvp, digits-vae, galaxy, text-lstm; got 'nothing'" in capsys.readouterr().err


def test_no_artifacts_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--models", str(tmp_path)]) == 1
    assert "python -m export starter makes some" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_anchors_are_found_by_the_data_itself(name: str) -> None:
    known = loading.load(name)
    assert baselines.tables(manifest_pb2.Provenance(dataset="another name", dataset_sha256=known.sha256))
    assert not baselines.tables(manifest_pb2.Provenance(dataset=name, dataset_sha256="0" * 64))


def test_only_figures_of_one_measure_and_unit_are_read_beside_each_other() -> None:
    made = manifest_pb2.Provenance(dataset_sha256=loading.load("digits").sha256)
    of_integers = manifest_pb2.Quality(name="negative log-likelihood, IW-500", unit="bits/dim")
    of_noisy_images = manifest_pb2.Quality(name="negative log-density", unit="nats")
    distance = manifest_pb2.Quality(name="FD(our-cnn)")
    found = [
        [table.name for table in baselines.tables(made) if table.suits(figure)]
        for figure in (of_integers, of_noisy_images, distance)
    ]
    assert found == [["negative log-likelihood"], [], []]


@pytest.mark.parametrize(
    ("name", "doc", "kinds", "expected"),
    [
        ("negative log-density", "Mean over 20 test rows.", ["EXACT"], "exact"),
        ("negative log-likelihood, IW-1", "Upper bound, 20 rows.", ["LOWER_BOUND"], "upper bound"),
        ("negative log-likelihood, ODE", "Estimate.", ["LOWER_BOUND", "ESTIMATE"], "estimate"),
        ("negative log-likelihood", "Of 20 rows.", ["LOWER_BOUND", "ESTIMATE"], "not stated"),
        ("accuracy", "Of 20 rows.", ["EXACT"], "measured"),
    ],
)
def test_a_figure_says_of_what_kind_it_is(name: str, doc: str, kinds: list[str], expected: str) -> None:
    scores = [manifest_pb2.Score(kind=manifest_pb2.Score.Kind.Value(f"KIND_{kind}")) for kind in kinds]
    programs = [manifest_pb2.Program(operation="score", score=score) for score in scores]
    figure = manifest_pb2.Quality(name=name, doc=doc)
    assert pages._kind(figure, manifest_pb2.Manifest(programs=programs)) == expected


@pytest.mark.parametrize(
    ("kind", "drawn", "caption"),
    [
        ("EXACT", False, "By score, exact."),
        ("LOWER_BOUND", False, "By score, lower bound."),
        ("EXACT", True, None),
        ("UNNORMALIZED", False, None),
    ],
)
def test_a_density_is_drawn_of_what_is_one(shelf: Path, kind: str, drawn: bool, caption: str | None) -> None:
    manifest = reader.read(shelf / "galaxy" / "1")
    score = next(each for each in manifest.programs if each.operation == "score")
    score.score.kind = manifest_pb2.Score.Kind.Value(f"KIND_{kind}")
    if drawn:
        score.noise.add()
    subject = sections.LoadedArtifact(reader.load(shelf / "galaxy" / "1", manifest, "torchscript"), None)
    captions = [each.caption for each in sections._density(subject)]
    assert [each.partition(".")[0] + "." for each in captions] == ([caption] if caption else [])


@pytest.mark.parametrize(("classes", "missing"), [(10, 4), (3, 0), (120, 7), (15, 14)])
def test_test_rows_are_shown_class_by_class(classes: int, missing: int) -> None:
    """Of a set where a class has no test rows; a row tells its class."""
    value = manifest_pb2.DataSpec(
        kind=manifest_pb2.DataSpec.KIND_IMAGE, class_labels=[str(label) for label in range(classes)]
    )
    labels = np.repeat(np.delete(np.arange(classes), missing), 40)
    part = sections._by_class(loading.Split(labels.reshape(-1, 1, 1), labels), value)
    assert len(part) == min(100, 40 * (classes - 1))
    np.testing.assert_array_equal(part.rows[:, 0, 0], part.labels)
    turn = [label for label in range(classes) if label != missing]
    np.testing.assert_array_equal(part.labels, np.resize(turn, len(part)))


@pytest.mark.parametrize(
    ("vocabulary", "ending"), [(chorales.VOCABULARY, "mid"), (("", "a"), "txt"), ((), "png")]
)
def test_lines_to_copy_name_a_file_that_suits(vocabulary: tuple[str, ...], ending: str) -> None:
    kind = manifest_pb2.DataSpec.KIND_TOKENS if vocabulary else manifest_pb2.DataSpec.KIND_IMAGE
    value = manifest_pb2.DataSpec(kind=kind, vocabulary=vocabulary)
    manifest, program = (
        manifest_pb2.Manifest(name="m", data_spec=value),
        manifest_pb2.Program(operation="sample"),
    )
    assert snippets.command(program, manifest).endswith(f"-o m.{ending}")


def test_ways_begin_and_end_at_their_ends() -> None:
    a, b = np.random.default_rng(0).standard_normal((2, 4, 3, 5))
    for walk in (sections._line, sections._arc):
        way = walk(a, b)
        assert way.shape == (4, sections.COLUMNS, 3, 5)
        np.testing.assert_allclose(way[:, 0], a, atol=1e-5)
        np.testing.assert_allclose(way[:, -1], b, atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [((), "LA"), ((1,), "LA"), ((3,), "RGB")])
def test_images_are_tiled_in_ink_or_in_their_colours(channels: tuple[int, ...], mode: str) -> None:
    images = np.zeros((4, 5, 6, *channels))
    images[3] = 1
    drawn = charts.tiles(images, 2, "Two & two")
    assert 'alt="Two &amp; two"' in drawn
    encoded = re.search(r"base64,([^\"]*)", drawn)
    assert encoded is not None
    with Image.open(io.BytesIO(base64.b64decode(encoded[1]))) as picture:
        assert (picture.mode, picture.size) == (mode, (2 * 7, 2 * 6))
        pixels = np.asarray(picture)[..., -1]
    assert (pixels[6:11, 7:13] == 255).all()
    assert (pixels[:5, :6] == 0).all()


def test_a_piano_roll_has_a_bar_for_every_note() -> None:
    """Two voices hold their notes, then one moves: three bars."""
    words = ["60", "rest", "rest", "48", "hold", "hold", "hold", "hold", "62", "hold", "hold", "hold", "end"]
    tokens = np.zeros((1, chorales.CONTEXT), np.uint8)
    tokens[0, : len(words)] = [chorales.VOCABULARY.index(word) for word in words]
    sounding = chorales.piano_roll(tokens)[0][:, :3]
    assert list(_bars(sounding)) == [(62, 2, 1), (60, 0, 2), (48, 0, 3)]
    drawn = charts.roll(sounding, chorales.LOWEST, "A <piece>")
    assert 'aria-label="A &lt;piece&gt;"' in drawn
    assert "C4" in drawn


def _bars(sounding: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for line, frames in enumerate(sounding):
        for start, length in charts._runs(frames):
            yield chorales.HIGHEST - line, int(start), math.ceil(length)
