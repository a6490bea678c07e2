"""The command as a process: streams whose failures raise our own errors, and signals that end it in order."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from .. import early
from ..errors import DiskError, Interrupted, Unread

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is unknown on Windows


class Stopped(KeyboardInterrupt):
    """A signal to end the command, handled like Ctrl-C."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.strsignal(signum))
        self.signum = signum


def interrupted(stop: KeyboardInterrupt, cure: str | None = None) -> Interrupted:
    """Return the error of an interrupt, with exit code 128 plus the signal's number: 130 for Ctrl-C."""
    code = 128 + getattr(stop, "signum", signal.SIGINT)
    return Interrupted("interrupted; committed changes are kept", cure=cure).amended(exit_code=code)


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """Make Ctrl-C, SIGTERM and SIGHUP raise Stopped in the block; a repetition ends the process at once.

    A signal that is ignored (nohup, a background job) stays ignored.
    """

    def stop(signum: int, _: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise Stopped(signum)

    before: dict[int, Any] = {}
    try:
        with contextlib.suppress(ValueError):  # in another thread than the main one
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is early.stop else handler)


class _Output(io.FileIO):
    """Standard output. The first failure raises an error that rich and typer do not handle themselves; later output,
    at the latest by Python at exit, is discarded.
    """

    failed = False

    def write(self, data: Any) -> int:
        """Write. Raises Unread, DiskError."""
        if self.failed:
            return len(data)
        try:
            return super().write(data) or 0
        except OSError as error:
            self.failed = True
            if error.errno == errno.EPIPE:
                raise Unread("the reader of standard output has closed the pipe") from error
            cure = "send the output elsewhere, or free some space; committed changes are kept"
            what = f"cannot write: {os.strerror(error.errno or 0)}"
            raise DiskError(what, where="standard output", cure=cure) from error


class _Notices(io.FileIO):
    """Standard error: failures to write a notice are ignored."""

    unread = False

    def write(self, data: Any) -> int:
        """Write, or discard the data on failure."""
        try:
            return super().write(data) or 0
        except OSError as error:
            self.unread = self.unread or error.errno == errno.EPIPE
            return len(data)


def open_streams() -> None:
    """Replace Python's standard streams with these; streams that tests have put there stay.

    A closed standard stream is opened for reading only: writing to it fails, and none of our files gets its number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Output(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Notices(2, "w", closefd=False), sys.stderr)


def _text(raw: io.FileIO, like: TextIO | None) -> TextIO:
    """Return a text stream that escapes characters which the terminal cannot show."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(like, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(like, "line_buffering", False) or raw.fileno() == 2,
        write_through=getattr(like, "write_through", False),
    )


def notices_unread() -> bool:
    """Return whether the reader of standard error has closed the pipe."""
    raw = getattr(getattr(sys.stderr, "buffer", None), "raw", None)
    return isinstance(raw, _Notices) and raw.unread
