"""Overview picture of an artifact: image grids, scatter plots and heatmaps."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Plot(Protocol):
    """Titled plot that can be drawn on matplotlib axes."""

    @property
    def title(self) -> str:
        """Title above the plot."""

    def draw(self, axes: "Axes", num_levels: int) -> None:
        """Draw the plot; image values are in 0..num_levels-1."""


@dataclass(frozen=True)
class ImageGrid:
    """Grid of images, [N, height, width] or [N, height, width, channels], `columns` in each line."""

    title: str
    images: NDArray[Any]
    columns: int = 10

    def draw(self, axes: "Axes", num_levels: int) -> None:
        """Draw the grid; images without channels are dark on white."""
        tiles = tile_images(self.images, self.columns)
        axes.imshow(tiles / (num_levels - 1), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_axis_off()


@dataclass(frozen=True)
class Scatter:
    """Points [N, 2] on axes from -limit to limit."""

    title: str
    points: NDArray[Any]
    limit: float

    def draw(self, axes: "Axes", num_levels: int) -> None:
        """Draw each point as one pixel."""
        axes.plot(self.points[:, 0], self.points[:, 1], ",", color="black", alpha=0.6)
        axes.set(xlim=(-self.limit, self.limit), ylim=(-self.limit, self.limit), aspect="equal")


@dataclass(frozen=True)
class Heatmap:
    """Values >= 0, [n, n], on axes from -limit to limit; the first index is the x axis."""

    title: str
    values: NDArray[Any]
    limit: float

    def draw(self, axes: "Axes", num_levels: int) -> None:
        """Draw 0 as white and the largest value as black."""
        extent = (-self.limit, self.limit, -self.limit, self.limit)
        axes.imshow(self.values.T, cmap="gray_r", vmin=0, origin="lower", extent=extent)


def cell_centers(limit: float, count: int) -> NDArray[np.float32]:
    """Return the centers of `count` x `count` cells of the square [-limit, limit]^2.

    Returns:
        float32 [count^2, 2], x before y, in C order.
    """
    axis = ((np.arange(count) + 0.5) / count * 2 - 1) * limit
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


def render_figure(title: str, caption: str, plots: Sequence[Plot], num_levels: int) -> bytes:
    """Render plots from left to right, with a title above and a caption below.

    Returns:
        The bytes of a PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(4.6 * len(plots), 5.8), layout=ConstrainedLayoutEngine(wspace=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(caption, fontsize=8)
    for axes, plot in zip(np.atleast_1d(figure.subplots(1, len(plots))), plots, strict=True):
        plot.draw(axes, num_levels)
        axes.set_title(plot.title, fontsize=11)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def tile_images(images: NDArray[Any], columns: int) -> NDArray[np.float64]:
    """Tile images into one, with a margin of one pixel at the right and the bottom of each image.

    Args:
        images: [N, height, width] or [N, height, width, channels]. Images after the last full line are left
            out.
        columns: images in each line.

    Returns:
        float64 [lines * (height + 1), columns * (width + 1)(, channels)]. The margin is 0 in images without
        channels, and the largest value of all images in the others.
    """
    images = images[: len(images) // columns * columns].astype(np.float64)
    margin_value = 0 if images.ndim == 3 else images.max()
    padding = [(0, 0), (0, 1), (0, 1)] + [(0, 0)] * (images.ndim - 3)
    padded = np.pad(images, padding, constant_values=margin_value)
    lines = padded.reshape(-1, columns, *padded.shape[1:])
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines], axis=0)
