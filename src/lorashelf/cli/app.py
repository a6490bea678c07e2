"""The application: all commands, or only those of the module with the requested command."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
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
PANELS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "The shelf": ("filling", "shelves", "settings", "history", "clustering", "packing", "export", "report"),
        "Adapters": ("adapters", "coding"),
        "Language model": ("training", "evaluation", "generation", "serving", "bench"),
        "Start here": ("demo",),
    }
)
"""Panel of the help → the modules whose commands it lists."""
SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
        "init": "Create an empty shelf of K slots, or of a number of bytes.",
        "add": "Put adapters on the shelf, in order: each opens a free slot or is folded into the nearest.",
        "update": "Replace a task's adapter, in its slot.",
        "remove": "Remove a task from the shelf.",
        "route": "Print the PEFT folder that serves a task; for a coded slot it is written to a cache or to --output.",
        "ls": "List the slots, their tasks, and the bytes saved.",
        "set": "Change what is stored with a task (undo reverts it), or the settings of a shelf (in its shelf.toml).",
        "log": "List every operation since the shelf was created; `to` is the state that an undo or a redo led to.",
        "verify": "Check every object and kept manifest against its hash, every route, and that no state is missing "
        "from the log.",
        "undo": "Go back to the previous state; redo reverts this, until the next change.",
        "redo": "Go forward to the state that the latest undo left.",
        "repair": "Repair a damaged shelf: its files, and its slots from originals and kept states; lost tasks are "
        "unrouted.",
        "gc": "Delete the remains of a killed command.",
        "cluster": "Cluster many adapters into K slots, and merge each cluster.",
        "pack": "Code many adapters into a shelf of limited bytes, shared so that predicted quality is highest.",
        "convert": "Make a shelf with a coded object per task from another shelf, which stays as it is.",
        "export": "Write the objects of a shelf for another runtime (docs/exports.md).",
        "report": "Write a report on the shelf: tasks, bytes, similarity, history, evaluations. The HTML loads nothing "
        "else.",
        "show": "Show an adapter: modules, ranks, scales, norms, and the share of ‖ΔW‖² that lower ranks keep.",
        "compare": "Compare adapters pair by pair: how similar they are.",
        "plan": "Print what K slots, or bytes of coded objects, would cost and keep; write nothing.",
        "threshold": "Print a threshold for K-Merge++: the median pairwise similarity of held-out adapters.",
        "merge": "Merge adapters into one PEFT folder.",
        "compress": "Compress an adapter to a small file (docs/coded.md).",
        "extract": "Decode a coded adapter into a PEFT folder.",
        "train": "Train a LoRA adapter for every task, on the answers only. After an interrupt, run it again to "
        "resume.",
        "eval": "Measure loss and score of tasks: through a shelf's slots, with their own adapters, or with the bare "
        "base.",
        "generate": "Answer a text with the slot that serves its task; the answer is printed as it is generated.",
        "serve": "Serve the shelf's tasks over OpenAI's API, each as a model, and a page to look at the shelf and try "
        "them.",
        "bench": "Experiments as data: suites in TOML, results in JSON.",
        "demo": "Show lorashelf on real adapters: the shelf in seconds, then losses and answers of a language model.",
    }
)
"""Command → the first paragraph of its docstring, or a group's help: the list of all commands imports none of them."""


def application(words: Sequence[str] = ()) -> typer.Typer:
    """Return the command line for these words: with the commands of the called one's module; with all if there are
    no words; with a list of all, without their code, if none of them is called.
    """
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
    called = next((word for word in words if not word.startswith("-")), None)
    for panel, modules in PANELS.items():
        for name in modules:
            if not words or called in MODULES[name]:
                _register(app, panel, name)
            elif called not in SUMMARIES:
                _list(app, panel, name)
    return app


def _list(app: typer.Typer, panel: str, name: str) -> None:
    """List the commands of a module without importing it; they cannot be called."""
    for command in MODULES[name]:
        app.command(command, help=SUMMARIES[command], rich_help_panel=panel)(_listed)


def _listed() -> None:
    """Stand for a command in a list."""


def _register(app: typer.Typer, panel: str, name: str) -> None:
    """Register the COMMANDS of a module (name → function, example), in a group if they are not MODULES' own."""
    module = import_module(f".{name}", __package__)
    if tuple(module.COMMANDS) == tuple(MODULES[name]):
        for command, (function, example) in module.COMMANDS.items():
            app.command(command, epilog=f"Example:  {example}", rich_help_panel=panel)(function)
        return
    group = typer.Typer(name=name, help=SUMMARIES[name], no_args_is_help=True)
    for command, (function, example) in module.COMMANDS.items():
        group.command(command, epilog=f"Example:  {example}")(function)
    app.add_typer(group, rich_help_panel=panel)


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
