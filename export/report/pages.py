"""Reports: a page of HTML for each artifact, which holds all that it shows, and an index of them.

A page is made of the manifest, of the training curve and the picture where the artifact has them, and of
exhibits that its own graphs compute. Knows no family; how a page looks is in templates/.
"""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Never

import jinja2
from markupsafe import Markup
from tqdm import tqdm

from export.artifacts import reader, verify
from export.datasets.loading import DATASETS, DataError, Dataset, Split
from export.evaluation import formatting
from export.graphs.formats import FORMATS
from export.graphs.program import program_name
from export.report import baselines, charts, snippets
from export.report.sections import EXHIBITS, NEGATED_KINDS, LoadedArtifact, Section
from samovar.v1 import manifest_pb2

INDEX = "index.html"
CURVE = "training.json"
_SCORED = "negative log"


@dataclass(frozen=True)
class Page:
    """A written page, as the index shows it."""

    file: str
    manifest: manifest_pb2.Manifest
    thumbnail: Markup

    @property
    def operations(self) -> list[str]:
        """The programs' names."""
        return [program_name(each.operation, each.variant) for each in self.manifest.programs]


@dataclass(frozen=True)
class Line:
    """A model among others."""

    model: str
    value: str
    kind: str
    source: str
    remark: str = ""
    is_own: bool = False


@dataclass(frozen=True)
class Leaderboard:
    """An artifact's figures among those of others, the best last."""

    name: str
    unit: str
    lines: tuple[Line, ...]


class DatasetIndex:
    """The data sets that are at hand, found by the digest of their training rows."""

    def __init__(self, others: Sequence[Dataset] = ()) -> None:
        self._known = {each.sha256: each for each in others}

    def test(self, provenance: manifest_pb2.Provenance) -> Split | None:
        """The test rows of the data that a model was made of; None where it is not at hand."""
        if provenance.dataset_sha256 not in self._known and provenance.dataset in DATASETS:
            try:
                found = DATASETS[provenance.dataset]()
            except DataError:
                return None
            self._known[found.sha256] = found
        known = self._known.get(provenance.dataset_sha256)
        return known.test if known else None


def artifacts(models: Path, names: Sequence[str] = ()) -> list[Path]:
    """The directories of all versions of all models, or of these; ArtifactError when there are none."""
    held = sorted(path.name for path in models.iterdir() if reader.versions(path)) if models.is_dir() else []
    if not held:
        raise reader.ArtifactError(f"{models}: expected artifacts; python -m export starter makes some")
    for name in names:
        if name not in held:
            raise reader.ArtifactError(f"expected models of {models}: {', '.join(held)}; got {name!r}")
    return [
        models / name / str(version) for name in names or held for version in reader.versions(models / name)
    ]


def write(directories: Sequence[Path], out: Path, library: DatasetIndex, models: Path) -> list[Page]:
    """Write the page of every artifact and the index under a progress bar; returns the pages."""
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(directories) * len(EXHIBITS), unit="exhibit", dynamic_ncols=True) as bar:
        pages = [_write_page(directory, out, library, bar) for directory in directories]
    environment = _environment()
    (out / INDEX).write_text(environment.get_template(INDEX).render(pages=pages, models=models), "utf-8")
    return pages


def _write_page(directory: Path, out: Path, library: DatasetIndex, bar: "tqdm[Never]") -> Page:
    manifest = reader.read(directory)
    bar.set_description(f"  {manifest.name} {manifest.version}")
    format = _format(manifest)
    test = library.test(manifest.provenance)
    subject = LoadedArtifact(reader.load(directory, manifest, format), test)
    exhibits = list(_shown(subject, bar))
    page = Page(f"{manifest.name}-{manifest.version}.html", manifest, _thumbnail(exhibits))
    template = _environment().get_template("artifact.html")
    html = template.render(
        manifest=manifest,
        programs=subject.programs,
        is_sealed=reader.checksum_matches(directory),
        facts=_facts(directory, manifest),
        settings=_settings(manifest.provenance),
        format=format,
        has_test=test is not None,
        exhibits=exhibits,
        boards=list(_boards(manifest)),
        curve=_curve(directory),
        pictures=_pictures(directory),
    )
    (out / page.file).write_text(html, "utf-8")
    return page


def _format(manifest: manifest_pb2.Manifest) -> str:
    """The first format that every graph has a file in."""
    common = verify.common_formats(manifest)
    if not common:
        raise reader.ArtifactError(f"{manifest.name}: expected a format that all of its graphs have")
    return min(common, key=FORMATS.index)


def _shown(subject: LoadedArtifact, bar: "tqdm[Never]") -> Iterator[Section]:
    for exhibit in EXHIBITS:
        yield from exhibit(subject)
        bar.update()


