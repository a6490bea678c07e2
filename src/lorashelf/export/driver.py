"""The driver of an export: a shelf's objects are written for a target, read back and compared, all or none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .. import atomic
from ..documents import Exported, ExportedObject
from ..errors import AdapterError, Fault, NotExportable, UsageError
from ..lora.algebra import relative_error
from ..shelf.snapshot import Snapshot
from .formats import FORMATS
from .model_card import card_path, model_card
from .target import ROUTES, Item, Target


def export_shelf(
    snapshot: Snapshot,
    output: str | Path,
    format: str,
    options: Mapping[str, str] | None = None,
    *,
    tasks: Sequence[str] = (),
    watch: Callable[[Sequence[Item]], Iterable[Item]] = iter,
) -> Exported:
    """Write the objects of a shelf as a new folder in one of FORMATS, and return its document.

    Every object is read back, and its ΔW compared with the shelf's. `tasks` are those to export, by default all;
    routes.json maps them to files or folders. The folder appears complete or not at all; `watch` wraps the objects
    being written. Raises UsageError if the folder exists and for options that the format does not read, UnknownName,
    NotExportable naming all that the format cannot hold, ModelError for an unusable base, CorruptShelf, DiskError,
    MissingExtra.
    """
    folder, given = atomic.expanded(output), dict(options or {})
    atomic.check_output(folder)
    if unread := sorted(given.keys() - FORMATS[format].options):
        raise _unread(format, unread)
    items = _items(snapshot, tasks)
    base = snapshot.manifest.base
    target = FORMATS[format].target(given, base.name if base and base.name else snapshot.settings.base)
    faults = [fault.at(_shown(item)) for item in items for fault in target.faults(item.adapter)]
    if faults:
        raise NotExportable(faults, where=str(snapshot.path))
    with atomic.appearing(folder) as staged:
        objects = [_object(target, item, staged) for item in watch(items)]
        for item, each in zip(items, objects, strict=True):
            _add_card(snapshot, item, staged / each["path"])
        routes = {task: each["path"] for each in objects for task in each["tasks"]}
        target.finish(routes, staged)
        atomic.write_file(staged / ROUTES, [json.dumps(routes, indent=2, ensure_ascii=False).encode() + b"\n"])
        files = sorted(str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file())
    return {"output": str(folder.absolute()), "format": format, "objects": objects, "routes": routes, "files": files}


def _items(snapshot: Snapshot, tasks: Sequence[str]) -> list[Item]:
    """Return the objects of the tasks by slot, their bytes checked. Raises UnknownName, UsageError, CorruptShelf."""
    known = snapshot.manifest.tasks
    wanted = {task: snapshot.located(task)[0] for task in tasks or known}
    if not wanted:
        raise UsageError("the shelf has no tasks", where=str(snapshot.path), cure="lorashelf add SHELF ADAPTER...")
    slots = sorted(set(wanted.values()), key=lambda slot: slot.id)
    snapshot.check_bytes(*slots)
    chosen = {task for slot in slots for task in slot.members if not tasks or wanted.get(task) is slot}
    return [
        Item(
            f"slot-{slot.id}", slot.id, tuple(t for t in slot.members if t in chosen), snapshot.adapter(slot.members[0])
        )
        for slot in slots
    ]


def _object(target: Target, item: Item, staged: Path) -> ExportedObject:
    """Write and compare an object, and return its document. Raises NotExportable."""
    try:
        written = target.write(item, staged)
    except AdapterError as refused:
        raise NotExportable([fault.at(_shown(item)) for fault in refused.reasons], where=refused.where) from refused
    error = relative_error(item.adapter, written.factors)
    if not error <= written.tolerance:
        what = f"ΔW as read back differs by {error:.1e}, more than {written.tolerance:.0e}"
        raise NotExportable([Fault(what, "choose a type with more bits").at(_shown(item))])
    size = sum(path.stat().st_size for path in (written.path, *written.path.rglob("*")) if path.is_file())
    return {
        "slot": item.slot,
        "tasks": list(item.tasks),
        "path": str(written.path.relative_to(staged)),
        "bytes": size,
        "error": error,
        "tolerance": written.tolerance,
    }


def _add_card(snapshot: Snapshot, item: Item, written: Path) -> None:
    """Write an object's model card, unless its format has one."""
    path = card_path(written)
    if not path.exists():
        atomic.write_file(path, [model_card(snapshot, snapshot.manifest.slot(item.slot), item.tasks).encode()])


def _shown(item: Item) -> str:
    return f"slot {item.slot} ({', '.join(item.tasks)})"


def _unread(format: str, unread: Sequence[str]) -> UsageError:
    options = ", ".join(f"--{name}" for name in unread)
    readers = [name for name, other in FORMATS.items() if set(unread) <= set(other.options)]
    what = f"--format {format} does not read {options}"
    return UsageError(what, cure=f"omit {options}, or give --format {' or '.join(readers)}")
