"""The command `pack`: a shelf of coded objects from many adapters at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..errors import numbered
from ..shelf.creation import check_vacant
from ..shelf.packing import plan_pack
from ..shelf.plans import together
from ..shelf.settings import new_settings
from ..shelf.shelf import Shelf
from . import arguments as arg
from .output import counted, rate, show, size, table


def pack(
    adapters: arg.Adapters,
    output: Annotated[Path, typer.Option("-o", "--output", help="The shelf to create.", show_default=False)],
    bytes: Annotated[
        int,
        typer.Option(
            "--bytes",
            parser=arg.byte_count,
            metavar="SIZE",
            help="Limit for all files of the shelf at rest: 1600000, 1.6MB, 1.5MiB.",
            show_default=False,
        ),
    ],
    floor: arg.Floor = None,
    quality: Annotated[
        float | None,
        typer.Option("--quality", help="The highest predicted quality of a task; default 0.997.", show_default=False),
    ] = None,
    task_file: arg.TaskFile = None,
    rank: arg.Rank = None,
    dtype: arg.Dtype = None,
    keep: arg.Keep = 1,
    base: Annotated[str | None, typer.Option("--base-name", help="Accept only adapters of this base model.")] = None,
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
        watch=lambda tasks: counted(list(tasks), lambda task: f"coding {task}"),
    )
    made, plan = Shelf.create_with(output, settings, planner)
    coded = plan.report["coded"]
    document = {
        "shelf": str(output),
        "head": made.head,
        "bytes": made.bytes,
        "budget": made.settings.budget.document(),
        "predicted_quality": summary(coded),
        "tasks": coded,
    }
    show(document, json, _packed)


def summary(coded: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean and least predicted quality of tasks, and the task with the least."""
    kept = {task: float(each["predicted_quality"]) for task, each in coded.items()}
    worst = min(kept, key=lambda task: (kept[task], task))
    return {"mean": float(np.mean(list(kept.values()))), "least": kept[worst], "task": worst}


def _packed(document: dict[str, Any]) -> list[Any]:
    kept, tasks = document["predicted_quality"], document["tasks"]
    rows = [(task, *rate(each)) for task, each in tasks.items()]
    return [
        table(["task", ">size", ">of 16 bits", ">predicted quality"], rows),
        f"{document['shelf']}: {numbered(len(tasks), 'task')} in {size(document['bytes'])} of "
        f"{size(document['budget']['bytes'])}; predicted quality {kept['mean']:.3f} on average, at least "
        f"{kept['least']:.3f} ({kept['task']})",
    ]


_EXAMPLES: dict[Callable[..., None], str] = {
    pack: "lorashelf pack adapters/* -o my.shelf --bytes 4MB",
}


def enter(app: typer.Typer) -> None:
    """Register the commands of this module."""
    for command, example in _EXAMPLES.items():
        app.command(epilog=f"Example:  {example}", rich_help_panel="The shelf")(command)
