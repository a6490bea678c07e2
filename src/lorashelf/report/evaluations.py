"""Earlier evaluations in a shelf's report: which of them are of the shelf, and their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..evaluation.files import read_result
from ..evaluation.table import columns_of, lines_below
from ..shelf.snapshot import Snapshot

SHELF, OWN, BARE, OTHER = "through this shelf", "the tasks' own adapters", "the bare base model", ""


@dataclass(frozen=True, slots=True)
class EvaluationTable:
    """An evaluation as a report shows it."""

    id: str
    name: str
    of: str
    """What was measured, in a few words."""
    about: str
    columns: Mapping[str, Sequence[str]]
    """Column → cells; the names of columns of numbers start with '>'."""
    lines: Sequence[str]

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The cells of every task."""
        return list(zip(*self.columns.values(), strict=True))


def evaluation_tables(paths: Sequence[Path], snapshot: Snapshot) -> list[EvaluationTable]:
    """Read the documents of `eval --json` for a report on this shelf.

    Raises UsageError naming every file that is not an evaluation, or is one of another shelf.
    """
    found, faults = list[EvaluationTable](), list[UsageError]()
    for number, path in enumerate(paths, 1):
        try:
            found.append(_table(f"evaluation-{number}", path, snapshot))
        except UsageError as error:
            faults.append(error)
    if len(faults) == 1:
        raise faults[0]
    if faults:
        what = "; ".join(f"{fault.where}: {fault.what}" for fault in faults)
        raise UsageError(what, cure="\n".join(dict.fromkeys(fault.cure for fault in faults if fault.cure)))
    return found


def _table(identity: str, path: Path, snapshot: Snapshot) -> EvaluationTable:
    document = read_result(path)
    of, lines = _measured(document, path, snapshot)
    try:
        columns, below = columns_of(document), lines_below(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what, cure = f"this is not a whole evaluation: {error!r}", "give the output of `lorashelf eval --json`"
        raise UsageError(what, where=str(path), cure=cure) from error
    about = f"{document['split']} split, {document['base']}"
    return EvaluationTable(identity, path.name, of, about, columns, [*below, *lines])


def _measured(document: Mapping[str, Any], path: Path, snapshot: Snapshot) -> tuple[str, list[str]]:
    """Return what was measured, and a line on tasks that were measured with another adapter than the shelf's.

    Raises UsageError if that is all of them.
    """
    served = {task: _with(snapshot, task, record.get("adapter")) for task, record in document["tasks"].items()}
    kinds = {kind for kind in served.values() if kind != OTHER}
    if not kinds:
        what = "this is an evaluation of another shelf, or of an earlier state: none of its adapters is on this shelf"
        raise UsageError(what, where=str(path), cure=f"measure this one: lorashelf eval {snapshot.path} --data DIR")
    others = sorted(task for task, kind in served.items() if kind == OTHER)
    lines = [f"not with an adapter that is on this shelf: {', '.join(others)}"] if others else []
    return " and ".join(kind for kind in (SHELF, OWN, BARE) if kind in kinds), lines


def _with(snapshot: Snapshot, task: str, digest: str | None) -> str:
    """Return what a task was measured with: the adapter of this digest, None for the bare base."""
    slot = snapshot.manifest.slot_of(task)
    if slot is None:
        return OTHER
    if digest is None:
        return BARE
    if digest == snapshot.adapter(task).digest:
        return SHELF
    return OWN if any(digest == source.digest for source in slot.history.merged) else OTHER
