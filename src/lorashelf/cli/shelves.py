"""Commands on a filled shelf: update, remove, route, ls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..documents import Listing
from ..errors import UsageError, numbered
from ..report.decisions import coded_lines, rate_cells
from ..report.numbers import size
from ..shelf import routing
from ..shelf.plans import plan_remove, plan_update
from ..shelf.shelf import Shelf
from . import arguments as arg
from .output import show, table

Task = Annotated[str, typer.Argument(help="A task on the shelf.", metavar="TASK", show_default=False)]


def update(
    shelf: arg.ShelfPath,
    task: Task,
    adapter: Annotated[str, typer.Argument(help="The new adapter.", metavar="ADAPTER", show_default=False)],
    was: Annotated[
        str | None,
        typer.Option("--was", help="The adapter to replace (needed in a shared slot).", metavar="OLD_ADAPTER"),
    ] = None,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Replace a task's adapter, in its slot."""
    opened = Shelf(shelf)
    new, old = arg.read_one(adapter), arg.read_one(was) if was is not None else None
    arg.note_adapters({task: new})
    with opened.writing():
        plan = plan_update(opened.snapshot(), task, new, old, assume_base=assume_base)
        arg.note_untrained({task: new})
        document = {**plan.report, "head": opened.commit(plan)}
    show(document, json, _updated)


def remove(
    shelf: arg.ShelfPath,
    task: Task,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="The original adapter, to take it out of a shared slot's average.")
    ] = None,
    json: arg.Json = False,
) -> None:
    """Remove a task from the shelf."""
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
        str | None, typer.Argument(help="A task on the shelf; without it: all.", metavar="[TASK]", show_default=False)
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Check the bytes of the folder against their hash.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the task's PEFT folder here (with TASK).")
    ] = None,
    json: arg.Json = False,
) -> None:
    """Print the PEFT folder that serves a task; for a coded slot it is written to a cache or to --output.

    The cache keeps the 64 folders used last.
    """
    if task is not None:
        answer = Shelf(shelf).read(lambda s: routing.materialised(s, task, output, verify=verify))
        show(answer, json, lambda d: d["path"])
        return
    if output is not None:
        raise UsageError("--output is for one task", cure="lorashelf route SHELF TASK --output DIR")
    rows = Shelf(shelf).read(lambda s: routing.routes(s, verify=verify))
    show(
        rows,
        json,
        lambda d: table(["task", ">slot", "path"], [(t, r["slot"], r["path"] or "-") for t, r in sorted(d.items())]),
    )


def ls(shelf: arg.ShelfPath, json: arg.Json = False) -> None:
    """List the slots, their tasks, and the bytes saved."""
    show(Shelf(shelf).read(routing.listing), json, _listed)


def _updated(document: dict[str, Any]) -> str:
    if "coded" in document:
        return coded_lines(document, "replaced, ")[0]
    return f"{document['task']}: replaced in slot {document['slot']}{_precision(document)}"


def _listed(document: Listing) -> list[Any]:
    coded = any("percent" in slot for slot in document["slots"])
    rows = [
        (
            *(s["slot"], s["rank"], s["dtype"], size(s["bytes"]), len(s["merged"]), s["members"]),
            *((rate_cells(s)[1:] if "percent" in s else ("", "")) if coded else ()),
        )
        for s in document["slots"]
    ]
    held = sum(slot["bytes"] for slot in document["slots"])
    apart = document["adapter_bytes"]
    share = f" ({100 * held / apart:.0f} %)" if apart else ""
    routed = f" ({numbered(document['tasks'], 'task')} routed)" if document["tasks"] != document["adapters"] else ""
    room = f", budget {size(document['budget']['bytes'])}" if document["budget"]["bytes"] else ""
    count = document["budget"]["slots"]
    filled = f"{len(rows)} of {numbered(count, 'slot')} filled" if count else numbered(len(rows), "object")
    rates = [">of 16 bits", ">predicted quality"] if coded else []
    return [
        table([">slot", ">rank", "dtype", ">size", ">merged", "members", *rates], rows),
        f"{numbered(document['adapters'], 'adapter')}{routed} would need {size(apart)}, "
        f"the shelf needs {size(held)}{share}; "
        f"on disk, with {numbered(document['budget']['keep'], 'state')} of history, {size(document['bytes'])}{room}; "
        f"{filled}",
    ]


def _precision(document: dict[str, Any]) -> str:
    return "" if document["precision"] is None else f", to a relative precision of about {document['precision']:.1e}"


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "update": (update, "lorashelf update my.shelf gec-de out/gec-de-v2 --was out/gec-de"),
    "remove": (remove, "lorashelf remove my.shelf gec-de --adapter adapters/gec-de"),
    "route": (route, "lorashelf route my.shelf gec-de"),
    "ls": (ls, "lorashelf ls my.shelf"),
}
