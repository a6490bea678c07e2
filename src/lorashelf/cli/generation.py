"""The command `generate`: answer a text with a slot of the shelf."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..cache_folder import cache_folder
from ..errors import UsageError
from ..models.protocol import Answers, Embeds, LanguageModel, capable
from ..serving.generate import checked, service
from ..serving.text_routing import Choice, choose, examples_on, prototypes
from ..shelf.shelf import Shelf
from ..shelf.snapshot import Snapshot
from ..tasks.folders import ExampleSet, read_tasks
from . import arguments as arg
from .base import open_named
from .output import counted, note, print_json


def generate(
    shelf: arg.ShelfPath,
    task: Annotated[
        str | None, typer.Argument(help="A task on the shelf; not with --auto.", metavar="[TASK]", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Argument(help="The text to answer; without it: stdin.", metavar="[TEXT]", show_default=False)
    ] = None,
    base: arg.Base = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The instruction, instead of the stored one.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", help="Largest number of tokens of the answer; default: the stored one, else 64."
        ),
    ] = None,
    auto: Annotated[bool, typer.Option("--auto", help="Choose the task from the text; needs --examples.")] = False,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Task folders; their train.jsonl are examples of the tasks.")
    ] = None,
    engine: arg.Engine = "hf",
    device: arg.Device = None,
    dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    json: arg.Json = False,
) -> None:
    """Answer a text with the slot that serves its task; the answer is printed as it is generated."""
    reads = Shelf(shelf)
    snapshot = reads.snapshot()
    task, text = _positionals(snapshot, task, text, auto)
    shown = _shown(snapshot, examples, auto)
    asked = None
    if task is not None:
        asked = reads.read(lambda now: service(now, task, prompt=prompt, max_new_tokens=max_new_tokens))
    question = _read(text)
    needs: type[Answers] = LanguageModel if auto else Answers
    model = open_named(base, needs, engine=engine, device=device, dtype=dtype, template=template_arg, learns=False)
    choice = None
    if asked is None:
        choice = _chosen(capable(model, Embeds), snapshot, shown, question)
        stored = snapshot.manifest.tasks[choice.task].get("prompt", shown[choice.task].instruction)
        instruction = stored if prompt is None else prompt
        asked = reads.read(lambda now: service(now, choice.task, prompt=instruction, max_new_tokens=max_new_tokens))
    pieces = asked.stream(model, question)
    if json:
        document = {"task": asked.task, "slot": asked.slot, "text": "".join(pieces), "base": model.name}
        print_json({**document, "auto": None if choice is None else asdict(choice)})
    else:
        _print(pieces)


def _positionals(snapshot: Snapshot, task: str | None, text: str | None, auto: bool) -> tuple[str | None, str | None]:
    """Return TASK and TEXT; with --auto the only argument is TEXT."""
    if auto and text is not None:
        raise UsageError("--auto chooses the task", cure="give the text alone, or omit --auto")
    if not auto and task is None:
        raise UsageError(
            "no task is given", cure=f"the shelf has {', '.join(sorted(snapshot.manifest.tasks)) or 'none'}"
        )
    return (None, task) if auto else (task, text)


def _shown(snapshot: Snapshot, examples: Path | None, auto: bool) -> Mapping[str, ExampleSet]:
    """Return the examples by which --auto chooses; a notice lists the shelf's tasks without examples."""
    if not auto:
        if examples is not None:
            raise UsageError("--examples is for --auto", cure="add --auto, or omit --examples")
        return {}
    if examples is None:
        raise UsageError("--auto needs examples", cure="give a folder of task folders: --examples DIR")
    found = examples_on(snapshot, read_tasks(examples))
    if missing := sorted(snapshot.manifest.tasks.keys() - found.keys()):
        note(f"without examples, so never chosen: {', '.join(missing)}")
    return found


def _chosen(model: Embeds, snapshot: Snapshot, shown: Mapping[str, ExampleSet], text: str) -> Choice:
    watch = partial(counted, describe=lambda task: f"reading the examples of {task}")
    known = prototypes(model, shown, cache_folder() / "prototypes", watch=watch)
    choice = choose(model, known, snapshot, text)
    others = ", ".join(f"{name} {confidence:.2f}" for name, confidence in choice.others.items()) or "none"
    slot = f"slot {choice.slot} (confidence {choice.slot_confidence:.2f})"
    note(f"chosen: {slot} for {choice.task} ({choice.confidence:.2f}); next: {others}")
    return choice


def _read(text: str | None) -> str:
    """Return the text, or all of standard input without the final line break."""
    if text is None:
        if sys.stdin.isatty():
            note("type the text to answer, then Ctrl-D:")
        try:
            text = sys.stdin.buffer.read().decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not UTF-8: {error}", cure="convert it (iconv)") from error
    return checked(text)


def _print(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "generate": (
        generate,
        'lorashelf generate my.shelf qa-de "…"  ·  lorashelf generate my.shelf my-email < notes.txt',
    ),
}
