"""The commands `pack` and `convert`: a shelf of coded objects from many adapters, or from another shelf, at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..documents.coded import Packed
from ..errors import UsageError, numbered
from ..lora.quality import summary
from ..placement.policies import BYTES
from ..report.decisions import rate_cells
from ..report.numbers import size
from ..shelf.allocation import rate
from ..shelf.creation import check_vacant
from ..shelf.packing import plan_convert, plan_pack
from ..shelf.plans import together
from ..shelf.settings import Settings, new_settings
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from . import arguments as arg
from .output import coding, note, show, table


def pack(
    adapters: arg.Adapters,
    output: arg.NewShelf,
    bytes: Annotated[int, arg.BYTES],
    floor: arg.Floor = None,
    quality: Annotated[
        float | None,
        typer.Option("--quality", help="The highest predicted quality of a task; default 0.997.", show_default=False),
    ] = None,
    task_file: arg.TaskFile = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    keep: arg.Keep = 1,
    base: arg.BaseName = None,
    base_alias: arg.Aliases = None,
    assume_base: arg.AssumeBase = False,
    json: arg.Json = False,
) -> None:
    """Code many adapters into a shelf of limited bytes, shared so that predicted quality is highest."""
    check_vacant(output)
    settings = new_settings(
        None,
        bytes=bytes,
        floor=floor,
        quality=quality,
        rank=rank,
        dtype=dtype,
        keep=keep,
        base=base,
        base_aliases=tuple(base_alias or ()),
    )
    named = arg.read_named(adapters)
    arg.note_adapters(named)
    arg.note_untrained(named)
    together(named, settings, assume_base=assume_base)
    planner = partial(
        plan_pack,
        adapters=named,
        details=arg.details(list(named), task_file),
        assume_base=assume_base,
        watch=coding,
    )
    made, _ = Shelf.create_with(output, settings, planner)
    show(_document(output, made), json, _packed)


def convert(
    shelf: arg.ShelfPath,
    output: arg.NewShelf,
    encoding: Annotated[str, typer.Option("--encoding", help="How tasks are stored in it; coded is the only one.")],
    slots: Annotated[
        int | None,
        typer.Option("--slots", help="K, the number of slots; default without --bytes: SHELF's.", show_default=False),
    ] = None,
    bytes: Annotated[
        int | None,
        typer.Option(
            "--bytes",
            parser=arg.byte_count,
            metavar="SIZE",
            help="Limit for all files of the new shelf at rest; default: SHELF's.",
        ),
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(
            "--floor", help="Without slots: the least predicted quality; default: SHELF's, or 0.8.", show_default=False
        ),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            "--quality",
            help="The predicted quality of every task, at most; default: SHELF's, or where its slots become bytes "
            "0.997, and its bytes slots 0.99.",
            show_default=False,
        ),
    ] = None,
    adapter: arg.Originals = None,
    json: arg.Json = False,
) -> None:
    """Make a shelf with a coded object per task from another shelf, which stays as it is.

    With --bytes and without --slots it counts bytes, not slots. Tasks that share a slot need their originals.
    """
    if encoding != "coded":
        raise UsageError(f"--encoding {encoding!r}", cure="give --encoding coded: a shelf can be converted to no other")
    check_vacant(output)
    held = Shelf(shelf).snapshot()
    settings = _converted(held.settings, slots, bytes, floor, quality)
    if held.settings.merge.restore_norm:
        note("norm restoration is off on the new shelf: coded adapters have a scaling rule of their own")
    originals = arg.read_named(adapter) if adapter else {}
    planner = partial(plan_convert, held=held, originals=originals, watch=coding)
    made, _ = Shelf.create_with(output, settings, planner)
    show(_document(output, made), json, _packed)


def _converted(
    before: Settings, slots: int | None, limit: int | None, floor: float | None, quality: float | None
) -> Settings:
    """Return the settings of the new shelf: what is not given is as in the old one. Raises UsageError."""
    budget, placement = before.budget, before.placement
    by_bytes = slots is None and (limit is not None or placement.by_bytes)
    if floor is not None and not by_bytes:
        cure = "omit --floor, or give --bytes SIZE without --slots"
        raise UsageError("--floor is for a shelf that counts bytes, not slots", cure=cure)
    options = {**before.merge.document(), "encoding": "coded", "quality": quality, "restore_norm": False}
    if by_bytes:
        options |= {"policy": BYTES, "floor": placement.floor if floor is None else floor}
    elif not placement.by_bytes:
        options |= {
            "policy": placement.policy,
            "threshold": placement.threshold,
            "similarity": placement.similarity,
        }
    if quality is None and by_bytes == placement.by_bytes:
        options["quality"] = before.merge.quality
    return new_settings(
        None if by_bytes else budget.slots if slots is None else slots,
        bytes=budget.bytes if limit is None else limit,
        keep=budget.keep,
        base=before.base,
        base_aliases=before.base_aliases,
        **options,
    )


def _document(output: Path, made: Snapshot) -> Packed:
    coded = {task: rate(slot) for slot in made.manifest.slots for task in slot.members}
    kept = {task: found for task, each in coded.items() if (found := each["predicted_quality"]) is not None}
    return {
        "shelf": str(output),
        "head": made.head,
        "bytes": made.bytes,
        "budget": made.settings.budget.document(),
        "predicted_quality": summary(kept) if kept else None,
        "tasks": dict(sorted(coded.items())),
    }


def _packed(document: Packed) -> list[Any]:
    kept, tasks = document["predicted_quality"], document["tasks"]
    rows = [(task, *rate_cells(each)) for task, each in tasks.items()]
    if kept is None:
        return [f"{document['shelf']}: no tasks"]
    room = f" of {size(document['budget']['bytes'])}" if document["budget"]["bytes"] else ""
    line = f"{document['shelf']}: {numbered(len(tasks), 'task')} in {size(document['bytes'])}{room}"
    least = f"predicted quality {kept['mean']:.3f} on average, at least {kept['least']:.3f} ({kept['task']})"
    return [table(["task", ">size", ">of 16 bits", ">predicted quality"], rows), f"{line}; {least}"]


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "pack": (pack, "lorashelf pack adapters/* -o my.shelf --bytes 4MB"),
    "convert": (convert, "lorashelf convert old.shelf -o my.shelf --encoding coded --bytes 4MB"),
}
