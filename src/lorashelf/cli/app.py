"""The application object, with every command entered."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import VERSION
from . import adapters, clustering, demo, evaluation, generation, shelves, training

app = typer.Typer(
    name="lorashelf",
    help="N LoRA adapters, K slots: merge them, keep them safe on disk, route every task to its slot.",
    epilog="First steps:  lorashelf init S --slots 5  ·  lorashelf add S adapters/*  ·  lorashelf route S TASK",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorashelf {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


for module in (shelves, clustering, adapters, training, evaluation, generation, demo):
    module.enter(app)
