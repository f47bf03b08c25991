"""Charts as inline SVG, and images as inline PNG.

Charts have a transparent background and one palette, for a light page. In dark mode, a filter in the page's
style sheet inverts their lightness.
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
from export.evaluation.figures import tile_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = NDArray[Any]

# The colors of the light page, in templates/page.html.
_TEXT, _FAINT, _ACCENT, _SECOND = "#26221d", "#7d756a", "#b2561f", "#2b7375"
_SERIES_COLORS = (_ACCENT, _SECOND)
_GRAY = "#888888"
# Width and height in inches.
_SIZE, _SQUARE, _WIDE = (4.4, 3.0), (3.4, 3.4), (10.0, 2.4)
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "legend.frameon": False,
}
_HISTOGRAM_BINS = 30
_OCTAVE = 12


def image_grid(images: NDArray[np.float64], columns: int, title: str) -> Markup:
    """Return a grid of images as PNG.

    Args:
        images: [N, height, width] or [N, height, width, 1 or 3], brightness in 0..1.
        columns: images in each line.
        title: alternative text.

    Returns:
        An `img` element. Grayscale images are black with the brightness as opacity, so that 0 shows the
        background of the page.
    """
    from PIL import Image

    images = images[..., 0] if images.ndim == 4 and images.shape[3] == 1 else images
    pixels = np.rint(255 * tile_images(images, min(columns, len(images)))).astype(np.uint8)
    if pixels.ndim == 2:
        return _inline_png(Image.fromarray(np.stack([np.zeros_like(pixels), pixels], -1)), "grayscale", title)
    return _inline_png(Image.fromarray(pixels), "color", title)


def loss_curve(steps: Sequence[int], losses: Mapping[str, Sequence[float]], best: int, title: str) -> Markup:
    """Return losses by training step, with a dotted line at the step `best`."""

    def plot(axes: "Axes") -> None:
        for (name, values), color in zip(losses.items(), _SERIES_COLORS, strict=False):
            axes.plot(steps, values, color=color, label=name, marker="o", markersize=3)
        axes.axvline(best, color=_FAINT, linestyle=":")
        axes.set(xlabel="step", ylabel="loss")
        axes.legend()

    return _render(plot, title)


def histogram(series: Mapping[str, Rows], label: str, title: str) -> Markup:
    """Return the density of values [N] of each series, with a line at its mean."""
    all_values = np.concatenate(list(series.values()))
    low, high = np.quantile(all_values, (0.002, 0.998)).tolist()
    edges = np.linspace(low, high, _HISTOGRAM_BINS + 1)

    def plot(axes: "Axes") -> None:
        for (name, values), color in zip(series.items(), _SERIES_COLORS, strict=False):
            axes.hist(values, edges.tolist(), density=True, color=color, alpha=0.4, label=name)
            axes.axvline(float(values.mean()), color=color)
        axes.set(xlabel=label, yticks=[])
        axes.spines["left"].set_visible(False)
        axes.legend()

    return _render(plot, title)


def reliability_diagram(confidence: Rows, is_correct: NDArray[np.bool_], title: str) -> Markup:
    """Return the accuracy by the probability of the predicted label.

    Args:
        confidence: probability of the predicted label [N].
        is_correct: whether the predicted label is right [N].
        title: label for screen readers.
    """
    bins = calibration.bin_indices(confidence)
    counts = np.bincount(bins, minlength=calibration.NUM_BINS)
    (used,) = np.nonzero(counts)
    mean_confidence, accuracy = (
        np.bincount(bins, values)[used] / counts[used] for values in (confidence, is_correct)
    )
    error = np.sqrt(accuracy * (1 - accuracy) / counts[used])

    def plot(axes: "Axes") -> None:
        axes.plot([0, 1], [0, 1], color=_FAINT, linestyle=":")
        axes.errorbar(mean_confidence, accuracy, error, ecolor=_FAINT, linestyle="none")
        sizes = 12 + 150 * counts[used] / counts.max()
        axes.scatter(mean_confidence, accuracy, sizes, color=_ACCENT, alpha=0.7)
        axes.set(xlabel="probability of the predicted label", ylabel="accuracy", xlim=(0, 1.03))

    return _render(plot, title)


def scatter(points: Rows, limits: Sequence[float], title: str) -> Markup:
    """Return the first two coordinates of points [N, >= 2] as dots; both axes have the same limits."""

    def plot(axes: "Axes") -> None:
        _plot_dots(axes, points, _ACCENT, 0.7)
        _set_limits(axes, limits)

    return _render(plot, title, _SQUARE)


def paths(paths: Rows, points: Rows, limits: Sequence[float], title: str) -> Markup:
    """Return paths [N, length, >= 2] over points [M, >= 2]."""

    def plot(axes: "Axes") -> None:
        _plot_dots(axes, points, _GRAY, 0.5)
        for path in paths:
            axes.plot(path[:, 0], path[:, 1], color=_ACCENT, marker="o", markersize=2.5, linewidth=1)
        _set_limits(axes, limits)

    return _render(plot, title, _SQUARE)


def heatmap(values: Rows, limits: Sequence[float], title: str) -> Markup:
    """Return values >= 0, [n, n], as opacity; the first index is the x axis, 0 is transparent."""

    def plot(axes: "Axes") -> None:
        from matplotlib.colors import LinearSegmentedColormap, to_rgba

        colors = [to_rgba(_ACCENT, 0.0), to_rgba(_ACCENT, 1.0)]
        low, high = limits
        axes.imshow(
            values.T,
            LinearSegmentedColormap.from_list("accent", colors),
            vmin=0,
            origin="lower",
            extent=(low, high, low, high),
        )
        _set_limits(axes, limits)

    return _render(plot, title, _SQUARE)


def piano_roll(is_sounding: NDArray[np.bool_], lowest: int, title: str) -> Markup:
    """Return a piano roll.

    Args:
        is_sounding: [pitches, frames], the highest pitch first.
        lowest: MIDI number of the lowest pitch.
        title: label for screen readers.
    """
    highest = lowest + len(is_sounding) - 1
    octaves = list(range(-(-lowest // _OCTAVE) * _OCTAVE, highest + 1, _OCTAVE))

    def plot(axes: "Axes") -> None:
        for pitch, frames in zip(range(highest, lowest - 1, -1), is_sounding, strict=True):
            axes.broken_barh(_bars(frames), (pitch - 0.45, 0.9), color=_ACCENT, linewidth=0)
        axes.set_yticks(octaves, [f"C{pitch // _OCTAVE - 1}" for pitch in octaves])
        axes.set(
            xlabel="eighth notes",
            xlim=(0, max(is_sounding.shape[1], 1)),
            ylim=(lowest - 1, highest + 1),
        )
        axes.grid(axis="y", color=_FAINT, alpha=0.3)

    return _render(plot, title, _WIDE)


def _bars(frames: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return start and length of each run of frames; bars end 0.1 frames early, so that they stay apart."""
    changes = np.flatnonzero(np.diff(np.concatenate([[False], frames, [False]]).astype(int)))
    return [(float(start), float(end - start) - 0.1) for start, end in changes.reshape(-1, 2)]


