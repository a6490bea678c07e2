"""An evaluation as people read it: a row per task, and lines below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import numbered


def columns_of(document: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return column → cells, a row per task, within 80 columns of text. Columns of numbers have names that start with
    '>'.
    """
    records = document["tasks"]
    columns = {"task": list(records), ">n": [str(e["n"]) for e in records.values()]}
    columns[">loss"] = [_number(e["loss"], 4) for e in records.values()]
    if document["normalised"] is not None:
        columns[">own"] = [_number(e["own_loss"], 4) for e in records.values()]
        if any(e["zero_shot_loss"] is not None for e in records.values()):
            columns[">zero-shot"] = [_number(e["zero_shot_loss"], 4) for e in records.values()]
            columns[">kept"] = [_number(e["loss_kept"], 3) for e in records.values()]
    if document["average"] is not None:
        columns[">score"] = [_interval(e) for e in records.values()]
        if document["normalised"] is not None:
            columns[">S"] = [_number(e["S"], 3) for e in records.values()]
    return columns


def lines_below(document: Mapping[str, Any]) -> list[str]:
    """Return the lines below the table: the summary, the metrics, and what was left out, with the reason."""
    return [*_summary(document), *_scored_by(document["tasks"]), *_left_out(document)]


def _interval(record: Mapping[str, Any]) -> str:
    """Return a score with its 95 % interval."""
    return "-" if record["score"] is None else f"{record['score']:.1f} [{record['low']:.1f}, {record['high']:.1f}]"


def _summary(document: Mapping[str, Any]) -> Sequence[str]:
    parts = [f"{numbered(len(document['tasks']), 'task')}: average loss {_number(document['average_loss'], 4)}"]
    parts.append(f"average score {_number(document['average'], 1)}")
    if document["normalised"] is not None:
        parts += [
            f"{name} {_number(document['normalised'][key], 3)}"
            for name, key in (("S", "S"), ("loss kept", "loss_kept"))
        ]
    if document["storage"] is not None:
        parts.append(f"storage {100 * document['storage']:.0f} %")
    return [", ".join(parts)]


def _scored_by(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a line per metric with the tasks scored by it."""
    by_metric = _grouped({name: e["metric"] for name, e in records.items() if e["metric"]})
    return [f"scored by {metric}: {', '.join(tasks)}" for metric, tasks in by_metric.items()]


def _left_out(document: Mapping[str, Any]) -> list[str]:
    """Return a line per reason with the tasks that were not measured or not counted."""
    lines = [f"not measured, {why}: {', '.join(tasks)}" for why, tasks in _grouped(document["left_out"]).items()]
    kept = document["normalised"]["left_out"] if document["normalised"] is not None else {}
    return lines + [f"not in {_NOT_IN[name]}: {', '.join(tasks)}" for name, tasks in kept.items() if tasks]


def _grouped(labels: Mapping[str, str]) -> dict[str, list[str]]:
    """Group tasks by label."""
    found: dict[str, list[str]] = {}
    for task, label in labels.items():
        found.setdefault(label, []).append(task)
    return found


_NOT_IN = {
    "S": "S, no own score of at least 1 to compare with",
    "loss_kept": "loss kept, no own gain of at least 0.02 nats per token over zero-shot",
}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
