"""Locks that one holder at a time has, across threads and processes: an exclusive flock on a file that stays."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import atomic
from .errors import ShelfLocked, UsageError

POLL = 0.05  # seconds between two tries
_REPLACED = "the lock file was deleted or replaced while this writer held it"


class FileLock:
    """A lock on a file, which is made if it is not there; for one thread of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0
        """How often it was acquired and not released yet."""
        self._handle = -1

    def acquire(self, seconds: float) -> bool:
        """Take the lock, or once more what is held; False if another has it for so long. Raises OSError."""
        deadline = time.monotonic() + seconds
        while not self.depth and not self._take():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        self.depth += 1
        return True

    def release(self) -> None:
        """Let go what was acquired last."""
        self.depth -= 1
        if not self.depth:
            self._let_go()

    def stands(self) -> bool:
        """Whether the file that is locked is the one that others would lock."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        return False

    def _take(self) -> bool:
        while True:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self.stands():
                    return True
            except BlockingIOError:
                os.close(self._handle)
                return False
            except BaseException:
                os.close(self._handle)
                raise
            self._let_go()  # replaced between opening and locking: that is nobody's lock

    def _let_go(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_UN)  # a child that was forked meanwhile has the file open still
        os.close(self._handle)


@contextlib.contextmanager
def sole(lock: Path, what: str, where: Path, cure: str) -> Iterator[None]:
    """Hold a lock file. Raises UsageError in these words where another process holds it; DiskError."""
    held = FileLock(lock)
    with atomic.refusals(lock):
        if not held.acquire(0):
            raise UsageError(what, where=str(where), cure=cure)
    try:
        yield
    finally:
        held.release()


class WriterLock:
    """An exclusive lock on a file. A thread that holds it may take it again; a child process starts without it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = threading.local()

    @contextlib.contextmanager
    def held(self, seconds: float) -> Iterator[None]:
        """Hold the lock. Raises ShelfLocked where another writer holds it for so long, or may by now; DiskError."""
        atomic.no_links(self.path)
        lock = self._of_this_process()
        with atomic.refusals(self.path):
            if lock.depth:
                self.check()
            if not lock.acquire(seconds):
                cure = "wait until the other writer is done, then try again"
                raise ShelfLocked("another writer holds this shelf", where=str(self.path), cure=cure)
        process = os.getpid()
        try:
            yield
        finally:
            if process == os.getpid():  # else this is a child that was forked meanwhile: the parent holds it still
                lock.release()

    def check(self) -> None:
        """Raise ShelfLocked if the lock file was deleted or replaced, so that another writer may be at work."""
        if not self._of_this_process().stands():
            cure = "run the command again; never delete the lock file"
            raise ShelfLocked(_REPLACED, where=str(self.path), cure=cure)

    def _of_this_process(self) -> FileLock:
        """The thread's lock; a child process makes one of its own, as it would share what its parent holds."""
        if getattr(self._own, "process", None) != os.getpid():
            self._own.process = os.getpid()
            self._own.lock = FileLock(self.path)
        lock: FileLock = self._own.lock
        return lock
