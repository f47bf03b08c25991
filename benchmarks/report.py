"""What a benchmark tells, on a terminal and as a page with plots. Knows no benchmark."""

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LIBRARIES = ("torch", "onnxruntime", "grpcio", "protobuf", "numpy")


@dataclass(frozen=True)
class Table:
    """A heading for each column, and cells as they are printed."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Line:
    """Points under one name."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Plot:
    """Lines over common axes; `name` is its file's."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    is_log_x: bool = True
    is_log_y: bool = True


@dataclass(frozen=True)
class Section:
    """One benchmark's answer: the question, how it was asked, tables and plots."""

    title: str
    text: str
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()


def plain(table: Table) -> str:
    """A table for a terminal, its columns aligned."""
    grid = [table.columns, *table.rows]
    widths = [max(len(row[column]) for row in grid) for column in range(len(table.columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in grid]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*([table.title] if table.title else []), *(line.rstrip() for line in lines)])


def markdown(table: Table) -> str:
    """A table for a page."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
    return f"**{table.title}**\n\n{body}" if table.title else body


def page(sections: Iterable[Section], facts: Sequence[str]) -> str:
    """The whole page; plots lie beside it in benchmarks/."""
    parts = ["# Benchmarks", _PREFACE, "\n".join(f"* {fact}" for fact in facts)]
    for section in sections:
        parts += [f"## {section.title}", section.text, *map(markdown, section.tables)]
        parts += [f"![{plot.title}](benchmarks/{plot.name}.svg)" for plot in section.plots]
    return "\n\n".join(parts) + "\n"


_PREFACE = """\
`make bench` makes this page; `make bench QUICK=1` prints rough figures of a part of it in about a minute
and writes nothing. Servers are processes of their own, and so are the callers. What is compared was
measured in turns within one run: a figure with a range is the median of its repeats with the least and the
most of them, one without was measured once; a ratio is of neighbours. Weights are random, networks as large
as the starter models: speed does not depend on what was learnt."""


def machine() -> list[str]:
    """Where and with what a run was made."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
    return [
        f"{_processor()}, {os.cpu_count()} CPUs in sight, load {os.getloadavg()[0]:.1f} when the run began",
        f"Python {platform.python_version()}, {versions}",
        f"{platform.system()} {platform.release()}",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def draw(plot: Plot, directory: Path) -> Path:
    """A plot as SVG."""
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
