"""The command `set`: change what is stored with a task, or the settings of a shelf."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..shelf.plans import plan_set
from ..shelf.settings import SECTIONS, Settings
from ..shelf.shelf import Shelf
from ..tasks.folders import checked_fields, fields_for
from . import arguments as arg
from .output import show

NONE = "none"


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return a parser that keeps the word none."""
    return lambda text: text if text == NONE else parse(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{text!r} is not a whole number", cure="give a number, or none")
    return int(text)


def set_(
    shelf: arg.ShelfPath,
    task: Annotated[
        str | None,
        typer.Argument(help="A task on the shelf; without it: the shelf.", metavar="[TASK]", show_default=False),
    ] = None,
    task_file: Annotated[
        Path | None, typer.Option("--task-file", help="The task.toml to store with the task, or its folder.")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The task's instruction.")] = None,
    type: Annotated[str | None, typer.Option("--type", help="The task's problem type.")] = None,
    language: Annotated[str | None, typer.Option("--language", help="The task's language.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="The task's metric.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="Largest number of tokens of an answer.")
    ] = None,
    slots: Annotated[
        Any,
        typer.Option(
            "--slots", parser=_or_none(_whole), metavar="INT", help="K, the number of slots; none with policy bytes."
        ),
    ] = None,
    bytes: Annotated[
        Any,
        typer.Option(
            "--bytes",
            parser=_or_none(arg.byte_count),
            metavar="SIZE",
            help="Limit for all files at rest; none: no limit.",
        ),
    ] = None,
    keep: Annotated[int | None, arg.KEEP] = None,
    policy: Annotated[str | None, typer.Option("--policy", help="How later adapters are placed.")] = None,
    threshold: arg.Threshold = None,
    floor: arg.Floor = None,
    merge: Annotated[str | None, typer.Option("--merge", help="Merge method of later adds.")] = None,
    parameter: arg.Parameters = None,
    rank: Annotated[
        Any,
        typer.Option("--rank", parser=_or_none(_whole), metavar="INT", help="Cap on the stored rank; none: no cap."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Storage dtype: f32, f16, bf16; none: the adapter's own.")
    ] = None,
    seed: Annotated[int | None, arg.SEED] = None,
    restore_norm: Annotated[
        bool | None, typer.Option("--restore-norm/--no-restore-norm", help="Scale merged slots to the mean norm.")
    ] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="How slots are stored: peft or coded.")] = None,
    quality: Annotated[
        float | None, typer.Option("--quality", help="With coded: the predicted share of each adapter that is kept.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base-name", help="Accept only adapters of this base model; none: any.")
    ] = None,
    base_alias: arg.Aliases = None,
    json: arg.Json = False,
) -> None:
    """Change what is stored with a task (undo reverts it), or the settings of a shelf (in its shelf.toml)."""
    given = {"prompt": prompt, "type": type, "language": language, "metric": metric, "max_new_tokens": max_new_tokens}
    fields = {name: value for name, value in given.items() if value is not None}
    settings = {
        "slots": slots,
        "bytes": bytes,
        "keep": keep,
        "policy": policy,
        "threshold": None if threshold is None else arg.similarity_or_auto(threshold),
        "floor": floor,
        "merge": merge,
        "parameters": None if merge is None and parameter is None else arg.parameters(parameter),
        "rank": rank,
        "dtype": dtype,
        "seed": seed,
        "restore_norm": restore_norm,
        "encoding": encoding,
        "quality": quality,
        "base": base,
        "base_aliases": None if base_alias is None else tuple(base_alias),
    }
    changes = {name: None if value == NONE else value for name, value in settings.items() if value is not None}
    if task is None:
        if fields or task_file:
            raise UsageError("fields of a task are given without a task", cure="lorashelf set SHELF TASK …")
        _set_shelf(shelf, changes, json)
    else:
        if changes:
            named = ", ".join(changes)
            raise UsageError(
                f"settings of the shelf, not of a task: {named}", cure="lorashelf set SHELF … without TASK"
            )
        _set_task(shelf, task, task_file, fields, json)


def _set_task(shelf: Path, task: str, task_file: Path | None, fields: dict[str, Any], json: bool) -> None:
    fields = {**(fields_for(task_file, task) if task_file else {}), **checked_fields(fields)}
    if not fields:
        cure = "give --prompt, --type, --language, --metric, --max-new-tokens, or a --task-file that has this task"
        raise UsageError(f"nothing to store with {task!r}", cure=cure)
    opened = Shelf(shelf)
    with opened.writing():
        plan = plan_set(opened.snapshot(), task, fields)
        document = {**plan.report, "head": opened.commit(plan)}
    show(document, json, lambda d: f"{d['task']}: {', '.join(d['changed'])} stored")


def _set_shelf(shelf: Path, changes: dict[str, Any], json: bool) -> None:
    if not changes:
        raise UsageError("nothing to set", cure="give a setting, such as --keep 3; or a task and its fields")
    opened = Shelf(shelf)
    with opened.writing():
        before = opened.snapshot()
        after = opened.configure(changes)
    was, now = _flat(before.settings), _flat(after)
    changed = {name: [was[name], now[name]] for name in SECTIONS if was[name] != now[name]}
    document = {"head": before.head, "changed": changed, "settings": now}
    listed = ", ".join(f"{name} {_word(old)} → {_word(new)}" for name, (old, new) in changed.items())
    show(document, json, lambda _: f"{shelf}: {listed or 'nothing changed'}")


def _flat(settings: Settings) -> dict[str, Any]:
    """Return every setting by its flat name."""
    outer = {"base": settings.base, "base_aliases": list(settings.base_aliases)}
    stored = {"encoding": settings.merge.encoding, "quality": settings.merge.quality}
    stored |= {"floor": settings.placement.floor, "similarity": settings.placement.similarity}
    return {**settings.budget.document(), **stored, **settings.recipe, **outer}


def _word(value: object) -> str:
    return NONE if value is None or value in ([], {}) else str(value)


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "set": (set_, 'lorashelf set my.shelf qa-de --prompt "Answer."  ·  lorashelf set my.shelf --keep 3 --bytes 80MB'),
}
