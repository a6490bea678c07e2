"""Results for people: a Markdown table with paired intervals, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from .. import atomic
from ..errors import MissingExtra, UsageError
from .results import Sample, Vector, interval, mean_over_tasks, normalised_score, sampled, shares_kept
from .suite import Cell, Suite

_APART = ("merge", "seed")
"""Options with a column of their own."""
_SIZES = ("slots", "percent")
"""Options that distinguish the points of a line."""
Group = tuple[str, str, str]  # method, merge, other options


def groups(suite: Suite, results: Mapping[str, dict[str, Any]]) -> dict[Group, list[Cell]]:
    """Group the measured cells that differ only in the seed."""
    found: dict[Group, list[Cell]] = {}
    for cell in suite.cells:
        if cell.id in results:
            merge = cell.options.get("merge", "")
            found.setdefault((cell.method, merge, " ".join(cell.particulars(_APART))), []).append(cell)
    return found


def rows(suite: Suite, results: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per group: means over tasks and seeds, each (value, low, high) or None; by merge, then by loss."""
    grouped = groups(suite, results)
    samples = {group: sampled([results[cell.id] for cell in cells]) for group, cells in grouped.items()}
    if samples:
        sampled([result for sample in samples.values() for result in sample.results])  # one model for all
    own, zero = (samples.get((name, "", "")) for name in ("own", "base"))
    found = []
    for (method, merge, options), sample in samples.items():
        cells = grouped[method, merge, options]
        shares = shares_kept(sample.losses, own.losses, zero.losses) if own and zero else {}
        worst = min(shares, key=lambda task: shares[task][0], default=None)
        reference = samples.get((suite.reference or "", merge, options)) if method != suite.reference else None
        found.append(
            {
                "method": method,
                "merge": merge,
                "options": options,
                "seeds": len(cells),
                "loss": _stated(mean_over_tasks(sample.losses)),
                "loss_kept": _stated(mean_over_tasks(shares)),
                "worst": _stated(shares[worst]) if worst else None,
                "worst_task": worst,
                "against": _stated(_difference(sample, reference)) if reference else None,
                "score": _stated(mean_over_tasks(sample.scores)),
                "S": _stated(normalised_score(sample.scores, own.scores)) if own else None,
                "storage": _storage(sample),
                "slots": cells[0].options.get("slots"),
            }
        )
    return sorted(found, key=lambda row: (row["merge"], row["loss"][0]))


def _difference(sample: Sample, reference: Sample) -> Vector | None:
    """Return the loss minus that of the reference, on the same resamples; mean over the tasks that both have."""
    shared = sorted(set(sample.tasks) & set(reference.tasks))
    return mean_over_tasks({task: sample.losses[task] - reference.losses[task] for task in shared})


def _stated(values: Vector | None) -> tuple[float, float, float] | None:
    return None if values is None else (float(values[0]), *interval(values))


def _storage(sample: Sample) -> float:
    return float(np.mean([result["bytes"] / result["own_bytes"] for result in sample.results]))


def table(suite: Suite, results: Mapping[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, below the number of tasks and examples."""
    found = rows(suite, results)
    if not found:
        return "nothing has been measured yet"
    against = f"− {suite.reference}" if suite.reference else None
    heads = [
        "method",
        "merge",
        "options",
        "seeds",
        "loss",
        "loss kept %",
        "worst task %",
        *([against] if against else []),
    ]
    heads += ["score", "S", "storage %"]
    lines = [_counts(results), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found:
        cells = [row["method"], row["merge"] or "–", row["options"] or "–", str(row["seeds"])]
        cells += [_number(row["loss"], ".4f"), _number(row["loss_kept"], ".1f", 100), _number(row["worst"], ".1f", 100)]
        cells += [_number(row["against"], "+.3f")] if against else []
        cells += [_number(row["score"], ".1f"), _number(row["S"], ".3f"), f"{100 * row['storage']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(results: Mapping[str, dict[str, Any]]) -> str:
    first = next(iter(results.values()))
    counts = sorted({len(task["nll"]) for task in first["tasks"].values()})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tasks = len(first["tasks"])
    split, model = first["conditions"]["split"], first["model"]["base"]
    return (
        f"{tasks} tasks, {span} examples of the {split} split per task, {model}. "
        "Loss in nats per token, mean over tasks; 95 % intervals in brackets, over resampled examples."
    )


def _number(stated: tuple[float, float, float] | None, form: str, factor: float = 1.0) -> str:
    if stated is None:
        return "–"
    value, low, high = (format(factor * x, form) for x in stated)
    return f"{value} ({low} … {high})"


def plot(
    suite: Suite, results: Mapping[str, dict[str, Any]], path: Path, x: str = "storage", y: str = "loss_kept"
) -> None:
    """Plot y against x, one line per method and merge; the file's extension sets the format.

    `x` is storage or a numeric option; `y` is loss, loss_kept, score or S. Raises UsageError if there is nothing
    to draw, MissingExtra (`report`), DiskError.
    """
    lines = _lines(suite, results, x, y)
    if not lines:
        raise UsageError(f"no result has both {x} and {y}", where=suite.name, cure="lorashelf bench status SUITE")
    try:
        from matplotlib.backend_bases import FigureCanvasBase
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra("a plot", "matplotlib", "report") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lstrip(".") not in kinds:
        cure = f"one of {', '.join(sorted(kinds))}"
        raise UsageError(f"cannot draw {path.suffix or 'a file without an extension'}", where=str(path), cure=cure)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    marks = "os^Dvp*Xh<>"
    for number, (label, points) in enumerate(sorted(lines.items())):
        xs, stated = zip(*sorted(points), strict=True)
        values = [s[0] for s in stated]
        errors = [[s[0] - s[1] for s in stated], [s[2] - s[0] for s in stated]]
        style: dict[str, Any] = {"marker": marks[number % len(marks)], "linestyle": "-" if len(points) > 1 else "none"}
        axes.errorbar(xs, values, yerr=errors, label=label, markersize=5, linewidth=1.2, capsize=2, **style)
    axes.set_xlabel("storage, share of all adapters" if x == "storage" else x)
    axes.set_ylabel({"loss": "loss, nats per token", "loss_kept": "loss kept", "score": "score"}.get(y, y))
    axes.set_title(suite.title or suite.name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix.lstrip("."))
    atomic.replace_file(path, drawn.getvalue(), path.absolute().parent)


def _lines(
    suite: Suite, results: Mapping[str, dict[str, Any]], x: str, y: str
) -> dict[str, list[tuple[float, Sequence[float]]]]:
    """Return label → points (x, (value, low, high))."""
    cells = groups(suite, results)
    found: dict[str, list[tuple[float, Sequence[float]]]] = {}
    for row in rows(suite, results):
        cell = cells[row["method"], row["merge"], row["options"]][0]
        place = row["storage"] if x == "storage" else cell.options.get(x)
        if isinstance(place, int | float) and not isinstance(place, bool) and row[y] is not None:
            label = " ".join([row["method"], row["merge"], *cell.particulars((*_APART, x, *_SIZES))]).strip()
            found.setdefault(label, []).append((place, row[y]))
    return found
