"""HTML pages: one self-contained page for each artifact, and an index.

A page shows the manifest, the training curve and the pictures of the artifact, and sections that its graphs
compute. It does not depend on the family. The HTML is in templates/.
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
from export.report import baselines, charts, snippets
from export.report.loaded_artifact import LoadedArtifact
from export.report.sections import SECTIONS, Section
from export.report.sections.scores import NEGATED_KINDS
from samovar.operations import program_name
from samovar.v1 import manifest_pb2

INDEX = "index.html"
TRAINING_CURVE = "training.json"
# Start of the names of figures that are the mean of negative scores.
_NEGATIVE_SCORE = "negative log"


@dataclass(frozen=True)
class Page:
    """Page of an artifact, as the index lists it."""

    file: str
    manifest: manifest_pb2.Manifest
    thumbnail: Markup

    @property
    def operations(self) -> list[str]:
        """Names of the programs."""
        return [program_name(program.operation, program.variant) for program in self.manifest.programs]


@dataclass(frozen=True)
class LeaderboardEntry:
    """Line of a leaderboard."""

    model: str
    value: str
    kind: str
    source: str
    note: str = ""
    is_own: bool = False


@dataclass(frozen=True)
class Leaderboard:
    """Figures of an artifact among baselines of the same metric, the best last."""

    name: str
    unit: str
    entries: tuple[LeaderboardEntry, ...]


class DatasetIndex:
    """Available datasets, by the SHA-256 of their training rows.

    Args:
        datasets: datasets in addition to the built-in ones, which are loaded when they are needed.
    """

    def __init__(self, datasets: Sequence[Dataset] = ()) -> None:
        self._by_sha256 = {dataset.sha256: dataset for dataset in datasets}

    def find_test_rows(self, provenance: manifest_pb2.Provenance) -> Split | None:
        """Return the test rows of the dataset of an artifact; None if the dataset is not available."""
        if provenance.dataset_sha256 not in self._by_sha256 and provenance.dataset in DATASETS:
            try:
                loaded = DATASETS[provenance.dataset]()
            except DataError:
                return None
            self._by_sha256[loaded.sha256] = loaded
        dataset = self._by_sha256.get(provenance.dataset_sha256)
        return dataset.test if dataset else None


def artifacts(models: Path, names: Sequence[str] = ()) -> list[Path]:
    """Return the artifact directories of all versions of the models.

    Args:
        models: directory of models.
        names: models to include; all if it is empty.

    Raises:
        ArtifactError: There are no artifacts, or there is no model of this name.
    """
    known = sorted(path.name for path in models.iterdir() if reader.versions(path)) if models.is_dir() else []
    if not known:
        raise reader.ArtifactError(f"{models}: no artifacts; make some: python -m export train-starters")
    for name in names:
        if name not in known:
            raise reader.ArtifactError(
                f"{models}: unknown model {name!r}; expected one of: {', '.join(known)}"
            )
    return [
        models / name / str(version) for name in names or known for version in reader.versions(models / name)
    ]


def write(directories: Sequence[Path], out: Path, datasets: DatasetIndex, models: Path) -> list[Page]:
    """Write the page of each artifact and the index, with a progress bar.

    Args:
        directories: artifact directories.
        out: output directory; it is created if it does not exist.
        datasets: source of the test rows.
        models: directory of models, which the index names.

    Returns:
        The pages, in the order of `directories`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(directories) * len(SECTIONS), unit="section", dynamic_ncols=True) as bar:
        pages = [_write_page(directory, out, datasets, bar) for directory in directories]
    environment = _environment()
    (out / INDEX).write_text(environment.get_template(INDEX).render(pages=pages, models=models), "utf-8")
    return pages


def _write_page(directory: Path, out: Path, datasets: DatasetIndex, bar: "tqdm[Never]") -> Page:
    manifest = reader.read(directory)
    bar.set_description(f"  {manifest.name} {manifest.version}")
    format = _select_format(manifest)
    test = datasets.find_test_rows(manifest.provenance)
    artifact = LoadedArtifact(reader.load(directory, manifest, format), test)
    sections = list(_make_sections(artifact, bar))
    page = Page(f"{manifest.name}-{manifest.version}.html", manifest, _select_thumbnail(sections))
    template = _environment().get_template("artifact.html")
    html = template.render(
        manifest=manifest,
        programs=artifact.programs,
        is_unchanged=reader.checksum_matches(directory),
        properties=_properties(directory, manifest),
        settings=_settings(manifest.provenance),
        format=format,
        has_test=test is not None,
        sections=sections,
        leaderboards=list(_leaderboards(manifest)),
        curve=_loss_curve(directory),
        pictures=_pictures(directory),
    )
    (out / page.file).write_text(html, "utf-8")
    return page


def _select_format(manifest: manifest_pb2.Manifest) -> str:
    """Return the first format of FORMATS that every graph has a file in."""
    common = verify.common_formats(manifest)
    if not common:
        raise reader.ArtifactError(
            f"{manifest.name}: its graphs have no format in common; export it again: python -m export train"
        )
    return min(common, key=FORMATS.index)


