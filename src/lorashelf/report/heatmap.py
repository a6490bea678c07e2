"""The clustered heat map of a similarity matrix."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from ..algebra import Square
from ..atomic import replace_file
from ..errors import MissingExtra, UsageError


def draw_heatmap(names: Sequence[str], matrix: Square, metric: str, path: Path) -> None:
    """Draw an (n, n) similarity matrix with alike adapters side by side; the file's ending gives the format.

    Raises MissingExtra (`report`), UsageError for an unknown ending, DiskError.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a heat map", "matplotlib", "report") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        raise UsageError(
            f"cannot draw {path.suffix or 'a file without ending'}", where=str(path), cure=f"one of {', '.join(kinds)}"
        )
    order = neighbour_order(matrix)
    shown = matrix[np.ix_(order, order)]
    apart = shown[~np.eye(len(shown), dtype=bool)]
    side = 2.5 + 0.24 * len(names)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained")
    axes = figure.add_subplot()
    low, high = (float(np.min(apart)), float(np.max(apart))) if apart.size else (0.0, 1.0)
    image = axes.imshow(shown, cmap="viridis", vmin=min(low, 0.0), vmax=max(high, 1e-9))
    labels = [names[i] for i in order]
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(f"{metric} similarity (colours span the pairs of different adapters)", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.lstrip("."))
    replace_file(path, drawn.getvalue(), path.parent)


def neighbour_order(matrix: Square) -> list[int]:
    """An order in which alike items stand side by side: the leaves of average linkage, nearer ends joined."""
    groups: list[list[int]] = [[i] for i in range(len(matrix))]
    while len(groups) > 1:
        means = np.array([[matrix[np.ix_(g, h)].mean() if g is not h else -np.inf for h in groups] for g in groups])
        i, j = sorted(divmod(int(means.argmax()), len(groups)))
        left, right = groups[i], groups.pop(j)
        candidates = [(left, right), (left[::-1], right), (left, right[::-1]), (left[::-1], right[::-1])]
        first, second = max(candidates, key=lambda pair: matrix[pair[0][-1], pair[1][0]])
        groups[i] = first + second
    return groups[0]
