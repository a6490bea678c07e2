"""The drawing of a heat map. Importing this module loads matplotlib, SciPy and scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context, style
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ..lora.arrays import Square, Vector
from .arrangement import arranged
from .fonts import families
from .formats import DARK, UNDATED

UNSIGNED = {"l1", "l2", "linf"}  # metrics in (0, 1], whose middle is not 0
NUMBERED = 12  # up to this many adapters, cells show their values
Inks = tuple[str, str, str]  # of words, of what matters less, of the diagonal
ON_LIGHT: Inks = ("#222222", "#666666", "#c4c4c4")
ON_DARK: Inks = ("#e6edf3", "#9198a1", "#555555")
ON_CELLS = "#222222"  # lines and numbers: the colours of cells are the same on both
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
DPI, MOST_PIXELS = 150.0, 6_000.0


def draw(
    labels: Sequence[str], matrix: Square, metric: str, kind: str, *, arrange: bool = True, dark: bool = False
) -> tuple[bytes, list[str]]:
    """Return the heat map as png, svg or pdf bytes, the same every time, and the characters that no font has."""
    fonts, missing = families("".join(labels))
    drawn = BytesIO()
    with style.context("default"), rc_context({"font.family": fonts, "svg.hashsalt": "lorashelf"}):
        figure = heatmap(labels, matrix, metric, arrange=arrange, inks=ON_DARK if dark else ON_LIGHT)
        figure.set_facecolor(DARK if dark else "white")
        about = {"Title": figure.axes[0].get_title(loc="left"), **UNDATED[kind]}
        dpi = min(DPI, MOST_PIXELS / figure.get_figwidth())
        figure.savefig(drawn, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.15, metadata=about)
    return drawn.getvalue(), missing


def heatmap(
    labels: Sequence[str], matrix: Square, metric: str, *, arrange: bool = True, inks: Inks = ON_LIGHT
) -> Figure:
    """Return the figure: similar adapters side by side, or all in the given order. The canvas holds only the cells, of
    fixed size in inches; names, title and colour bar lie outside, within a tight bounding box.
    """
    n = len(matrix)
    order, borders = arranged(matrix) if arrange else (list(range(n)), [])
    ink, pale, grey = inks
    cell, points = (0.5, 9.0) if n <= NUMBERED else (0.24, 8.0) if n <= 60 else (0.14, 6.5)
    side = max(n * cell, 1.6)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0), frame_on=False)
    axes.tick_params(length=0)
    words: dict[str, Any] = {"fontsize": points, "color": ink, "parse_math": False}
    names = [labels[i] for i in order]
    axes.set_xticks(range(n), names, rotation=90, **words)
    axes.set_yticks(range(n), names, **words)
    shown = matrix[np.ix_(order, order)]
    image = _cells(axes, shown, metric not in UNSIGNED, grey)
    for border in borders:
        axes.axhline(border - 0.5, color=ON_CELLS, linewidth=0.8)
        axes.axvline(border - 0.5, color=ON_CELLS, linewidth=0.8)
    title = f"Similarity of {n} adapters" if n > 1 else "One adapter"
    axes.set_title(title, loc="left", fontsize=11, color=ink, pad=22 if borders else 8)
    if borders:
        words = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8, "color": pale}
        axes.annotate(f"{len(borders) + 1} clusters by average linkage", (0, 1), (0, 8), **words)
    _colour_bar(figure, image, shown, f"{metric} similarity", ink)
    return figure


def _pairs(matrix: Square) -> Vector:
    """Return the similarities of distinct adapters; a single 0 if there are none."""
    return matrix[~np.eye(len(matrix), dtype=bool)] if len(matrix) > 1 else np.zeros(1)


def _cells(axes: Axes, matrix: Square, signed: bool, grey: str) -> AxesImage:
    """Draw the cells, coloured over their range, centred on 0 if signed; the diagonal is grey."""
    low, high = float(_pairs(matrix).min()), float(_pairs(matrix).max())
    norm = CenteredNorm(0.0, max(-low, high) or 1.0) if signed else Normalize(low if low < high else 0.0, high or 1.0)
    colours = colormaps["RdBu_r" if signed else "viridis"].with_extremes(bad=grey)
    itself = np.eye(len(matrix), dtype=bool)
    image = axes.imshow(np.ma.masked_array(matrix, itself), cmap=colours, norm=norm, interpolation="nearest")
    if len(matrix) <= NUMBERED:
        digits = 2 if max(-low, high) >= 0.1 else 3
        for row, column in zip(*np.nonzero(~itself), strict=True):
            value = matrix[row, column]
            ink = "white" if image.to_rgba(value)[:3] @ LUMINANCE < 0.4 else ON_CELLS
            text = f"{value:.{digits}f}".replace("-", "−")
            axes.text(column, row, text, color=ink, fontsize=8, ha="center", va="center")
    return image


def _colour_bar(figure: Figure, image: AxesImage, matrix: Square, label: str, ink: str) -> None:
    """Draw the colour bar beside the cells, cut to the range in use."""
    side = figure.get_figwidth()
    height = min(1.0, 3.0 / side)
    bar = figure.colorbar(image, cax=figure.add_axes((1 + 0.2 / side, 1 - height, 0.14 / side, height)))
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5)
    bar.set_label(label, fontsize=8, color=ink)
    bar.ax.tick_params(labelsize=8, labelcolor=ink, length=2)
    used = np.clip([*_pairs(matrix), 0.0], *image.get_clim())
    if used.min() < used.max():
        bar.ax.set_ylim(used.min(), used.max())
