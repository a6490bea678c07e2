"""The commands on suites of experiments: run, status, table, plot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..atomic import expanded, replace_file
from ..bench import page
from ..bench.plot import drawn
from ..bench.results import read_results
from ..bench.run import run as measure
from ..bench.run import status as standing
from ..bench.suite import Cell, Suite, read_suite
from ..errors import UsageError
from ..formats.objects import CONFIG_FILE
from ..lora.adapter import Adapter
from ..report.formats import format_of
from ..tasks.folders import Task, read_tasks
from . import arguments as arg
from .output import counted, duration, note, show, table

SuitePath = Annotated[Path, typer.Argument(help="A suite's TOML file.", metavar="SUITE", show_default=False)]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Folder of the results, shared with no suite; default: SUITE.results beside the suite."
    ),
]


def run(
    suite: SuitePath,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="Folder with a PEFT folder per task; default: the suite's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with a task folder per task; default: the suite's.")
    ] = None,
    output: Output = None,
    priority: Annotated[
        int | None, typer.Option("--priority", help="Measure the cells up to this priority only; default: all.")
    ] = None,
    device: arg.Device = None,
    json: arg.Json = False,
) -> None:
    """Measure the remaining cells. Can be interrupted at any time, and run in several processes."""
    from ..models.protocol import Scores
    from . import base

    opened = _opened(suite, output)
    numbers = sorted({cell.priority for cell in opened.cells})
    if priority is not None and priority < numbers[0]:
        listed = ", ".join(map(str, numbers))
        raise UsageError(f"no cell has a priority up to {priority}", where=str(suite), cure=f"choose from {listed}")
    own, tasks = _inputs(opened, adapters, data)
    model = base.open_named(opened.base, Scores, device=device, dtype=opened.model_dtype, template=None)
    model.fits(own)
    done = []
    for cell, result in measure(opened, own, tasks, model, output or opened.folder, _watch, priority):
        note(f"{cell.label}: measured in {duration(result['seconds'])}")
        done.append(cell.id)
    document = {**standing(opened, output or opened.folder), "measured": done}
    show(document, json, _standing)


def status(suite: SuitePath, output: Output = None, json: arg.Json = False) -> None:
    """Print which cells are measured or being measured, and the estimated time for the rest."""
    opened = _opened(suite, output)
    show(standing(opened, output or opened.folder), json, _standing)


def results_table(suite: SuitePath, output: Output = None, json: arg.Json = False) -> None:
    """Print the results as a Markdown table with 95 % intervals."""
    opened = _opened(suite, output)
    results = read_results(opened, output or opened.folder)
    show(page.rows(opened, results), json, lambda rows: page.table(opened, results, rows))


def plot(
    suite: SuitePath,
    file: Annotated[Path, typer.Option("--file", help="The picture: svg, png or pdf.", show_default=False)],
    x: Annotated[str, typer.Option("--x", help="storage, or an option that is a number.")] = "storage",
    y: Annotated[str, typer.Option("--y", help="loss, loss_kept, score or S.")] = "loss_kept",
    dark: Annotated[bool, typer.Option("--dark", help="Draw on a dark background.")] = False,
    output: Output = None,
) -> None:
    """Draw results against storage or against an option."""
    opened = _opened(suite, output)
    if y not in ("loss", "loss_kept", "score", "S"):
        raise UsageError(f"--y is {y!r}", cure="choose from loss, loss_kept, score, S")
    picture = drawn(opened, read_results(opened, output or opened.folder), format_of(file, "plot"), x, y, dark)
    replace_file(file, picture, file.parent)
    note(f"written: {file}")


def _opened(path: Path, output: Path | None) -> Suite:
    """Read a suite; results elsewhere may be of other adapters, so that none of other suites count."""
    suite = read_suite(path)
    return replace(suite, shared=()) if output else suite


def _inputs(suite: Suite, adapters: Path | None, data: Path | None) -> tuple[dict[str, Adapter], dict[str, Task]]:
    """Read the adapters and tasks of the suite, or of all tasks that have both. Raises UsageError."""
    folder, examples = adapters or suite.adapters, data or suite.data
    lacking = [name for name, path in (("adapters", folder), ("data", examples)) if path is None]
    if folder is None or examples is None:
        what = f"the suite does not set {' and '.join(lacking)}"
        raise UsageError(what, cure=f"give {' and '.join(f'--{name} DIR' for name in lacking)}")
    folder, examples = expanded(folder), expanded(examples)
    folders = {"a folder of PEFT folders: --adapters DIR": folder, "a folder of task folders: --data DIR": examples}
    missing = {cure: path for cure, path in folders.items() if not path.is_dir()}
    if missing:
        where = ", ".join(map(str, missing.values()))
        raise UsageError("no such folder", where=where, cure=f"give {' and '.join(missing)}")
    tasks = read_tasks(examples)
    both = sorted(name for name in tasks if (folder / name / CONFIG_FILE).exists())
    wanted = suite.tasks or tuple(both)
    absent = sorted({*wanted, *(suite.measured_tasks or ())} - set(both))
    if absent or not wanted:
        what = f"no adapter or no examples for {', '.join(absent) or 'any task'}"
        raise UsageError(what, where=f"{folder}, {examples}", cure="name each adapter's folder after its task")
    named = arg.read_named([f"{name}={folder / name}" for name in wanted])
    return named, {name: tasks[name] for name in wanted}


def _watch(cell: Cell, steps: Sequence[Any]) -> Iterable[Any]:
    other = "search" if cell.how == "search" else "fit"
    return counted(steps, lambda step: f"{cell.label}: {getattr(step, 'what', other)} {_task_of(step)}")


def _task_of(step: Any) -> str:
    return step.task.name if hasattr(step, "task") else f"number {step + 1}"


def _standing(document: dict[str, Any]) -> list[Any]:
    left = document["seconds_left"]
    rest = "" if document["done"] == document["of"] else f"; about {duration(left)} left" if left is not None else ""
    rows = [(cell["state"], cell["label"]) for cell in document["cells"]]
    parts = [
        (str(p["priority"]), f"{p['left']} of {p['of']}", _hours(p["seconds_left"])) for p in document["priorities"]
    ]
    by_priority = [table(["priority", "cells left", "hours left"], parts)] if len(parts) > 1 else []
    return [
        table(["state", "cell"], rows),
        *by_priority,
        f"{document['done']} of {document['of']} cells measured{rest}",
    ]


def _hours(seconds: float | None) -> str:
    return "unknown" if seconds is None else f"{seconds / 3600:.1f}"


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "run": (run, "lorashelf bench run suites/small.toml"),
    "status": (status, "lorashelf bench status suites/small.toml"),
    "table": (results_table, "lorashelf bench table suites/small.toml"),
    "plot": (plot, "lorashelf bench plot suites/small.toml --file kept.svg"),
}
