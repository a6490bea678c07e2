"""Commands on a shelf: init, add, update, remove, route, ls, log, verify, undo, gc."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import router
from ..adapter import Adapter
from ..errors import Interrupted, LorashelfError, TaskNameError, UsageError
from ..flow import plan_add, plan_remove, plan_update
from ..manifest import Manifest, Plan, task_name
from ..peft_format import read_adapter
from ..recipe import new_settings
from ..shelf import Shelf
from ..snapshot import Snapshot
from . import arguments as arg
from .output import note, progress, score, show, size, table

Task = Annotated[str, typer.Argument(help="A task on the shelf.", metavar="TASK", show_default=False)]


def init(
    shelf: arg.ShelfPath,
    slots: arg.Slots,
    bytes: arg.Bytes = None,
    policy: Annotated[
        str, typer.Option("--policy", help="kmerge++, kmerge; half, random, oracle, all for experiments.")
    ] = "kmerge++",
    threshold: Annotated[str, typer.Option("--threshold", help="For kmerge++: a similarity, or 'auto'.")] = "auto",
    held_out: arg.HeldOut = None,
    merge: arg.Merge = "linear",
    parameter: arg.Parameters = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    keep: arg.Keep = 1,
    seed: arg.Seed = 0,
    base: Annotated[str | None, typer.Option("--base-name", help="Accept only adapters of this base model.")] = None,
    base_alias: arg.Aliases = None,
    restore_norm: arg.RestoreNorm = False,
    json: arg.Json = False,
) -> None:
    """Make an empty shelf of K slots."""
    limit = arg.threshold(threshold, held_out)
    settings = new_settings(
        slots,
        bytes=bytes,
        policy=policy,
        threshold=limit,
        merge=merge,
        parameters=arg.parameters(parameter),
        rank=rank,
        dtype=dtype,
        keep=keep,
        seed=seed,
        base=base,
        base_aliases=tuple(base_alias or ()),
        restore_norm=restore_norm,
    )
    made = Shelf.create(shelf, settings).snapshot()
    document = {"shelf": str(shelf), "head": made.head, "slots": slots, "policy": policy, "threshold": limit}
    show(document, json, lambda d: f"{shelf}: {slots} free slots, policy {policy}, threshold {limit}, merge {merge}")


def add(
    shelf: arg.ShelfPath,
    adapters: arg.Adapters,
    task: Annotated[str | None, typer.Option("--task", help="The task's name (one adapter only).")] = None,
    type: Annotated[
        str | None, typer.Option("--type", help="Problem type; default: the name before the first '-'.")
    ] = None,
    task_file: Annotated[
        Path | None,
        typer.Option("--task-file", help="The task.toml to store with a task, or a folder of task folders."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would happen; change nothing.")] = False,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Put adapters on the shelf, in order: each opens a free slot or is folded into the nearest."""
    if task is not None and len(adapters) > 1:
        raise UsageError(f"--task with {len(adapters)} adapters", cure="name each: NAME=ADAPTER")
    names = [task_name(arg.adapter_path(text, task)[0]) for text in adapters]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskNameError(f"several adapters would be {', '.join(map(repr, twice))}", cure="name them: NAME=ADAPTER")
    opened = Shelf(shelf)
    documents: list[dict[str, Any]] = []
    with contextlib.nullcontext() if dry_run else opened.writing(), _telling(opened, documents):
        snapshot = opened.snapshot()
        for text in progress(adapters, "adding"):
            plan = _planned(snapshot, text, task, type, task_file, assume_base)
            documents.append({**plan.report, "head": None})
            if not dry_run:
                documents[-1]["head"] = opened.commit(plan)
            snapshot = snapshot.after(plan) if dry_run else opened.snapshot()
            if plan.refused is not None:
                break
    show(documents[0] if len(adapters) == 1 else documents, json, lambda _: [_added(d) for d in documents])
    if documents[-1]["decision"] == "refuse":
        note(f"lorashelf: refused: {documents[-1]['reason']}")
        raise typer.Exit(4)


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
    new, old = _read(adapter), _read(was) if was else None
    note_unknown_base({task: new})
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
    original = _read(adapter) if adapter else None
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


