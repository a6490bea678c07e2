"""The drawing of a curve of bytes and predicted quality. Importing this module loads matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib import rc_context, style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from ..documents.coded import CurvePoint
from .formats import UNDATED

INK, PALE, BLUE = "#222222", "#666666", "#1f77b4"
TICKS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50)


def draw(rows: Sequence[CurvePoint], kind: str, budget: int | None) -> bytes:
    """Return the figure as png, svg or pdf bytes, the same every time."""
    drawn = BytesIO()
    with style.context("default"), rc_context({"svg.hashsalt": "lorashelf"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        percents = [row["percent"] for row in rows]
        axes.plot(percents, [row["mean"] for row in rows], color=BLUE, label="mean of the tasks")
        axes.plot(percents, [row["least"] for row in rows], color=BLUE, linestyle="--", label="worst task")
        if budget is not None:
            whole = rows[-1]["bytes"] / rows[-1]["percent"]
            axes.axvline(budget / whole, color=PALE, linewidth=0.8, label="budget")
        axes.set_xscale("log")
        axes.set_xticks([each for each in TICKS if percents[0] <= each <= percents[-1]])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("bytes, of the adapters in 16 bits", color=INK)
        axes.set_ylabel("predicted quality", color=INK)
        axes.set_ylim(top=1.0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(drawn, format=kind, dpi=150, metadata=UNDATED[kind])
    return drawn.getvalue()
