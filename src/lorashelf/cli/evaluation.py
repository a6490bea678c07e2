"""`lorashelf eval`: measure a shelf, a folder of adapters or the bare base on tasks."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from json import loads as json_of
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import read_file
from ..errors import LorashelfError, UnknownName, UsageError
from ..evaluation.compare import Evaluation
from ..evaluation.files import FILE, read_result, write_csv, write_result
from ..evaluation.measure import Unit, metrics_of, prepare
from ..evaluation.table import columns_of, lines_below
from ..formats.objects import CONFIG_FILE
from ..lora.adapter import Adapter, BaseId
from ..models.protocol import Scores
from ..result_store import ResultStore, opened
from ..shelf import settings
from ..shelf.routing import storage
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from ..tasks.folders import Task, read_tasks
from ..training.run import RECORD_FILE
from . import arguments as arg
from .base import open_named
from .output import counted, note, show, table

OWN = "own"  # the folder of the own adapters' results in the output folder


def evaluation(
    data: Annotated[Path, typer.Option("--data", help="A folder of task folders, or one.", show_default=False)],
    target: Annotated[
        Path | None,
        typer.Argument(
            help="A shelf, or a folder of PEFT folders named like the tasks; without it: the bare base.",
            metavar="[SHELF|ADAPTERS_DIR]",
            show_default=False,
        ),
    ] = None,
    base: arg.Base = None,
    own: Annotated[
        Path | None,
        typer.Option("--own", help="The tasks' own adapters: an earlier result, or a folder of adapters to measure."),
    ] = None,
    zero_shot: Annotated[Path | None, typer.Option("--zero-shot", help="An earlier result of the bare base.")] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Only these tasks: a,b,…")] = None,
    split: Annotated[str, typer.Option("--split", help="train, validation or test.")] = "validation",
    limit: Annotated[
        int | None, typer.Option("--limit", help="Largest number of examples per task, drawn by the seed.")
    ] = None,
    seed: arg.Seed = 0,
    loss_only: Annotated[bool, typer.Option("--loss-only", help="Measure losses; generate nothing.")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table to this file as well.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for result and predictions; an interrupted run resumes from it."),
    ] = None,
    engine: arg.Engine = "hf",
    device: arg.Device = None,
    model_dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    json: arg.Json = False,
) -> None:
    """Measure loss and score of tasks: through a shelf's slots, with their own adapters, or with the bare base."""
    options: dict[str, Any] = {"split": split, "limit": limit, "seed": seed, "loss_only": loss_only}
    _check_parent(csv)
    chosen = _chosen(read_tasks(data), tasks)
    served = _served(target, chosen)
    compared = _own(own, chosen), read_result(zero_shot) if zero_shot else None
    metrics_of({name: chosen[name] for name in served.adapters.keys() & chosen.keys()}, **options)
    with _kept(output) as journal:
        model = open_named(base, Scores, engine=engine, device=device, dtype=model_dtype, template=template_arg)
        result = _measured(model, served, compared, chosen, options, journal, output)
        if output is not None:
            write_result(result, output)
    for line in result.warnings:
        note(line)
    document = result.document()
    if csv is not None:
        write_csv(document, csv)
    show(document, json, _tables)


@dataclass(frozen=True, slots=True)
class Served:
    """Which adapter serves which task, the share of the adapters' bytes that is stored, and the adapters' origin."""

    adapters: Mapping[str, Adapter | None]
    storage: float | None = None
    aliases: frozenset[str] = frozenset()
    trained: Mapping[str, str] = field(default_factory=dict)
    """Task → the prompt rendering that the adapter was trained with, if a training record has it."""

    def under(self, base: str) -> Mapping[str, Adapter | None]:
        """Return the adapters, with their base renamed to `base` if that is an alias of the shelf's base."""
        if base not in self.aliases:
            return self.adapters
        renamed = {x.digest: replace(x, base=BaseId(base)) for x in self.adapters.values() if x is not None}
        return {name: None if x is None else renamed[x.digest] for name, x in self.adapters.items()}


def _chosen(tasks: Mapping[str, Task], names: str | None) -> Mapping[str, Task]:
    if names is None:
        return tasks
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in tasks]
    if len(unknown) == 1:
        raise UnknownName("task", unknown[0], sorted(tasks))
    if unknown or not wanted:
        what = f"unknown tasks {', '.join(unknown)}" if unknown else "--tasks is empty"
        raise UsageError(what, cure=f"the data contains {', '.join(sorted(tasks))}")
    return {name: tasks[name] for name in wanted}


def _served(target: Path | None, tasks: Mapping[str, Task]) -> Served:
    """Return the adapters of a shelf, of a folder, or, without a target, none."""
    if target is None:
        return Served(dict.fromkeys(tasks))
    if not (target / settings.FILE).exists() and not (target / "HEAD").exists():
        return _adapters_of(target, tasks)
    return Shelf(target).read(lambda snapshot: _served_by(snapshot, tasks))