def _plot_dots(axes: "Axes", points: Rows, color: str, alpha: float) -> None:
    axes.scatter(points[:, 0], points[:, 1], 1.5, color=color, linewidths=0, alpha=alpha, rasterized=True)


def _set_limits(axes: "Axes", limits: Sequence[float]) -> None:
    axes.set(xlim=limits, ylim=limits, aspect="equal")


def _render(plot: "Callable[[Axes], None]", title: str, size: tuple[float, float] = _SIZE) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    svg = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": title}):
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        plot(figure.subplots())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(svg, format="svg", transparent=True, dpi=200, metadata=no_metadata)
    return _inline_svg(svg.getvalue(), title)


def _inline_svg(svg: str, title: str) -> Markup:
    """Return the `svg` element without the prolog and without ids that another chart may have too."""
    element = re.sub(r' (id="[\w.]+_\d+"|xmlns(:\w+)?="[^"]*")', "", svg[svg.index("<svg") :])
    start = Markup('<svg role="img" aria-label="{}"').format(title)
    return start + Markup(element.removeprefix("<svg").replace("xlink:href", "href"))


def _inline_png(image: Any, css_class: str, title: str) -> Markup:
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()
    return Markup('<img class="{}" width="{}" alt="{}" src="data:image/png;base64,{}">').format(
        css_class, image.width, title, data
    )
