"""Results for people: a Markdown table with paired intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .results import Sample, Vector, interval, mean_over_tasks, normalised_score, sampled, shares_kept
from .suite import Cell, Suite

APART = ("merge", "seed")
"""Options with a column of their own."""
Group = tuple[str, str, str]  # method, merge, other options


def groups(suite: Suite, results: Mapping[str, dict[str, Any]]) -> dict[Group, list[Cell]]:
    """Group the measured cells that differ only in the seed."""
    found: dict[Group, list[Cell]] = {}
    for cell in suite.cells:
        if cell.id in results:
            merge = cell.options.get("merge", "")
            found.setdefault((cell.method, merge, " ".join(cell.particulars(apart(cell)))), []).append(cell)
    return found


def apart(cell: Cell) -> tuple[str, ...]:
    """Return the options that do not distinguish the rows of cells like this: after few arrivals, each seed has tasks
    of its own.
    """
    return ("merge",) if "after" in cell.options else APART


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
        worst, worst_task = _worst(sample, own, zero)
        reference = samples.get(_reference(suite, grouped, cells[0]))
        found.append(
            {
                "method": method,
                "merge": merge,
                "options": options,
                "seeds": len(cells),
                "loss": _stated(mean_over_tasks(sample.losses)),
                "loss_kept": _stated(mean_over_tasks(shares)),
                "spread": _spread(sample, own, zero),
                "worst": _stated(worst),
                "worst_task": worst_task,
                "against": _stated(_difference(sample.losses, reference.losses)) if reference else None,
                "score": _stated(mean_over_tasks(sample.scores)),
                "score_against": _stated(_difference(sample.scores, reference.scores)) if reference else None,
                "S": _stated(normalised_score(sample.scores, own.scores)) if own else None,
                "storage": _storage(sample),
                "evaluations": _evaluations(sample),
                "minutes": float(np.mean([result["seconds"] for result in sample.results])) / 60,
                "slots": cells[0].options.get("slots"),
                "percent": cells[0].options.get("percent"),
                "after": cells[0].options.get("after"),
            }
        )
    return sorted(found, key=lambda row: (row["merge"], row["loss"][0]))


def _worst(sample: Sample, own: Sample | None, zero: Sample | None) -> tuple[Vector | None, str | None]:
    """Return the loss kept of each repetition's worst task, mean over the repetitions, and the names of these tasks.

    Tasks averaged over repetitions before the worst one is taken would hide that of each.
    """
    found: list[tuple[str, Vector]] = []
    for result in sample.results:
        shares = shares_kept(Sample((result,)).losses, own.losses, zero.losses) if own and zero else {}
        found += sorted(shares.items(), key=lambda item: item[1][0])[:1]
    if not found:
        return None, None
    return np.asarray(np.mean([values for _, values in found], axis=0)), ", ".join(dict(found))


def _reference(suite: Suite, grouped: Mapping[Group, Sequence[Cell]], cell: Cell) -> Group:
    """Return the group that a cell is compared with: the reference's, with the cell's merge and with the cell's values
    of those options that the reference has; ("", "", "") for the reference itself.
    """
    if cell.method == suite.reference:
        return "", "", ""
    known = {name for (method, *_), cells in grouped.items() if method == suite.reference for name in cells[0].options}
    others = cell.particulars((*apart(cell), *(cell.options.keys() - known)))
    return suite.reference or "", cell.options.get("merge", ""), " ".join(others)


def _difference(values: Mapping[str, Vector], reference: Mapping[str, Vector]) -> Vector | None:
    """Return the values minus the reference's, on the same resamples; mean over the tasks that both have."""
    return mean_over_tasks({task: values[task] - reference[task] for task in sorted(values.keys() & reference.keys())})


def _spread(sample: Sample, own: Sample | None, zero: Sample | None) -> dict[str, float | None]:
    """Return the standard deviations of loss kept and of the score over seeds, n − 1 in the denominator."""
    kept, scores = [], []
    for losses, scored in sample.alone():
        if own and zero:
            kept.append(mean_over_tasks(shares_kept(losses, _first(own.losses), _first(zero.losses))))
        scores.append(mean_over_tasks(scored))
    return {name: _deviation(values) for name, values in (("loss_kept", kept), ("score", scores))}


