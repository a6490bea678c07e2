"""The server as a process: its socket, taken before the model is loaded, and its orderly stop."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ..errors import UsageError

KEPT_ALIVE = 75  # seconds: longer than clients keep idle connections, so that none is closed while it is asked
_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; connections wait until they are served. Raises UsageError."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the host cannot be found: {error}", where=where, cure="give another --host") from error
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                "the port is in use", where=where, cure="give another --port, or 0 for a free one"
            ) from error
        what = f"cannot listen: {os.strerror(error.errno or 0)}"
        raise UsageError(what, where=where, cure="give another --host or --port") from error
    return made


def url(taken: socket.socket) -> str:
    """Return the address of a listening socket."""
    host, port, *_ = taken.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Process(uvicorn.Server):
    """Serves until a signal: then no new connections, and running answers have `grace` seconds. A second signal ends it
    at once.
    """

    def __init__(self, app: ASGIApp, grace: float, stopping: Callable[[], None]) -> None:
        self._stopping = stopping
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEPT_ALIVE,
                timeout_graceful_shutdown=max(1, round(grace)),
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on Ctrl-C, SIGTERM and SIGHUP, and do not raise them again: stopping is how a server ends."""
        before = {}
        with contextlib.suppress(ValueError):  # in another thread than the main one
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; on a second signal stop at once."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._stopping()
