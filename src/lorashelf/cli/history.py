"""Commands on a shelf's history: log, verify, undo, redo, repair, gc."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..documents import Collected, Restored, Verified
from ..errors import numbered
from ..shelf import repair as mended
from ..shelf.log import record as record_of
from ..shelf.manifest import Manifest
from ..shelf.shelf import Shelf
from . import arguments as arg
from .output import show, table


def log(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """List every operation since the shelf was created; `to` is the state that an undo or a redo led to."""
    show(Shelf(shelf).log(), json, _logged)


def verify(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Check every object and kept manifest against its hash, every route, and that no state is missing from the log.

    What is under no hash: the lines of log.jsonl, the settings of shelf.toml.
    """
    problems = Shelf(shelf).verify()
    document: Verified = {"ok": not problems, "problems": problems}
    show(document, json, lambda d: "\n".join(d["problems"]) or "ok")
    if problems:
        raise typer.Exit(4)


def undo(
    shelf: arg.ShelfPath,
    to: Annotated[
        str | None, typer.Option("--to", help="The id of a kept manifest, or its beginning; default: the previous one.")
    ] = None,
    json: arg.Json = False,
) -> None:
    """Go back to the previous state; redo reverts this, until the next change."""
    _restore(shelf, json, lambda opened: opened.undo(to))


def redo(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Go forward to the state that the latest undo left."""
    _restore(shelf, json, Shelf.redo)


def _restore(shelf: Path, json: bool, act: Callable[[Shelf], str]) -> None:
    """Undo or redo, and print what changed."""
    opened = Shelf(shelf)
    with opened.writing():  # no other process commits in between
        before = opened.snapshot()
        head = act(opened)
        after = opened.snapshot()
    served, served_before = _served(after.manifest), _served(before.manifest)
    line = after.timeline
    document: Restored = {
        "head": head,
        "to": line.state,
        "tasks": sorted(after.manifest.tasks),
        "changed": sorted(t for t in served | served_before if served.get(t) != served_before.get(t)),
        "left": sorted(served_before.keys() - served.keys()),
        "returned": sorted(served.keys() - served_before.keys()),
        "slots": _changed_slots(before.manifest, after.manifest),
        "undo": len(line.undo),
        "redo": len(line.redo),
    }
    state = record_of(line.state, after.kept.get(line.state, after.manifest))
    show(document, json, lambda d: f"{shelf}: {_restored(d, state)}")


def repair(
    shelf: arg.ShelfPath,
    adapter: arg.Originals = None,
    json: arg.Json = False,
) -> None:
    """Repair a damaged shelf: its files, and its slots from originals and kept states; lost tasks are unrouted."""
    opened = Shelf(shelf)
    originals = dict(arg.read_named(adapter)) if adapter else {}
    document = mended.repair(opened, originals)
    problems = opened.verify()
    show({**document, "ok": not problems, "problems": problems}, json, lambda d: "\n".join(_repaired(d, shelf)))
    if problems:
        raise typer.Exit(4)


def _repaired(document: dict[str, Any], shelf: Path) -> Iterator[str]:
    """Yield what a repair did, one line per file and slot."""
    yield from document["files"]
    for slot in document["slots"]:
        given, state = ", ".join(slot["given"]), f"the object of state {str(slot['state'])[:15]}…"
        came = {
            "rewritten": "bytes restored" + (f" from the originals of {given}" if given else ""),
            "merged": f"merged again from {'' if slot['state'] is None else state + ' and '}the originals of {given}",
            "earlier": f"restored to {state}",
            "none": "no undamaged copy is left",
        }[slot["how"]]
        tasks = {"serves": slot["tasks"], "no longer routed": slot["unrouted"]}
        routed = "; ".join(f"{what}: {', '.join(names)}" for what, names in tasks.items() if names)
        yield f"slot {slot['slot']}: {came}; {routed}"
    if lost := [task for slot in document["slots"] for task in slot["unrouted"]]:
        yield f"add them again from their adapters: lorashelf add {shelf} {' '.join(f'{t}=ADAPTER' for t in lost)}"
    if document["unused"]:
        yield f"not used, because the shelf has no record of them: {', '.join(document['unused'])}"
    yield from document["problems"]
    if document["states"]:
        yield f"{numbered(len(document['states']), 'damaged state')} no longer kept"
    yield "ok" if document["ok"] else "not everything could be repaired"


def gc(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Delete the remains of a killed command."""
    opened = Shelf(shelf)
    gone = opened.gc()
    document: Collected = {"head": opened.snapshot().head, "deleted": gone}
    show(document, json, lambda d: "\n".join(gone) or "nothing to delete")


def _logged(records: list[dict[str, Any]]) -> Any:
    """Return one row per record, with a column of target states if there are undos."""
    numbers = {record["id"]: record["sequence"] for record in records}
    columns = ["time", "operation", "task", "decision", "slot"]
    went = any("to" in record for record in records)
    rows = []
    for record in records:
        to = record.get("to", "")
        rows.append(
            [
                f"#{record['sequence']}",
                *(str({"decision": record.get("method", ""), **record}.get(column, "")) for column in columns),
                *([f"#{numbers[to]}" if to in numbers else to[:15]] if went else []),
                record["id"][:15],
            ]
        )
    return table([">", *columns, *(["to"] if went else []), "id"], rows)


def _restored(document: Restored, state: dict[str, Any]) -> str:
    """Return one line on what an undo or redo did; `state` is the log's record of the state reached."""
    came = f"{state['operation']} {state.get('task', '')}".rstrip()
    both = {*document["left"], *document["returned"]}
    changes = {
        "left": document["left"],
        "back": document["returned"],
        "changed": [task for task in document["changed"] if task not in both],
    }
    tasks = "; ".join(f"{what}: {', '.join(names)}" for what, names in changes.items() if names) or "no task changed"
    reach = f"{document['undo']} more to undo, {document['redo']} to redo"
    return f"at #{state['sequence']} ({came}, {document['to'][:15]}…); {tasks}; {reach}"


def _served(manifest: Manifest) -> dict[str, tuple[int, str, Mapping[str, Any]]]:
    """Return task → what serves it: slot, object, and the details stored with the task."""
    return {t: (s.id, s.object.id, manifest.tasks[t]) for s in manifest.slots for t in s.members}


def _changed_slots(before: Manifest, after: Manifest) -> list[int]:
    """Return the ids of the slots that changed."""
    return sorted({slot.id for slot in set(before.slots) ^ set(after.slots)})


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "log": (log, "lorashelf log my.shelf"),
    "verify": (verify, "lorashelf verify my.shelf"),
    "undo": (undo, "lorashelf undo my.shelf"),
    "redo": (redo, "lorashelf redo my.shelf"),
    "repair": (repair, "lorashelf repair my.shelf --adapter gec-de=adapters/gec-de"),
    "gc": (gc, "lorashelf gc my.shelf"),
}