def _first(values: Mapping[str, Vector]) -> dict[str, Vector]:
    """Return the values on all examples, without those on resamples."""
    return {task: each[:1] for task, each in values.items()}


def _deviation(values: Sequence[Vector | None]) -> float | None:
    found = [float(each[0]) for each in values if each is not None]
    return float(np.std(found, ddof=1)) if len(found) > 1 else None


def _stated(values: Vector | None) -> tuple[float, float, float] | None:
    return None if values is None else (float(values[0]), *interval(values))


def _storage(sample: Sample) -> float:
    return float(np.mean([result["bytes"] / result["own_bytes"] for result in sample.results]))


def _evaluations(sample: Sample) -> float | None:
    """Return the mean number of distinct losses that a search measured; None without a search of its own."""
    searches = [result["provenance"].get("search") for result in sample.results]
    counts = [search["losses"]["distinct"] for search in searches if search]
    return float(np.mean(counts)) if counts else None


def unmeasured(suite: Suite, results: Mapping[str, dict[str, Any]]) -> str:
    """Return what of a suite was not run, with the command and the suite's estimate of the hours; "" if all was."""
    left = [cell for cell in suite.cells if cell.id not in results]
    if not left:
        return ""
    lines = [
        f"**Not run:** {len(left)} of {len(suite.cells)} cells. `lorashelf bench run suites/{suite.path.name} "
        "--adapters DIR --data DIR` measures these in the order of their priorities, and can be interrupted; the hours "
        "are estimates for one idle core.",
        "",
        "| priority | cells | hours | not run |",
        "|---|---|---|---|",
    ]
    for number in sorted({cell.priority for cell in left}):
        cells = [cell for cell in left if cell.priority == number]
        counts = Counter(" ".join([cell.method, cell.options.get("merge", "")]).strip() for cell in cells)
        names = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in counts.items())
        known = all(cell.hours is not None for cell in cells)
        hours = f"{sum(cell.hours or 0.0 for cell in cells):.1f}" if known else "–"
        lines.append(f"| {number} | {len(cells)} | {hours} | {names} |")
    return "\n".join(lines)


def table(suite: Suite, results: Mapping[str, dict[str, Any]], found: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows that were `found` as a Markdown table, below the number of tasks and examples."""
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
    scored = f"score {against}" if any(row["score_against"] for row in found) else None
    heads += ["score", *([scored] if scored else []), "S", "storage %", "model calls", "minutes"]
    lines = [_counts(results), "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found:
        cells = [row["method"], row["merge"] or "–", row["options"] or "–", str(row["seeds"])]
        cells += [
            _number(row["loss"], ".4f"),
            _number(row["loss_kept"], ".1f", 100) + over(row["spread"]["loss_kept"], 100),
        ]
        cells += [_number(row["worst"], ".1f", 100)]
        cells += [_number(row["against"], "+.3f")] if against else []
        cells += [
            _number(row["score"], ".1f") + over(row["spread"]["score"]),
            *([_number(row["score_against"], "+.1f")] if scored else []),
            _number(row["S"], ".3f"),
            f"{100 * row['storage']:.1f}",
        ]
        cells += ["–" if row["evaluations"] is None else f"{row['evaluations']:.0f}", f"{row['minutes']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(results: Mapping[str, dict[str, Any]]) -> str:
    first = max(results.values(), key=lambda result: len(result["tasks"]))  # after few arrivals there are fewer tasks
    counts = sorted({len(task["nll"]) for task in first["tasks"].values()})
    span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    tasks = len(first["tasks"])
    split, model = first["conditions"]["split"], first["model"]["base"]
    return (
        f"{tasks} tasks, {span} examples of the {split} split per task, {model}. "
        "Loss in nats per token, mean over tasks; 95 % intervals in brackets, over resampled examples; "
        "± the standard deviation over seeds; the worst task is that of each seed, mean over seeds."
    )


def over(spread: float | None, factor: float = 1.0) -> str:
    """Return the standard deviation over seeds as it follows a value."""
    return "" if spread is None else f" ± {factor * spread:.1f}"


def _number(stated: tuple[float, float, float] | None, form: str, factor: float = 1.0) -> str:
    if stated is None:
        return "–"
    value, low, high = (format(factor * x, form) for x in stated)
    return f"{value} ({low} … {high})"
