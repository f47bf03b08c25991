"""Charts and pictures inside a page: SVG in the page's own inks, and PNG as data. Knows arrays and no model.

Inks are matplotlib's colours that stand for variables of the page's style sheet, so that a chart is
readable by day and by night; what is painted as pixels takes one copper that suits both.
"""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from export.evaluation import calibration
from export.evaluation.figures import Panel, grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = NDArray[Any]

INK, FAINT, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", ACCENT: "var(--accent)", SECOND: "var(--second)"}
_SERIES = (ACCENT, SECOND)
_COPPER = (0.78, 0.44, 0.22)
_GREY = "#888888"
_SIZE, _SQUARE, _LONG = (4.4, 3.0), (3.4, 3.4), (10.0, 2.4)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
_BINS = 30
_OCTAVE = 12


def tiles(images: NDArray[np.float64], columns: int, title: str) -> Markup:
    """Images [N, height, width] or [N, height, width, 1 or 3] of brightness 0..1, in rows of `columns`.

    Grey ones become ink, on whatever paper the page has.
    """
    from PIL import Image

    plain = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    bright = np.rint(255 * grid(Panel(title, plain, min(columns, len(plain))))).astype(np.uint8)
    if bright.ndim == 2:
        return _image(Image.fromarray(np.stack([np.zeros_like(bright), bright], -1)), "ink", title)
    return _image(Image.fromarray(bright), "colour", title)


def curve(steps: Sequence[int], losses: Mapping[str, Sequence[float]], best: int, title: str) -> Markup:
    """Losses by the number of steps; a line stands where the best was."""

    def paint(axes: "Axes") -> None:
        for (name, values), ink in zip(losses.items(), _SERIES, strict=False):
            axes.plot(steps, values, color=ink, label=name, marker="o", markersize=3)
        axes.axvline(best, color=FAINT, linestyle=":")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend(labelcolor=INK)

    return _draw(paint, title)


def histogram(series: Mapping[str, Rows], label: str, title: str) -> Markup:
    """How numbers [N] are distributed, every series over its own count, with a line at its mean."""
    every = np.concatenate(list(series.values()))
    low, high = np.quantile(every, (0.002, 0.998)).tolist()
    edges = np.linspace(low, high, _BINS + 1)

    def paint(axes: "Axes") -> None:
        for (name, values), ink in zip(series.items(), _SERIES, strict=False):
            axes.hist(values, edges.tolist(), density=True, color=ink, alpha=0.4, label=name)
            axes.axvline(float(values.mean()), color=ink)
        axes.set(xlabel=label, yticks=[])
        axes.spines["left"].set_visible(False)
        axes.legend(labelcolor=INK)

    return _draw(paint, title)


def reliability(confidence: Rows, hits: NDArray[np.bool_], title: str) -> Markup:
    """How often top labels are right, by their probability [N]; perfect probabilities lie on the diagonal."""
    bins = calibration.bins(confidence)
    counts = np.bincount(bins, minlength=calibration.BINS)
    (filled,) = np.nonzero(counts)
    sure, right = (np.bincount(bins, each)[filled] / counts[filled] for each in (confidence, hits))
    error = np.sqrt(right * (1 - right) / counts[filled])

    def paint(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=FAINT, linestyle=":")
        axes.errorbar(sure, right, error, ecolor=FAINT, linestyle="none")
        axes.scatter(sure, right, 12 + 150 * counts[filled] / counts.max(), color=ACCENT, alpha=0.7)
        axes.set(xlabel="probability of the top label", ylabel="share that is right", xlim=(0, 1.03))

    return _draw(paint, title)


def points(rows: Rows, limits: Sequence[float], title: str) -> Markup:
    """The first two coordinates of points [N, 2 or more] as dots, within limits of both axes."""

    def paint(axes: "Axes") -> None:
        _scatter(axes, rows, _COPPER, 0.7)
        _frame(axes, limits)

    return _draw(paint, title, _SQUARE)


def paths(ways: Rows, rows: Rows, limits: Sequence[float], title: str) -> Markup:
    """Ways [N, length, 2 or more] from end to end through a cloud of points."""

    def paint(axes: "Axes") -> None:
        _scatter(axes, rows, _GREY, 0.5)
        for way in ways:
            axes.plot(way[:, 0], way[:, 1], color=ACCENT, marker="o", markersize=2.5, linewidth=1)
        _frame(axes, limits)

    return _draw(paint, title, _SQUARE)


def field(values: Rows, limits: Sequence[float], title: str) -> Markup:
    """Numbers from 0 up, [n, n], over both axes' limits; the first index is the abscissa."""

    def paint(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap

        copper = LinearSegmentedColormap.from_list("copper", [(*_COPPER, 0.0), (*_COPPER, 1.0)])
        low, high = limits
        axes.imshow(values.T, copper, vmin=0, origin="lower", extent=(low, high, low, high))
        _frame(axes, limits)

    return _draw(paint, title, _SQUARE)


def roll(sounding: NDArray[np.bool_], lowest: int, title: str) -> Markup:
    """Which pitches sound, [pitches, frames], the highest first, as a piano roll; `lowest` is of MIDI."""
    last = lowest + len(sounding) - 1
    octaves = list(range(-(-lowest // _OCTAVE) * _OCTAVE, last + 1, _OCTAVE))

    def paint(axes: "Axes") -> None:
        for pitch, frames in zip(range(last, lowest - 1, -1), sounding, strict=True):
            axes.broken_barh(_runs(frames), (pitch - 0.45, 0.9), color=ACCENT, linewidth=0)
        axes.set_yticks(octaves, [f"C{pitch // _OCTAVE - 1}" for pitch in octaves])
        axes.set(xlabel="eighth notes", xlim=(0, max(sounding.shape[1], 1)), ylim=(lowest - 1, last + 1))
        axes.grid(axis="y", color=FAINT, alpha=0.3)

    return _draw(paint, title, _LONG)


def _runs(frames: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Where a pitch sounds: beginnings and lengths, with a little air between."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], frames, [False]]).astype(int)))
    return [(float(start), float(end - start) - 0.1) for start, end in changes.reshape(-1, 2)]


def _scatter(axes: "Axes", rows: Rows, colour: Any, alpha: float) -> None:
    axes.scatter(rows[:, 0], rows[:, 1], 1.5, color=colour, linewidths=0, alpha=alpha, rasterized=True)


def _frame(axes: "Axes", limits: Sequence[float]) -> None:
    axes.set(xlim=limits, ylim=limits, aspect="equal")


def _draw(paint: "Callable[[Axes], None]", title: str, size: tuple[float, float] = _SIZE) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    written = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure.subplots())
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, dpi=200, metadata=nothing)
    return _inline(written.getvalue(), title)


def _inline(svg: str, title: str) -> Markup:
    """The picture without prologue, and without names that another one on the page may have too."""
    bare = re.sub(r' (id="[\w.]+_\d+"|xmlns(:\w+)?="[^"]*")', "", svg[svg.index("<svg") :])
    for ink, variable in _VARIABLES.items():
        bare = bare.replace(ink, variable)
    labelled = Markup('<svg role="img" aria-label="{}"').format(title)
    return labelled + Markup(bare.removeprefix("<svg").replace("xlink:href", "href"))


def _image(picture: Any, kind: str, title: str) -> Markup:
    png = io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    return Markup('<img class="{}" width="{}" alt="{}" src="data:image/png;base64,{}">').format(
        kind, picture.width, title, data
    )