def _thumbnail(exhibits: Sequence[Section]) -> Markup:
    """What it makes, if it makes something; else what is told of it last."""
    samples = [each.figure for each in exhibits if each.title == "Samples"]
    return next(iter([*samples, *(each.figure for each in reversed(exhibits))]), Markup())


def _facts(directory: Path, manifest: manifest_pb2.Manifest) -> dict[str, str]:
    made = manifest.provenance
    facts = {
        "artifact": reader.sha256((directory / reader.MANIFEST).read_bytes()),
        "family": manifest.family,
        "a row": snippets.tensor(manifest.data_spec.tensor)
        + (f", {doc}" if (doc := manifest.data_spec.tensor.doc) else ""),
        "classes": ", ".join(manifest.data_spec.class_labels),
        "made": f"{made.created.ToDatetime():%Y-%m-%d %H:%M} UTC",
        "data": made.dataset,
        "data digest": made.dataset_sha256,
        "preset": made.settings.get("preset", ""),
        "seed": str(made.seed) if made.dataset else "",
        "training": f"{made.training_seconds:g} s on {made.device}" if made.device else "",
        "formats": ", ".join(dict.fromkeys(file.format for graph in manifest.graphs for file in graph.files)),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _settings(made: manifest_pb2.Provenance) -> dict[str, str]:
    return dict(sorted(made.settings.items())) | dict(sorted(made.library_versions.items()))


def _boards(manifest: manifest_pb2.Manifest) -> Iterator[Leaderboard]:
    for table in baselines.tables(manifest.provenance):
        own = [each for each in manifest.quality if table.suits(each)]
        if own:
            lines = [
                *(_ranked(anchor) for anchor in table.anchors),
                *((each.value, _own(each, manifest)) for each in own),
            ]
            ascending = table.name == "accuracy"
            lines.sort(key=lambda pair: pair[0], reverse=not ascending)
            yield Leaderboard(table.name, table.unit, tuple(line for _, line in lines))


def _ranked(anchor: baselines.Baseline) -> tuple[float, Line]:
    error = "" if anchor.error is None else f" ± {anchor.error:.3f}"
    value = f"{anchor.value:.3f}{error}"
    return anchor.value, Line(anchor.model, value, anchor.kind, anchor.source, anchor.remark)


def _own(figure: manifest_pb2.Quality, manifest: manifest_pb2.Manifest) -> Line:
    detail = figure.name.partition(", ")[2]
    model = f"{manifest.name}, {detail}" if detail else manifest.name
    return Line(model, _value(figure), _kind(figure, manifest), "this artifact", is_own=True)


def _curve(directory: Path) -> Markup | None:
    path = directory / CURVE
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    points = recorded.get("curve", [])
    if len(points) < 2:
        return None
    losses = {
        "training": [point["training_loss"] for point in points],
        "validation": [point["validation_loss"] for point in points],
    }
    return charts.curve([point["step"] for point in points], losses, recorded["best_step"], "Loss")


def _pictures(directory: Path) -> Mapping[str, Markup]:
    image = Markup('<img alt="{}" src="data:image/png;base64,{}">')
    return {
        path.name: image.format(path.name, base64.b64encode(path.read_bytes()).decode())
        for path in sorted(directory.glob("*.png"))
    }


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "line": formatting.line,
        "value": _value,
        "kind": _kind,
        "steps": snippets.steps,
        "score": _score,
        "bounds": snippets.bounds,
        "tensor": snippets.tensor,
        "command": snippets.command,
        "call": snippets.call,
    }
    return environment


def _value(figure: manifest_pb2.Quality) -> str:
    error = f" ± {figure.standard_error:.3f}" if figure.HasField("standard_error") else ""
    return f"{figure.value:.3f}{error}"


def _kind(figure: manifest_pb2.Quality, manifest: manifest_pb2.Manifest) -> str:
    """What the figure's doc says, else what the model's scores are, when it is the mean of one."""
    stated = [kind for kind in NEGATED_KINDS.values() if kind.capitalize() in figure.doc]
    scores = {NEGATED_KINDS[each.score.kind] for each in manifest.programs if each.operation == "score"}
    if stated:
        return stated[0]
    if not figure.name.startswith(_SCORED):
        return "measured"
    return scores.pop() if len(scores) == 1 else "not stated"


def _score(program: manifest_pb2.Program) -> str:
    kind = manifest_pb2.Score.Kind.Name(program.score.kind).removeprefix("KIND_").lower().replace("_", " ")
    return f"{kind}, {program.score.dimensions} dimensions, {program.score.coordinate_space}"
