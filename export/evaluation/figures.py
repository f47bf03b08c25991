"""The picture beside an artifact: images, points and densities under titles. Knows arrays and no family."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Drawing(Protocol):
    """Something with a title that can be drawn on axes; `levels` says what is black in an image."""

    @property
    def title(self) -> str:
        """What stands above it."""

    def draw(self, axes: "Axes", levels: int) -> None:
        """Draw it."""


@dataclass(frozen=True)
class Panel:
    """A titled grid of images, [N, height, width] or [N, height, width, channels], in rows of `columns`."""

    title: str
    images: NDArray[Any]
    columns: int = 10

    def draw(self, axes: "Axes", levels: int) -> None:
        """Draw the grid in grey, or in the images' own colours."""
        axes.imshow(grid(self) / (levels - 1), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()


@dataclass(frozen=True)
class Scatter:
    """Titled points [N, 2] within -limit..limit on both axes."""

    title: str
    points: NDArray[Any]
    limit: float

    def draw(self, axes: "Axes", levels: int) -> None:
        """Draw every point as a small dot."""
        axes.plot(self.points[:, 0], self.points[:, 1], ",", color="black", alpha=0.6)
        axes.set(xlim=(-self.limit, self.limit), ylim=(-self.limit, self.limit), aspect="equal")


@dataclass(frozen=True)
class Heatmap:
    """Titled numbers from 0 up, [n, n], over -limit..limit on both axes; the first index is the abscissa."""

    title: str
    values: NDArray[Any]
    limit: float

    def draw(self, axes: "Axes", levels: int) -> None:
        """Draw small numbers light and large ones dark."""
        extent = (-self.limit, self.limit, -self.limit, self.limit)
        axes.imshow(self.values.T, cmap="gray_r", vmin=0, origin="lower", extent=extent)


def cells(limit: float, count: int) -> NDArray[np.float32]:
    """The middles of count x count cells of the square -limit..limit, [count^2, 2], by abscissa first."""
    axis = ((np.arange(count) + 0.5) / count * 2 - 1) * limit
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


def draw(title: str, caption: str, panels: Sequence[Drawing], levels: int) -> bytes:
    """Drawings side by side under a title and over a caption, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(4.6 * len(panels), 5.8), layout=ConstrainedLayoutEngine(wspace=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(caption, fontsize=8)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        panel.draw(axes, levels)
        axes.set_title(panel.title, fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def grid(panel: Panel) -> NDArray[np.float64]:
    """The images tiled with margins that look like paper: 0 in the grey map, full brightness in colour."""
    images = panel.images[: len(panel.images) // panel.columns * panel.columns].astype(np.float64)
    blank = 0 if images.ndim == 3 else images.max()
    margins = [(0, 0), (0, 1), (0, 1)] + [(0, 0)] * (images.ndim - 3)
    framed = np.pad(images, margins, constant_values=blank)
    lines = framed.reshape(-1, panel.columns, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines], axis=0)
