"""Commands on a shelf that stands: update, remove, route, ls, log, verify, undo, gc."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from .. import router
from ..flow import plan_remove, plan_update
from ..manifest import Manifest
from ..shelf import Shelf
from . import arguments as arg
from .output import show, size, table

Task = Annotated[str, typer.Argument(help="A task on the shelf.", metavar="TASK", show_default=False)]


def update(
    shelf: arg.ShelfPath,
    task: Task,
    adapter: Annotated[str, typer.Argument(help="The new PEFT folder.", metavar="ADAPTER", show_default=False)],
    was: Annotated[
        str | None,
        typer.Option("--was", help="The adapter it replaces (needed in a shared slot).", metavar="OLD_ADAPTER"),
    ] = None,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Replace a task's adapter, in its slot."""
    opened = Shelf(shelf)
    new, old = arg.read_one(adapter), arg.read_one(was) if was is not None else None
    arg.note_unknown_base({task: new})
    with opened.writing():
        plan = plan_update(opened.snapshot(), task, new, old, assume_base=assume_base)
        document = {**plan.report, "head": opened.commit(plan)}
    show(document, json, lambda d: f"{task}: replaced in slot {d['slot']}{_precision(d)}")


def remove(
    shelf: arg.ShelfPath,
    task: Task,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="The original, to take it out of a shared slot's average.")
    ] = None,
    json: arg.Json = False,
) -> None:
    """Take a task off the shelf."""
    opened = Shelf(shelf)
    original = arg.read_one(adapter) if adapter is not None else None
    with opened.writing():
        plan = plan_remove(opened.snapshot(), task, original)
        document = {**plan.report, "head": opened.commit(plan)}
    done = {"slot": "its slot is free", "average": "taken out of the average", "route": "no longer routed"}
    show(
        document,
        json,
        lambda d: f"{task}: {done[d['removed']]}{_precision(d)}" + (f" ({d['reason']})" if d["reason"] else ""),
    )


def route(
    shelf: arg.ShelfPath,
    task: Annotated[
        str | None, typer.Argument(help="A task on the shelf; none: all.", metavar="[TASK]", show_default=False)
    ] = None,
    json: arg.Json = False,
) -> None:
    """Which slot serves a task, and where its PEFT folder lies."""
    snapshot = Shelf(shelf).snapshot()
    if task is not None:
        show(router.route(snapshot, task), json, lambda d: d["path"])
        return
    rows = router.routes(snapshot)
    show(
        rows,
        json,
        lambda d: table(["task", ">slot", "path"], [(t, r["slot"], r["path"]) for t, r in sorted(d.items())]),
    )


def ls(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """The slots, what they hold, and what that saves."""
    snapshot = Shelf(shelf).snapshot()
    show(router.listing(snapshot), json, _listed)


def log(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Every operation since the shelf was made."""
    rows = Shelf(shelf).log()
    columns = ["time", "operation", "task", "decision", "slot", "id"]
    show(
        rows,
        json,
        lambda d: table(columns, [[str(e.get(c, ""))[: 15 if c == "id" else None] for c in columns] for e in d]),
    )


def verify(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Check every object and kept manifest against its hash, every route, and that no state is missing from the log.

    What is under no hash: the lines of log.jsonl, the settings of shelf.toml.
    """
    problems = Shelf(shelf).verify()
    show({"ok": not problems, "problems": problems}, json, lambda d: "\n".join(d["problems"]) or "ok")
    if problems:
        raise typer.Exit(4)


def undo(
    shelf: arg.ShelfPath,
    to: Annotated[
        str | None, typer.Option("--to", help="A kept manifest's id, or its beginning; default: the one before.")
    ] = None,
    json: arg.Json = False,
) -> None:
    """Go back to the state before (as a new state: undo again is redo)."""
    opened = Shelf(shelf)
    with opened.writing():  # nobody commits in between
        before = opened.snapshot()
        head = opened.undo(to)
        after = opened.snapshot()
    served, served_before = _served(after.manifest), _served(before.manifest)
    undone = sorted(t for t in served | served_before if served.get(t) != served_before.get(t))
    document = {
        "head": head,
        "to": after.manifest.cause["to"],
        "tasks": sorted(after.manifest.tasks),
        "changed": undone,
        "slots": _changed_slots(before.manifest, after.manifest),
    }
    reach = f"undo reaches {len(after.ancestors)} states back" if after.ancestors else "nothing further back is kept"
    show(
        document,
        json,
        lambda d: f"{shelf}: back at {d['to'][:15]}…, tasks changed: {', '.join(undone) or 'none'}; {reach}",
    )


def gc(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """Delete what a killed command left behind."""
    opened = Shelf(shelf)
    gone = opened.gc()
    document = {"head": opened.snapshot().head, "deleted": gone}
    show(document, json, lambda d: "\n".join(gone) or "nothing to delete")


def _listed(document: dict[str, Any]) -> list[Any]:
    rows = [
        (s["slot"], s["rank"], s["dtype"], size(s["bytes"]), len(s["merged"]), s["members"]) for s in document["slots"]
    ]
    held = sum(slot["bytes"] for slot in document["slots"])
    apart = document["adapter_bytes"]
    share = f" ({100 * held / apart:.0f} %)" if apart else ""
    routed = f" ({document['tasks']} tasks routed)" if document["tasks"] != document["adapters"] else ""
    room = f", budget {size(document['budget']['bytes'])}" if document["budget"]["bytes"] else ""
    return [
        table([">slot", ">rank", "dtype", ">size", ">merged", "members"], rows),
        f"{document['adapters']} adapters{routed} would take {size(apart)}, the shelf takes {size(held)}{share}; "
        f"on disk, with {document['budget']['keep']} state(s) of history, {size(document['bytes'])}{room}; "
        f"{len(rows)} of {document['budget']['slots']} slots filled",
    ]


def _served(manifest: Manifest) -> dict[str, tuple[int, str, str]]:
    """Task → what it is served by: slot, object, and the digest of its own adapter."""
    return {t: (s.slot, s.object, manifest.tasks[t]["digest"]) for s in manifest.slots for t in s.members}


def _changed_slots(before: Manifest, after: Manifest) -> list[int]:
    """The slots that are not what they were, by id."""
    return sorted({slot.slot for slot in set(before.slots) ^ set(after.slots)})


def _precision(document: dict[str, Any]) -> str:
    return "" if document["precision"] is None else f", to a relative precision of about {document['precision']:.1e}"


_EXAMPLES: dict[Callable[..., None], str] = {
    update: "lorashelf update my.shelf gec-de out/gec-de-v2 --was out/gec-de",
    remove: "lorashelf remove my.shelf gec-de --adapter adapters/gec-de",
    route: "lorashelf route my.shelf gec-de",
    ls: "lorashelf ls my.shelf",
    log: "lorashelf log my.shelf",
    verify: "lorashelf verify my.shelf",
    undo: "lorashelf undo my.shelf",
    gc: "lorashelf gc my.shelf",
}


def enter(app: typer.Typer) -> None:
    """Enter the commands of this module."""
    for command, example in _EXAMPLES.items():
        app.command(epilog=f"Example:  {example}", rich_help_panel="The shelf")(command)
