"""The command `export`: the objects of a shelf for other runtimes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import numbered
from ..export.driver import export_shelf
from ..export.formats import FORMATS
from ..report.numbers import size
from ..shelf.shelf import Shelf
from . import arguments as arg
from .output import counted, show, table


def _summaries() -> str:
    return "; ".join(f"{name}: {each.summary}" for name, each in FORMATS.items())


def _readers(option: str) -> str:
    return ", ".join(name for name, each in FORMATS.items() if option in each.options)


def export(
    shelf: arg.ShelfPath,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to create.", show_default=False)],
    format: Annotated[str, typer.Option("--format", help=f"{_summaries()}.", show_default=False)],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="Only this task; may be repeated.", metavar="TASK")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            help=f"{_readers('base')}: the base; default of gguf and ollama: the shelf's own (docs/exports.md).",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", help=f"{_readers('arch')}: the base's architecture in llama.cpp, instead of a base."),
    ] = None,
    outtype: Annotated[
        str | None,
        typer.Option("--outtype", help=f"{_readers('outtype')}: f32, f16, q8_0, or auto, the default: f16 if exact."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help=f"{_readers('dtype')}: f32, f16 or bf16 (not onnx); default: as stored."),
    ] = None,
    served_base: Annotated[
        str | None,
        typer.Option(
            "--served-base", help=f"{_readers('served-base')}: the base as it is served; default: the shelf's."
        ),
    ] = None,
    max_lora_rank: Annotated[
        str | None,
        typer.Option(
            "--max-lora-rank", help=f"{_readers('max-lora-rank')}: vLLM's limit; default: the next that fits."
        ),
    ] = None,
    json: arg.Json = False,
) -> None:
    """Write the objects of a shelf for another runtime (docs/exports.md)."""
    given = {
        "base": base,
        "arch": arch,
        "outtype": outtype,
        "dtype": dtype,
        "served-base": served_base,
        "max-lora-rank": max_lora_rank,
    }
    document = Shelf(shelf).read(
        lambda snapshot: export_shelf(
            snapshot,
            output,
            format,
            {name: value for name, value in given.items() if value is not None},
            tasks=task or (),
            watch=lambda items: counted(items, lambda item: f"writing {item.name} for {', '.join(item.tasks)}"),
        )
    )
    show(document, json, _listed)


def _listed(document: dict[str, Any]) -> list[Any]:
    rows = [
        (
            each["path"],
            size(each["bytes"]),
            f"{each['error']:.1e}",
            f"{each['tolerance']:.0e}",
            ", ".join(each["tasks"]),
        )
        for each in document["objects"]
    ]
    count, tasks = numbered(len(rows), "object"), numbered(len(document["routes"]), "task")
    return [
        f"{document['output']}: {count} for {tasks}, read back and compared",
        table(["path", ">size", ">error of ΔW", ">at most", "tasks"], rows),
    ]


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "export": (export, "lorashelf export my.shelf -o gguf --format gguf --base smollm2.gguf"),
}
