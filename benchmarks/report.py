"""Results of benchmarks as text, as CSV files, and as a Markdown page with plots."""

import csv
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

LIBRARIES = ("torch", "onnxruntime", "grpcio", "protobuf", "numpy")
PAGE = "benchmarks.md"
# Directory of CSV files and plots, next to the page.
FILES = "benchmarks"


@dataclass(frozen=True)
class Table:
    """Measurements as text.

    Attributes:
        name: file name of the CSV, without its extension.
        title: heading.
        columns: heading of each column.
        rows: cells.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def cell(self, column: str, *key: str) -> str:
        """Return the cell of a column in the row that starts with the cells `key`; "" without that row."""
        index = list(self.columns).index(column)
        return next((row[index] for row in self.rows if tuple(row[: len(key)]) == key), "")


class Result(NamedTuple):
    """Deciding figure of a benchmark, with its target if there is one."""

    metric: str
    measured: str
    target: str = ""


@dataclass(frozen=True)
class Line:
    """Line of a plot."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """Lines on common axes; `name` is the file name without its extension."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    is_log_x: bool = True
    is_log_y: bool = True


@dataclass(frozen=True)
class Section:
    """Result of one benchmark: how it measures, the deciding figures, all tables, and plots."""

    title: str
    text: str
    results: Sequence[Result] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def plain_section(section: Section) -> str:
    """Return the text and the tables of a section for a terminal."""
    return "\n\n".join([f"\n== {section.title} ==", section.text, *map(plain_table, section.tables)])


def plain_table(table: Table) -> str:
    """Return a table with aligned columns."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([table.title, *(line.rstrip() for line in text)])


def write(sections: Sequence[Section], environment: Sequence[str], directory: Path) -> None:
    """Write the page, and its CSV files and plots in the directory `benchmarks` next to it."""
    files = directory / FILES
    files.mkdir(parents=True, exist_ok=True)
    for section in sections:
        for table in section.tables:
            write_csv(table, files)
        for plot in section.plots:
            draw(plot, files)
    (directory / PAGE).write_text(page(sections, environment))


def write_csv(table: Table, directory: Path) -> Path:
    """Write a table as a CSV file; return its path."""
    path = directory / f"{table.name}.csv"
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
    return path


def page(sections: Iterable[Section], environment: Sequence[str]) -> str:
    """Return the page in Markdown: the deciding figures of all sections, then each section."""
    sections = list(sections)
    parts = ["# Benchmarks", _INTRODUCTION, _results_table(sections), _METHOD]
    parts.append("\n".join(f"* {line}" for line in environment))
    for section in sections:
        parts += [f"## {section.title}", section.text]
        parts += [f"![{plot.title}]({FILES}/{plot.name}.svg)" for plot in section.plots]
        if section.tables:
            links = [f"* [{table.title}]({FILES}/{table.name}.csv)" for table in section.tables]
            parts.append("All figures:\n\n" + "\n".join(links))
    return "\n\n".join(parts) + "\n"


def _results_table(sections: Sequence[Section]) -> str:
    lines = ["| benchmark | figure | measured | target |", "| --- | --- | --- | --- |"]
    for section in sections:
        for result in section.results:
            cells = [cell.replace("|", "/") for cell in (section.title, *result)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_INTRODUCTION = """\
The figures that decide, and their targets. The sections below say how each is measured, and link to all
figures as CSV files."""

_METHOD = """\
`make bench` writes this page, the CSV files and the plots. `make bench QUICK=1` prints rough figures of a
part in about a minute and writes nothing. Servers and clients run in processes of their own. Sides of a
comparison are measured alternately in one run. A figure with a range is the median of the repeats with their
minimum and maximum; one without a range was measured once. A ratio is the median of the ratios of adjacent
measurements. Weights are random and networks have the size of the starter models: speed does not depend on
training.

This run:"""


def describe_machine() -> list[str]:
    """Return the processor, the load, the operating system and the library versions."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return [
        f"{_processor()}, {os.cpu_count()} CPUs, load average {os.getloadavg()[0]:.1f} at the start",
        f"Python {platform.python_version()}, {versions}",
        f"{platform.system()} {platform.release()}",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def draw(plot: Plot, directory: Path) -> Path:
    """Write a plot as an SVG file; return its path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for line in plot.lines:
        axes.plot(line.x, line.y, marker="o", markersize=3, label=line.label)
    axes.set(title=plot.title, xlabel=plot.x_label, ylabel=plot.y_label)
    axes.set_xscale("log" if plot.is_log_x else "linear")
    axes.set_yscale("log" if plot.is_log_y else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{plot.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path