def _served_by(snapshot: Snapshot, tasks: Mapping[str, Task]) -> Served:
    """Return the adapters of a shelf's slots, for the tasks on the shelf."""
    routed = {name: snapshot.manifest.slot_of(unicodedata.normalize("NFC", name)) for name in tasks}
    adapters = {name: snapshot.adapter(name) for name, slot in routed.items() if slot is not None}
    if not adapters:
        have = ", ".join(sorted(snapshot.manifest.tasks)) or "none"
        cure = "name task folders after the tasks on the shelf"
        raise UsageError(f"none of the tasks is on the shelf, which has {have}", where=str(snapshot.path), cure=cure)
    snapshot.check_bytes(*{slot for slot in routed.values() if slot})  # before a model is loaded
    return Served(adapters, storage(snapshot), frozenset(snapshot.settings.base_aliases))


def _adapters_of(folder: Path, tasks: Mapping[str, Task]) -> Served:
    """Read the adapters in a folder that are named after a task, or the folder itself if it is an adapter."""
    one = (folder / CONFIG_FILE).exists()
    folders = (
        {os.path.basename(os.path.abspath(folder)): folder} if one else {name: folder / name for name in sorted(tasks)}
    )
    found = {name: path for name, path in folders.items() if name in tasks and (path / CONFIG_FILE).exists()}
    if not found:
        names = ", ".join(sorted(tasks))
        cure = "give a shelf, or a folder of PEFT folders named after the tasks"
        raise UsageError(f"no adapter here for any of {names}", where=str(folder), cure=cure)
    named = arg.read_named([f"{name}={path}" for name, path in found.items()])
    arg.note_adapters(named)
    prompts = {name: _trained_under(path) for name, path in found.items()}
    return Served(named, storage=1.0, trained={name: prompt for name, prompt in prompts.items() if prompt is not None})


def _trained_under(folder: Path) -> str | None:
    """Return the prompt rendering in the training record of an adapter's folder; None without one."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return str(json_of(read_file(folder / RECORD_FILE))["settings"]["prompt"])
    return None


def _own(path: Path | None, tasks: Mapping[str, Task]) -> Mapping[str, Any] | Served | None:
    """Return what --own gives: an earlier result's document, or adapters to measure."""
    if path is None:
        return None
    if path.is_dir() and not (path / FILE).exists():
        return _adapters_of(path, tasks)
    return read_result(path)


def _measured(
    model: Scores,
    served: Served,
    compared: tuple[Mapping[str, Any] | Served | None, Mapping[str, Any] | None],
    tasks: Mapping[str, Task],
    options: Mapping[str, Any],
    journal: ResultStore,
    output: Path | None,
) -> Evaluation:
    """Measure the target, and before that the own adapters if their folder is given."""
    own, zero_shot = compared
    name = model.name
    for task, prompt in {**served.trained, **(own.trained if isinstance(own, Served) else {})}.items():
        if prompt != model.prompt_id:
            note(f"{task}: trained with the prompt rendering {prompt}, measured with {model.prompt_id}")
    prepared = prepare(model, served.under(name), tasks, **options)
    if isinstance(own, Served):
        shared = {task: tasks[task] for task in tasks if task in served.adapters}
        mine = prepare(model, own.under(name), shared, **options)
        separate = mine.measured(model, journal, partial(counted, describe=partial(_described, "own adapters")))
        if output is not None:
            write_result(separate, output / OWN)
        own = separate.document()
    result = prepared.measured(model, journal, partial(counted, describe=partial(_described, "measuring")))
    return replace(result, storage=served.storage).compared(own, zero_shot)


def _described(title: str, unit: Unit) -> str:
    return f"{title}: {unit.what} of {unit.task.name}"


@contextlib.contextmanager
def _kept(output: Path | None) -> Iterator[ResultStore]:
    """Open the journal of the output folder for the block; on an interrupt, print what is kept."""
    with opened(output) as journal:
        try:
            yield journal
        except (LorashelfError, KeyboardInterrupt):
            if journal.written:
                note(
                    f"{journal.written} results are kept in {output}: run the same command again to resume"
                    if output
                    else "nothing is kept: with -o FOLDER the command could be resumed"
                )
            raise


def _check_parent(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError("the table cannot be written there", where=str(path), cure="name a file in an existing folder")


def _tables(document: dict[str, Any]) -> list[Any]:
    """Return a table with one row per task, within 80 columns, and a summary below."""
    columns = columns_of(document)
    return [table(list(columns), zip(*columns.values(), strict=True)), *lines_below(document)]


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "eval": (evaluation, "lorashelf eval my.shelf --data tasks --own adapters --zero-shot zero.json -o out"),
}
