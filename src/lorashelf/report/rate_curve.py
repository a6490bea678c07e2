"""What adapters keep in how many bytes, coded together: the curve that `plan` prints and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..atomic import replace_file
from ..documents.coded import CurvePoint
from ..formats.codecs import CODECS
from ..lora.adapter import Adapter, in_16_bits, parameters
from ..lora.quality import MOST_QUALITY, summary
from ..merging.average import Average, History
from ..placement.rates import Rate, steps
from ..shelf.allocation import curve

PERCENTS = (0.25, 0.5, 1.0, 2.5, 5.0, 12.5)


def rate_curve(
    adapters: Mapping[str, Adapter], *, watch: Callable[[Iterable[str]], Iterable[str]] = iter
) -> list[CurvePoint]:
    """Code the adapters, write nothing, and return what they take and keep at every slope, the smallest first.

    A row has `bytes` of the coded objects, `percent` of the adapters in 16 bits, and of the predicted quality the
    `mean`, the `least` and the `task` that has it. `watch` wraps the names as their adapters are coded.
    """
    codec, names = CODECS["coded"], sorted(adapters)
    coded = [codec.round_trip(adapters[name], MOST_QUALITY) for name in watch(names)]
    curves = [curve(Average(x, History((), error)), codec) for x, error in coded]
    whole = in_16_bits(sum(parameters(x.modules.original_shapes) for x in adapters.values()))
    counts = [len(curve) for curve in curves]
    rows = [_row(names, curves, counts, whole)]
    for step in steps(curves, [0.0] * len(curves)):
        counts[step.object] = step.levels
        rows.append(_row(names, curves, counts, whole))
    return rows[::-1]


def within(rows: Sequence[CurvePoint], size: int) -> CurvePoint | None:
    """Return the best row of a curve within a number of bytes; None if there is none."""
    return next((row for row in reversed(rows) if row["bytes"] <= size), None)


def draw_curve(rows: Sequence[CurvePoint], path: Path, ending: str, budget: int | None = None) -> None:
    """Draw a curve as a png, svg or pdf file, with a line at the budget. Raises DiskError."""
    from .rate_figure import draw

    replace_file(path, draw(rows, ending, budget), path.parent)


def _row(names: Sequence[str], curves: Sequence[Sequence[Rate]], counts: Sequence[int], whole: int) -> CurvePoint:
    rates = [curve[count - 1] for curve, count in zip(curves, counts, strict=True)]
    size, kept = sum(rate.bytes for rate in rates), [rate.quality for rate in rates]
    return {"bytes": size, "percent": 100 * size / whole, **summary(dict(zip(names, kept, strict=True)))}
