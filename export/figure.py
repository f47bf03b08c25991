"""The picture beside an artifact: grids of images under titles. Knows arrays and no family."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Panel:
    """A titled grid of images, [N, height, width] or [N, height, width, channels], in rows of `columns`."""

    title: str
    images: NDArray[Any]
    columns: int = 10


def draw(title: str, caption: str, panels: Sequence[Panel], levels: int) -> bytes:
    """Panels side by side under a title and over a caption, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(4.6 * len(panels), 5.8), layout=ConstrainedLayoutEngine(wspace=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(caption, fontsize=8)
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        axes.imshow(_grid(panel) / (levels - 1), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(panel.title, fontsize=11)
        axes.set_axis_off()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _grid(panel: Panel) -> NDArray[np.float64]:
    """The images tiled with margins that look like paper: 0 in the grey map, full brightness in colour."""
    images = panel.images[: len(panel.images) // panel.columns * panel.columns].astype(np.float64)
    blank = 0 if images.ndim == 3 else images.max()
    margins = [(0, 0), (0, 1), (0, 1)] + [(0, 0)] * (images.ndim - 3)
    framed = np.pad(images, margins, constant_values=blank)
    lines = framed.reshape(-1, panel.columns, *framed.shape[1:])
    return np.concatenate([np.concatenate(list(line), axis=1) for line in lines], axis=0)
