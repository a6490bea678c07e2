"""Ctrl-C during the command line's imports: one line and exit code 130, not a traceback from an import.

The package imports this module first. In a library nothing changes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

MESSAGE = "interrupted before anything was done"


def stop(signum: int, _: object) -> None:
    """Print one line, with `--json` also a document, and end the process: nothing is open yet."""
    document = f'{{"error": {{"kind": "interrupted", "message": "{MESSAGE}", "where": null, "cure": null}}}}\n'
    for stream, text in ((2, f"lorashelf: {MESSAGE}\n"), (1, document if "--json" in sys.argv else "")):
        with contextlib.suppress(OSError):
            os.write(stream, text.encode())
    os._exit(128 + signum)


def _is_the_command() -> bool:
    """Return whether this process was started as `lorashelf` or `python -m lorashelf`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # its value until the package is imported
        return not {"lorashelf", "-mlorashelf"}.isdisjoint(sys.orig_argv)
    return os.path.basename(program) in ("lorashelf", "lorashelf.exe")


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGINT, stop)
