"""The application: all commands, or only those of the module with the requested command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Annotated, Any

import typer

from ..atomic import expanded
from ..version import VERSION

MODULES: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "filling": ("init", "add"),
        "shelves": ("update", "remove", "route", "ls"),
        "settings": ("set",),
        "history": ("log", "verify", "undo", "redo", "repair", "gc"),
        "clustering": ("cluster",),
        "packing": ("pack", "convert"),
        "export": ("export",),
        "report": ("report",),
        "adapters": ("show", "compare", "plan", "threshold", "merge"),
        "coding": ("compress", "extract"),
        "training": ("train",),
        "evaluation": ("eval",),
        "generation": ("generate",),
        "serving": ("serve",),
        "bench": ("bench",),
        "demo": ("demo",),
    }
)
"""Module → its commands; only the requested module is imported, which halves the start-up time of `add`."""


def application(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line for these words: with every command, unless the first word is a known one."""
    app = typer.Typer(
        name="lorashelf",
        help="N LoRA adapters in K slots or in a number of bytes: merge or code them, keep them safe on disk, route "
        "every task to its adapter.",
        epilog="First steps:  lorashelf init S --slots 5, or --bytes 4MB  ·  lorashelf add S adapters/*  ·  lorashelf "
        "route S TASK",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_options)
    asked = [name for name, commands in MODULES.items() if words and words[0] in commands]
    for name in asked or MODULES:
        _register(app, import_module(f".{name}", __package__))
    return app


def _register(app: typer.Typer, module: ModuleType) -> None:
    """Register the COMMANDS of a module (name → function, example) in its PANEL, in a group if it has a GROUP."""
    if not hasattr(module, "GROUP"):
        for name, (command, example) in module.COMMANDS.items():
            app.command(name, epilog=f"Example:  {example}", rich_help_panel=module.PANEL)(command)
        return
    group = typer.Typer(name=module.__name__.rpartition(".")[2], help=module.GROUP, no_args_is_help=True)
    for name, (command, example) in module.COMMANDS.items():
        group.command(name, epilog=f"Example:  {example}")(command)
    app.add_typer(group, rich_help_panel=module.PANEL)


def command_line(words: Sequence[str] = ()) -> Any:
    """Return the typer command to call with these words. Paths are parsed by `_path`."""
    command = typer.main.get_command(application(words))
    for each in _commands(command):
        for parameter in each.params:
            if parameter.type.name == "path":
                parameter.type.convert = partial(_path, parameter.type.convert)
    return command


def _commands(command: Any) -> Iterator[Any]:
    """Yield a command and its subcommands."""
    yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def _path(convert: Callable[..., Any], text: str | Path, parameter: Any, context: Any) -> Path:
    """Parse a path, expanding ~, which the shell does not do in --option=~/path. An empty path, as from an unset
    variable, would mean the current folder. Raises typer's BadParameter.
    """
    if not str(text):
        raise typer.BadParameter("the path is empty", ctx=context, param=parameter)
    return expanded(convert(text, parameter, context))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorashelf {VERSION}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
