"""The command line: `lorashelf COMMAND`. Each command is a few lines over the API; this module runs it and turns errors
into exit codes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

from ..errors import LorashelfError
from .app import application
from .output import print_json

__all__ = ["main"]
_INTERRUPTED = 130
_UNREAD = 141


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, else the error's exit code, 130 when interrupted (see errors.py), 141 when
    whoever reads stdout went away.
    """
    words = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name is printed even where the terminal lacks the letter
    sys.exit(_run(words))


def _run(words: list[str]) -> int:
    """The exit code, once everything is said, errors too."""
    try:
        return _answered(words)
    except (BrokenPipeError, SystemExit):  # the second is what typer makes of the first
        for stream in (sys.stdout, sys.stderr):  # the last flush, at exit, must find an open end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return _UNREAD


def _answered(words: list[str]) -> int:
    try:
        code = application(words)(words, prog_name="lorashelf", standalone_mode=False)
        sys.stdout.flush()
    except LorashelfError as error:
        return _fail(words, error.exit_code, error.kind, str(error), error.cure, error.done)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own: a usage error
            raise
        cure = "lorashelf --help, or lorashelf COMMAND --help"
        return _fail(words, 2, "usage", f"{error.format_message()}\n  cure:  {cure}", cure)
    if code == _INTERRUPTED:
        return _fail(words, code, "interrupted", "interrupted; what was committed stays", "run the command again")
    return int(code or 0)


def _fail(
    words: list[str],
    code: int,
    kind: str,
    message: str,
    cure: str | None,
    done: Mapping[str, Any] = MappingProxyType({}),
) -> int:
    print(f"lorashelf: {message}", file=sys.stderr)
    if "--json" in words:
        document: dict[str, Any] = {"error": {"kind": kind, "message": message, "cure": cure}, **done}
        print_json(document)
        sys.stdout.flush()
    return code
