"""Report pages: complete, self-contained HTML, and compared only with figures of the same data and metric."""

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
from export.report import baselines, charts, pages, snippets
from export.report.loaded_artifact import LoadedArtifact, select_by_class
from export.report.sections import base, interpolations, scores
from samovar.interpolation import lerp, slerp
from samovar.v1 import manifest_pb2

EXAMPLES = Path(__file__).parents[3] / "examples"
UNTRAINED = (
    *("digits-vae", "digits-pixelcnn", "digits-gan", "digits-diffusion", "digits-realnvp", "digits-ebm"),
    "text-lstm",
)
_VOID = {"meta", "img", "br", "path", "use", "input"}


class Document(HTMLParser):
    """Parsed page; an element with the end tag of another element is an error."""

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
def artifacts(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained artifacts of families, a trained and measured one, and a custom model."""
    directory = tmp_path_factory.mktemp("artifacts")
    for name in UNTRAINED:
        (directory / name).symlink_to(models / name)
    family, digits = FAMILIES["mlp"].load(), loading.load("digits")
    pipeline.run(
        pipeline.TrainingJob(family, digits, directory, preset="tiny", steps=20, formats=("torchscript",))
    )
    custom_model.write(EXAMPLES / "galaxy.py", directory, formats=("torchscript",))
    return directory


@pytest.fixture(scope="module")
def documents(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Document]:
    out = tmp_path_factory.mktemp("report") / "new"
    assert main(["report", "--models", str(artifacts), "-o", str(out)]) == 0
    return {path.stem: Document(path) for path in out.iterdir()}


def test_report_writes_page_with_digest_for_each_artifact(
    documents: dict[str, Document], artifacts: Path
) -> None:
    names = {"digits-mlp", "galaxy", *UNTRAINED}
    assert set(documents) == {"index", *(f"{name}-1" for name in names)}
    for name in names:
        digest = reader.sha256((artifacts / name / "1" / "manifest.json").read_bytes())
        assert digest in documents[f"{name}-1"].text


def test_pages_are_self_contained(documents: dict[str, Document]) -> None:
    for page in documents.values():
        assert not page.tags & {"script", "link", "iframe", "object"}
        assert not re.search(r"https?:|//\w", re.sub(r"base64,[^\"]*", "", page.html))
        assert len(page.ids) == len(set(page.ids))
        for link in page.links:
            if link.startswith("#"):
                assert link[1:] in page.ids
            elif not link.startswith("data:image/png;base64,"):
                assert (page.path.parent / link).is_file()


def test_index_links_to_all_pages(documents: dict[str, Document]) -> None:
    links = {link for link in documents["index"].links if link.endswith(".html")}
    assert links == {f"{name}.html" for name in documents} - {"index.html"}


def test_page_shows_quality_figures_and_baselines(documents: dict[str, Document], artifacts: Path) -> None:
    page, figures = documents["digits-mlp-1"], reader.read(artifacts / "digits-mlp" / "1").quality
    assert len(figures) == 4
    for figure in figures:
        value = f"{figure.value:.3f} ± {figure.standard_error:.3f}"
        assert f"{figure.name} {figure.doc} {value} {figure.unit}".strip() in page.text
    assert "three convolutions, 90,506 parameters 0.984 ± 0.006" in page.text
    assert {"Loss", "samples.png", "Calibration"} <= set(page.titles)


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("digits-vae", {"Samples", "Completed by sample:inpaint", "Reconstructions", "Interpolation"}),
        ("digits-pixelcnn", {"Completed by sample", "Distribution of the score", "Calibration"}),
        ("digits-gan", {"Samples", "Interpolation"}),
        (
            "digits-diffusion",
            {"Samples, guided", "Completed by sample:inpaint", "Edited by sample:edit", "Interpolation"},
        ),
        ("digits-realnvp", {"Samples", "Reconstructions", "Interpolation", "Distribution of the score"}),
        ("digits-ebm", {"Samples, langevin", "Completed by sample", "Distribution of the score"}),
        ("text-lstm", {"Test rows", "Samples", "Distribution of the score"}),
        ("galaxy", {"Samples", "Interpolation", "Density", "Distribution of the score"}),
    ],
)
def test_page_shows_section_for_each_operation(
    documents: dict[str, Document], name: str, titles: set[str]
) -> None:
    assert titles <= set(documents[f"{name}-1"].titles)


def test_density_section_integrates_to_one(documents: dict[str, Document]) -> None:
    mass = re.search(
        r"By score, exact\. The integral over the figure is (\d\.\d+)", documents["galaxy-1"].text
    )
    assert mass is not None
    assert 0.98 < float(mass[1]) < 1.01


def test_page_shows_programs_with_parameters_and_example_calls(documents: dict[str, Document]) -> None:
    text = documents["digits-vae-1"].text
    for expected in (
        "samovar sample digits-vae --variant inpaint -n 16 --seed 7 --input image=image.npy",
        'client.score("digits-vae", image)',
        'inputs={"image": image, "known": known}, variant="inpaint")',
        "parameter temperature 0..2, default 1 ",
        "pixels mean | draw, default draw",
        f"Steps: draws / {importance_weighting.DRAWS_PER_STEP}.",
        "lower bound, 64 dimensions, integers 0..16",
        FAMILIES["vae"].load().unsupported_operations["classify"],
    ):
        assert expected in text


def test_page_says_whether_dataset_is_available(documents: dict[str, Document]) -> None:
    assert "there are no test rows here" in documents["galaxy-1"].text
    assert "Test rows" not in documents["galaxy-1"].titles
    assert "there are no test rows here" not in documents["digits-vae-1"].text


def test_page_of_changed_manifest_shows_warning(artifacts: Path, tmp_path: Path) -> None:
    changed = tmp_path / "models" / "galaxy" / "1"
    changed.mkdir(parents=True)
    for path in (artifacts / "galaxy" / "1").iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((changed / "manifest.json").read_text())
    (changed / "manifest.json").write_text(json.dumps({**manifest, "description": "<b>Bold & new</b>"}))
    pages.write([changed], tmp_path, pages.DatasetIndex(), changed.parent)
    page = Document(tmp_path / "galaxy-1.html")
    assert "The manifest was changed after the export" in page.text
    assert "<b>Bold & new</b>" in page.text
    assert "<b>Bold" not in page.html


def test_report_of_unknown_model_lists_known_models(
    artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "nothing", "--models", str(artifacts)]) == 1
    error = capsys.readouterr().err
    assert "unknown model 'nothing'" in error
    assert "digits-realnvp, digits-vae, galaxy, text-lstm" in error


def test_report_without_artifacts_names_command_that_makes_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--models", str(tmp_path)]) == 1
    assert "make some: python -m export train-starters" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "moons"])
def test_find_tables_uses_digest_of_dataset(name: str) -> None:
    dataset = loading.load(name)
    assert baselines.find_tables(
        manifest_pb2.Provenance(dataset="another name", dataset_sha256=dataset.sha256)
    )
    assert not baselines.find_tables(manifest_pb2.Provenance(dataset=name, dataset_sha256="0" * 64))


def test_baselines_are_comparable_only_with_same_metric_and_unit() -> None:
    provenance = manifest_pb2.Provenance(dataset_sha256=loading.load("digits").sha256)
    of_integers = manifest_pb2.Quality(name="negative log-likelihood, IW-500", unit="bits/dim")
    of_noisy_images = manifest_pb2.Quality(name="negative log-density", unit="nats")
    distance = manifest_pb2.Quality(name="FD(our-cnn)")
    names = [
        [table.name for table in baselines.find_tables(provenance) if table.is_comparable(figure)]
        for figure in (of_integers, of_noisy_images, distance)
    ]
    assert names == [["negative log-likelihood"], [], []]


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
def test_quality_kind_is_stated_or_follows_from_scores(
    name: str, doc: str, kinds: list[str], expected: str
) -> None:
    scores = [manifest_pb2.Score(kind=manifest_pb2.Score.Kind.Value(f"KIND_{kind}")) for kind in kinds]
    programs = [manifest_pb2.Program(operation="score", score=score) for score in scores]
    figure = manifest_pb2.Quality(name=name, doc=doc)
    assert pages._quality_kind(figure, manifest_pb2.Manifest(programs=programs)) == expected


@pytest.mark.parametrize(
    ("kind", "has_noise", "caption"),
    [
        ("EXACT", False, "By score, exact."),
        ("LOWER_BOUND", False, "By score, lower bound."),
        ("EXACT", True, None),
        ("UNNORMALIZED", False, None),
    ],
)
def test_density_section_requires_normalized_score_without_noise(
    artifacts: Path, kind: str, has_noise: bool, caption: str | None
) -> None:
    manifest = reader.read(artifacts / "galaxy" / "1")
    program = next(program for program in manifest.programs if program.operation == "score")
    program.score.kind = manifest_pb2.Score.Kind.Value(f"KIND_{kind}")
    if has_noise:
        program.noise.add()
    artifact = LoadedArtifact(reader.load(artifacts / "galaxy" / "1", manifest, "torchscript"), None)
    captions = [section.caption for section in scores.density_sections(artifact)]
    assert [text.partition(".")[0] + "." for text in captions] == ([caption] if caption else [])


@pytest.mark.parametrize(("classes", "missing"), [(10, 4), (3, 0), (120, 7), (15, 14)])
def test_select_by_class_interleaves_classes(classes: int, missing: int) -> None:
    """One class has no test rows. The value of a row is its class."""
    data_spec = manifest_pb2.DataSpec(
        kind=manifest_pb2.DataSpec.KIND_IMAGE, class_labels=[str(label) for label in range(classes)]
    )
    labels = np.repeat(np.delete(np.arange(classes), missing), 40)
    selected = select_by_class(loading.Split(labels.reshape(-1, 1, 1), labels), data_spec)
    assert len(selected) == min(100, 40 * (classes - 1))
    np.testing.assert_array_equal(selected.rows[:, 0, 0], selected.labels)
    cycle = [label for label in range(classes) if label != missing]
    np.testing.assert_array_equal(selected.labels, np.resize(cycle, len(selected)))


@pytest.mark.parametrize(
    ("vocabulary", "extension"), [(chorales.VOCABULARY, "mid"), (("", "a"), "txt"), ((), "png")]
)
def test_shell_command_writes_file_type_of_data(vocabulary: tuple[str, ...], extension: str) -> None:
    kind = manifest_pb2.DataSpec.KIND_TOKENS if vocabulary else manifest_pb2.DataSpec.KIND_IMAGE
    data_spec = manifest_pb2.DataSpec(kind=kind, vocabulary=vocabulary)
    manifest = manifest_pb2.Manifest(name="m", data_spec=data_spec)
    program = manifest_pb2.Program(operation="sample")
    assert snippets.shell_command(program, manifest).endswith(f"-o m.{extension}")


def test_interpolate_pairs_starts_and_ends_at_given_latents() -> None:
    starts, ends = np.random.default_rng(0).standard_normal((2, 4, 3, 5))
    for interpolate in (lerp, slerp):
        paths = interpolations.interpolate_pairs(starts, ends, interpolate)
        assert paths.shape == (4, base.COLUMNS, 3, 5)
        np.testing.assert_allclose(paths[:, 0], starts, atol=1e-5)
        np.testing.assert_allclose(paths[:, -1], ends, atol=1e-5)


@pytest.mark.parametrize(("channels", "mode"), [((), "LA"), ((1,), "LA"), ((3,), "RGB")])
def test_image_grid_is_grayscale_with_opacity_or_rgb(channels: tuple[int, ...], mode: str) -> None:
    images = np.zeros((4, 5, 6, *channels))
    images[3] = 1
    markup = charts.image_grid(images, 2, "Two & two")
    assert 'alt="Two &amp; two"' in markup
    encoded = re.search(r"base64,([^\"]*)", markup)
    assert encoded is not None
    with Image.open(io.BytesIO(base64.b64decode(encoded[1]))) as image:
        assert (image.mode, image.size) == (mode, (2 * 7, 2 * 6))
        pixels = np.asarray(image)[..., -1]
    assert (pixels[6:11, 7:13] == 255).all()
    assert (pixels[:5, :6] == 0).all()


def test_piano_roll_has_bar_for_each_note() -> None:
    """Two voices hold their notes, then one changes its note: three bars."""
    words = ["60", "rest", "rest", "48", "hold", "hold", "hold", "hold", "62", "hold", "hold", "hold", "end"]
    tokens = np.zeros((1, chorales.CONTEXT), np.uint8)
    tokens[0, : len(words)] = [chorales.VOCABULARY.index(word) for word in words]
    is_sounding = chorales.piano_roll(tokens)[0][:, :3]
    assert list(_bars(is_sounding)) == [(62, 2, 1), (60, 0, 2), (48, 0, 3)]
    markup = charts.piano_roll(is_sounding, chorales.LOWEST, "A <piece>")
    assert 'aria-label="A &lt;piece&gt;"' in markup
    assert "C4" in markup


def _bars(is_sounding: np.ndarray) -> Iterator[tuple[int, int, int]]:
    for line, frames in enumerate(is_sounding):
        for start, length in charts._bars(frames):
            yield chorales.HIGHEST - line, int(start), math.ceil(length)