def note_unknown_base(named: Mapping[str, Adapter]) -> None:
    """Warn of adapters that name no base: only their shapes can be checked."""
    for name, adapter in named.items():
        if not adapter.base.name:
            note(f"{name}: its config names no base model; only shapes can be checked")


@contextlib.contextmanager
def _telling(shelf: Shelf, documents: list[dict[str, Any]]) -> Iterator[None]:
    """When a later adapter fails, say which ones are on the shelf already."""
    try:
        yield
    except (LorashelfError, KeyboardInterrupt) as error:
        with contextlib.suppress(LorashelfError):  # a commit may have been made, and not been told
            now = shelf.snapshot()
            for document in documents[-1:]:
                if document["task"] in now.manifest.tasks:
                    document["head"] = document["head"] or now.head
        done = [d for d in documents if d["head"]]
        if done:
            note(f"added before that, and kept: {', '.join(d['task'] for d in done)}")
        if isinstance(error, LorashelfError):
            error.done = {"added": done}
            raise
        cure = "run the command again" + (" without those that are added" if done else "")
        stopped = Interrupted("interrupted; what was committed stays", cure=cure)
        stopped.done = {"added": done}
        raise stopped from None


def _planned(
    snapshot: Snapshot, text: str, task: str | None, kind: str | None, task_file: Path | None, assume_base: bool
) -> Plan:
    name, path = arg.adapter_path(text, task)
    adapter = read_adapter(path)
    note_unknown_base({name: adapter})
    details: Mapping[str, Any] = {}
    if task_file:
        from ..tasks import fields_for

        details = fields_for(task_file, name)
    plan = plan_add(snapshot, adapter, name, type=kind, details=details, assume_base=assume_base)
    if plan.report["decision"] == "fold":
        averaged = "folded" if plan.report["merged"] else "already averaged in, so only routed"
        note(f"{plan.report['task']}: {averaged}; keep your original: `update` and an exact `remove` need it")
    return plan


def _added(document: dict[str, Any]) -> str:
    if document["decision"] == "refuse":
        return f"{document['task']}: refused"
    best = max(document["scores"].values(), default=None)
    limit = f", threshold {score(document['threshold'])}" if document["threshold"] is not None else ""
    with_others = [m for m in document["members"] if m != document["task"]]
    where = (
        f"opens slot {document['slot']}" if document["decision"] == "open" else f"folds into slot {document['slot']}"
    )
    beside = f" with {', '.join(with_others)}" if with_others else ""
    return f"{document['task']}: {where}{beside} (best score {score(best)}{limit})"


def _served(manifest: Manifest) -> dict[str, tuple[int, str, str]]:
    """Task → what it is served by: slot, object, and the digest of its own adapter."""
    return {t: (s.slot, s.object, manifest.tasks[t]["digest"]) for s in manifest.slots for t in s.members}


def _changed_slots(before: Manifest, after: Manifest) -> list[int]:
    """The slots that are not what they were, by id."""
    return sorted({slot.slot for slot in set(before.slots) ^ set(after.slots)})


def _precision(document: dict[str, Any]) -> str:
    return "" if document["precision"] is None else f", to a relative precision of about {document['precision']:.1e}"


def _read(text: str) -> Any:
    return read_adapter(arg.adapter_path(text)[1])


_EXAMPLES: dict[Callable[..., None], str] = {
    init: "lorashelf init my.shelf --slots 5 --dtype f16",
    add: "lorashelf add my.shelf adapters/gec-de adapters/qa-en  ·  lorashelf add my.shelf mail=out/run7 --dry-run",
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