def _make_sections(artifact: LoadedArtifact, bar: "tqdm[Never]") -> Iterator[Section]:
    for make_sections in SECTIONS:
        yield from make_sections(artifact)
        bar.update()


def _select_thumbnail(sections: Sequence[Section]) -> Markup:
    """Return the figure of the samples, else that of the last section, else nothing."""
    samples = [section.figure for section in sections if section.title == "Samples"]
    return next(iter([*samples, *(section.figure for section in reversed(sections))]), Markup())


def _properties(directory: Path, manifest: manifest_pb2.Manifest) -> dict[str, str]:
    provenance, row = manifest.provenance, manifest.data_spec.tensor
    formats = dict.fromkeys(file.format for graph in manifest.graphs for file in graph.files)
    properties = {
        "artifact SHA-256": reader.sha256((directory / reader.MANIFEST).read_bytes()),
        "family": manifest.family,
        "row": ", ".join(filter(None, (snippets.format_tensor(row), row.doc))),
        "classes": ", ".join(manifest.data_spec.class_labels),
        "created": f"{provenance.created.ToDatetime():%Y-%m-%d %H:%M} UTC",
        "dataset": provenance.dataset,
        "dataset SHA-256": provenance.dataset_sha256,
        "preset": provenance.settings.get("preset", ""),
        "seed": str(provenance.seed) if provenance.dataset else "",
        "training": f"{provenance.training_seconds:g} s on {provenance.device}" if provenance.device else "",
        "formats": ", ".join(formats),
    }
    return {name: value for name, value in properties.items() if value}


def _settings(provenance: manifest_pb2.Provenance) -> dict[str, str]:
    return dict(sorted(provenance.settings.items())) | dict(sorted(provenance.library_versions.items()))


def _leaderboards(manifest: manifest_pb2.Manifest) -> Iterator[Leaderboard]:
    for table in baselines.find_tables(manifest.provenance):
        own = [quality for quality in manifest.quality if table.is_comparable(quality)]
        if own:
            entries = [
                *((baseline.value, _baseline_entry(baseline)) for baseline in table.baselines),
                *((quality.value, _own_entry(quality, manifest)) for quality in own),
            ]
            is_higher_better = table.name == "accuracy"
            entries.sort(key=lambda pair: pair[0], reverse=not is_higher_better)
            yield Leaderboard(table.name, table.unit, tuple(entry for _, entry in entries))


def _baseline_entry(baseline: baselines.Baseline) -> LeaderboardEntry:
    error = "" if baseline.standard_error is None else f" ± {baseline.standard_error:.3f}"
    value = f"{baseline.value:.3f}{error}"
    return LeaderboardEntry(baseline.model, value, baseline.kind, baseline.source, baseline.note)


def _own_entry(quality: manifest_pb2.Quality, manifest: manifest_pb2.Manifest) -> LeaderboardEntry:
    detail = quality.name.partition(", ")[2]
    model = f"{manifest.name}, {detail}" if detail else manifest.name
    value, kind = formatting.format_value(quality), _quality_kind(quality, manifest)
    return LeaderboardEntry(model, value, kind, "this artifact", is_own=True)


def _loss_curve(directory: Path) -> Markup | None:
    path = directory / TRAINING_CURVE
    recorded = json.loads(path.read_text()) if path.is_file() else {}
    points = recorded.get("curve", [])
    if len(points) < 2:
        return None
    losses = {
        "training": [point["training_loss"] for point in points],
        "validation": [point["validation_loss"] for point in points],
    }
    return charts.loss_curve([point["step"] for point in points], losses, recorded["best_step"], "Loss")


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
        "format_quality": formatting.format_quality,
        "format_value": formatting.format_value,
        "quality_kind": _quality_kind,
        "format_score": _format_score,
        "format_steps": snippets.format_steps,
        "format_parameter": snippets.format_parameter,
        "format_tensor": snippets.format_tensor,
        "shell_command": snippets.shell_command,
        "python_call": snippets.python_call,
    }
    return environment


def _quality_kind(quality: manifest_pb2.Quality, manifest: manifest_pb2.Manifest) -> str:
    """Return the kind of a figure: as its doc states it, else the kind of the only kind of scores."""
    stated = [kind for kind in NEGATED_KINDS.values() if kind.capitalize() in quality.doc]
    if stated:
        return stated[0]
    if not quality.name.startswith(_NEGATIVE_SCORE):
        return "measured"
    programs = [program for program in manifest.programs if program.operation == "score"]
    kinds = {NEGATED_KINDS[program.score.kind] for program in programs}
    return kinds.pop() if len(kinds) == 1 else "not stated"


def _format_score(program: manifest_pb2.Program) -> str:
    kind = manifest_pb2.Score.Kind.Name(program.score.kind).removeprefix("KIND_").lower().replace("_", " ")
    return f"{kind}, {program.score.dimensions} dimensions, {program.score.coordinate_space}"
