"""The command line: `lorashelf COMMAND`, each command a few lines over the API.

This module runs it and turns errors into exit codes.
"""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from ..documents import Failure
from ..errors import AdapterError, LorashelfError, Unread, UsageError
from ..execution import own_process
from .app import command_line
from .output import print_json
from .process import interrupted, notices_unread, open_streams, signals

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, else the error's exit code (see errors.py); 128 and the signal's number
    when interrupted, 141 when the reader of stdout has closed the pipe.
    """
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    own_process()
    open_streams()
    code = _run(words)
    sys.exit(Unread.exit_code if code and notices_unread() else code)


def _run(words: list[str]) -> int:
    """Run the command, print everything, errors included, and return the exit code."""
    try:
        code = _called(words)
        sys.stdout.flush()
        return code
    except BaseException as error:
        try:
            return _fail(words, _known(error))
        except LorashelfError as second:  # the error cannot be printed either
            print(f"lorashelf: {second}", file=sys.stderr)
            return second.exit_code


def _called(words: list[str]) -> int:
    """Call the command. Not through typer's call, which handles a closed pipe, Ctrl-C and SystemExit itself."""
    command = command_line(words)
    try:
        with signals(), command.make_context("lorashelf", list(words)) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _known(error: BaseException) -> LorashelfError:
    """Convert an error to one of ours: typer's are usage errors; any other is a bug, whose traceback is printed."""
    if isinstance(error, LorashelfError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return interrupted(error)
    if hasattr(error, "format_message"):
        return UsageError(error.format_message(), cure=_usage(error))
    sys.excepthook(type(error), error, error.__traceback__)
    bug = LorashelfError(f"this is a bug: {type(error).__name__}: {error}", cure="report it, with the lines above")
    if isinstance(error, SystemExit) and type(error.code) is int and error.code:
        return bug.amended(exit_code=error.code)
    return bug


def _usage(error: Any) -> str:
    """Return the cure for one of typer's errors: the help of the missing or wrong parameter."""
    parameter: Any = getattr(error, "param", None)
    if not getattr(parameter, "help", None):
        return "lorashelf --help, or lorashelf COMMAND --help"
    name = max(parameter.opts, key=len) if parameter.param_type_name == "option" else parameter.human_readable_name
    return f"give {name}: {parameter.help}"


def _fail(words: list[str], error: LorashelfError) -> int:
    """Print the error, with --json also as a document, and return the exit code."""
    if isinstance(error, Unread):
        return error.exit_code
    print(f"lorashelf: {error}", file=sys.stderr)
    if "--json" in words:
        document: Failure = {
            "kind": error.kind,
            "message": error.what,
            "where": error.where,
            "cure": error.cure,
        }
        if isinstance(error, AdapterError):
            document["faults"] = list(error.faults)
            document["cures"] = [reason.cure for reason in error.reasons]
        print_json({"error": document, **error.done})
        sys.stdout.flush()
    return error.exit_code
