"""Results as a picture: y against x, a line per method and merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..errors import MissingExtra, UsageError
from ..report.formats import DARK, UNDATED
from .page import apart, groups, rows
from .suite import Suite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZES = ("slots", "percent", "rank", "bits", "ratio", "k")
"""Options that distinguish the points of a line against storage."""
_MARKS = "os^Dvp*Xh<>"
_DASHES = ("-", "--", "-.", (0, (6, 1.5)), (0, (5, 1.5, 1, 1.5, 1, 1.5)))
_AXES = {
    "storage": "bytes, % of all adapters",
    "after": "arrivals",
    "loss": "loss, nats per token",
    "loss_kept": "loss kept (hollow: of the worst task)",
}
Points = list[tuple[float, Sequence[float]]]


def drawn(
    suite: Suite,
    results: Mapping[str, dict[str, Any]],
    kind: str,
    x: str = "storage",
    y: str = "loss_kept",
    dark: bool = False,
) -> bytes:
    """Draw y against x, one line per method and merge, as a png, svg or pdf file, the same bytes every time.

    `x` is storage or a numeric option; against an option, single points are left out where there are longer lines. `y`
    is loss, loss_kept, score or S. Raises UsageError if there is nothing to draw, MissingExtra (`report`).
    """
    found = rows(suite, results)
    lines = _lines(suite, results, found, x, y)
    if not lines:
        raise UsageError(f"no result has both {x} and {y}", where=suite.name, cure="lorashelf bench status SUITE")
    try:
        from matplotlib import rc_context, style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a plot", "matplotlib", "report") from error
    backgrounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    settings: Any = {"svg.hashsalt": "lorashelf", **(dict.fromkeys(backgrounds, DARK) if dark else {})}
    file = BytesIO()
    with style.context("dark_background" if dark else "default"), rc_context(settings):
        figure = Figure(figsize=(7.5, 4.5), layout="constrained")
        axes = figure.add_subplot()
        worst = _lines(suite, results, found, x, "worst") if y == "loss_kept" else {}
        dashes = cycle(_DASHES)
        for number, label in enumerate(sorted(lines)):
            line = next(dashes) if len(lines[label]) > 1 else "none"
            _draw(axes, label, lines[label], worst.get(label), number, line)
        if x == "storage":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(_AXES.get(x, x))
        axes.set_ylabel(_AXES.get(y, y))
        axes.set_title(suite.title or suite.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=3.5)
        figure.savefig(file, format=kind, metadata=UNDATED[kind])
    return file.getvalue()


def _draw(axes: Axes, label: str, points: Points, worst: Points | None, number: int, line: Any) -> None:
    """Draw a line with its intervals, and hollow marks for the worst task; marks and dashes differ without colours."""
    xs, stated = zip(*sorted(points), strict=True)
    values = [s[0] for s in stated]
    errors = [[s[0] - s[1] for s in stated], [s[2] - s[0] for s in stated]]
    colours = [*(f"C{i}" for i in range(10)), axes.title.get_color()]
    style: dict[str, Any] = {
        "marker": _MARKS[number % len(_MARKS)],
        "color": colours[number % len(colours)],
        "markersize": 5,
    }
    axes.errorbar(xs, values, yerr=errors, label=label, linestyle=line, linewidth=1.2, capsize=2, **style)
    if worst:
        places, lows = zip(*sorted((place, s[0]) for place, s in worst), strict=True)
        axes.plot(places, lows, linestyle="none" if line == "none" else ":", fillstyle="none", **style)


def _lines(
    suite: Suite, results: Mapping[str, dict[str, Any]], stated: Sequence[Mapping[str, Any]], x: str, y: str
) -> dict[str, Points]:
    """Return label → points (x, (value, low, high)), and of options only the longer lines, if there are any; the bare
    base, which stores nothing, is left out of storage.
    """
    cells = groups(suite, results)
    found: dict[str, Points] = {}
    for row in stated:
        cell = cells[row["method"], row["merge"], row["options"]][0]
        place = 100 * row["storage"] or None if x == "storage" else cell.options.get(x)
        if isinstance(place, int | float) and not isinstance(place, bool) and row[y] is not None:
            along = _SIZES if x == "storage" else (x,)
            named = [row["method"], row["merge"], *cell.particulars((*apart(cell), *along))]
            label = " ".join(filter(None, named))
            found.setdefault(label, []).append((place, row[y]))
    longer = {label: points for label, points in found.items() if len(points) > 1}
    return longer if longer and x != "storage" else found
