"""The command `serve`: OpenAI's API over a shelf."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..cache_folder import cache_folder
from ..errors import MissingExtra, UsageError, numbered
from ..models.protocol import Continues, Embeds, capable
from ..tasks.folders import read_tasks
from . import arguments as arg
from .base import open_named
from .output import note, print_json

if TYPE_CHECKING:
    from ..server.served_shelf import ServedShelf


def serve(
    shelf: arg.ShelfPath,
    base: arg.Base = None,
    engine: arg.Engine = "hf",
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0 is any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="LORASHELF_API_KEY",
            help="The bearer key that clients must send; required if others can reach the host.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        Path | None, typer.Option("--examples", help="Task folders, by which the model id `auto` chooses a task.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="The most texts that are continued side by side.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=0, help="The most requests that wait; others get 429.")] = 64,
    most_tokens: Annotated[int, typer.Option("--most-tokens", min=1, help="The most tokens of an answer.")] = 1024,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="The most seconds of a request.")] = 300.0,
    body: Annotated[
        str, typer.Option("--body", metavar="SIZE", help="The largest body of a request: 1000000, 1MB, 1MiB.")
    ] = "1MiB",
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds for running answers when the server is stopped.")
    ] = 30.0,
    device: arg.Device = None,
    dtype: arg.ModelDtype = None,
    template_arg: arg.TemplateArgs = None,
    json: arg.Json = False,
) -> None:
    """Serve the shelf's tasks over OpenAI's API, each as a model, and a page to look at the shelf and try them."""
    try:
        from ..server.app import Limits, Server
        from ..server.auto import Auto
        from ..server.guard import is_loopback
        from ..server.process import Process, listening, url
        from ..server.served_shelf import ServedShelf
    except ModuleNotFoundError as error:
        raise MissingExtra("the server", error.name or "a package", "serve") from error
    from ..serving.scheduler import Scheduler

    if api_key is None and not is_loopback(host):
        cure = "give --api-key KEY, or set LORASHELF_API_KEY"
        raise UsageError("without a key the server listens on this machine alone", where=host, cure=cure)
    if api_key is not None and not api_key.strip():
        raise UsageError("the key is empty", cure="give --api-key KEY, or unset LORASHELF_API_KEY")
    limits = Limits(seconds, arg.byte_count(body), most_tokens)
    served = ServedShelf(shelf)
    tasks = None if examples is None else read_tasks(examples)
    with listening(host, port) as taken:
        needs: type[Continues] = Continues
        model = open_named(base, needs, device=device, dtype=dtype, template=template_arg, engine=engine, learns=False)
        scheduler = Scheduler(model, rows=rows, waiting=queue)
        try:
            auto = None
            if tasks is not None:
                auto = Auto(capable(model, Embeds), tasks, cache_folder() / "prototypes")
                scheduler.call(partial(auto.known, served.snapshot())).result()
            server = Server(served, model, scheduler, limits=limits, key=api_key, auto=auto)
            _announce(served, url(taken), model.name, json)
            logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
            Process(server.application(), grace, server.stop).run([taken])
        finally:
            scheduler.close()


def _announce(served: ServedShelf, address: str, base: str, as_json: bool) -> None:
    """Print where the server listens; every task's base is compared with the model."""
    names = sorted(served.tasks)
    if names:
        served.service(names[0]).note_base(base)
    if as_json:
        print_json({"url": address, "tasks": names, "base": base})
    else:
        print(f"{numbered(len(names), 'task')} of {served.path}: a page at {address}, OpenAI's API at {address}/v1")
    sys.stdout.flush()
    note("Ctrl-C stops the server")


COMMANDS: Mapping[str, tuple[Callable[..., None], str]] = {
    "serve": (serve, "lorashelf serve my.shelf --port 8000"),
}
