"""The command `report`: a shelf as one file for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import typer

from ..report.numbers import size
from ..report.shelf_report import check_report, write_report
from ..shelf.shelf import Shelf
from . import arguments as arg
from .output import show


def report(
    shelf: arg.ShelfPath,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="The file to write: .html or .md.", show_default=False)
    ],
    evaluation: Annotated[
        list[Path] | None,
        typer.Option("--eval", help="An evaluation by `eval --json`, or its folder; may be repeated.", metavar="FILE"),
    ] = None,
    json: arg.Json = False,
) -> None:
    """Write a report on the shelf: tasks, bytes, similarity, history, evaluations. The HTML loads nothing else."""
    check_report(output)
    opened = Shelf(shelf)
    opened.read(lambda snapshot: write_report(snapshot, opened.log(), output, evaluation or ()))
    document = {"output": str(output.absolute()), "bytes": output.stat().st_size}
    show(document, json, lambda d: f"{output}: {size(d['bytes'])}")


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "report": (report, "lorashelf report my.shelf -o report.html --eval result.json"),
}
