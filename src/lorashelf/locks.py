"""Exclusive locks across threads and processes: a flock on a file, which is not deleted."""

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

POLL = 0.05  # seconds between two attempts
_REPLACED = "the lock file was deleted or replaced while this writer held it"


class FileLock:
    """A lock on a file, created if missing; for one thread of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.depth = 0
        """How many times the lock was acquired and not yet released."""
        self._handle = -1

    def acquire(self, seconds: float) -> bool:
        """Acquire the lock, also if already held; False if another holds it for `seconds`. Raises OSError."""
        deadline = time.monotonic() + seconds
        while not self.depth and not self._take():
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL)
        self.depth += 1
        return True

    def release(self) -> None:
        """Release the last acquisition."""
        self.depth -= 1
        if not self.depth:
            self._let_go()

    def stands(self) -> bool:
        """Return whether the locked file is still the one that others would lock."""
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
            self._let_go()  # replaced between opening and locking: no lock for others

    def _let_go(self) -> None:
        fcntl.flock(self._handle, fcntl.LOCK_UN)  # a child forked meanwhile still has the file open
        os.close(self._handle)


@contextlib.contextmanager
def sole(lock: Path, what: str, where: Path, cure: str) -> Iterator[None]:
    """Hold a lock file. Raises UsageError, with the given texts, if another process holds it; DiskError."""
    held = FileLock(lock)
    with atomic.refusals(lock):
        if not held.acquire(0):
            raise UsageError(what, where=str(where), cure=cure)
    try:
        yield
    finally:
        held.release()


class WriterLock:
    """An exclusive lock on a file. A thread may acquire the lock repeatedly; a child process starts without it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = threading.local()

    @contextlib.contextmanager
    def held(self, seconds: float) -> Iterator[None]:
        """Hold the lock. Raises ShelfLocked if another writer holds it for `seconds`, or may hold it now; DiskError."""
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
            if process == os.getpid():  # else this is a child forked meanwhile: the parent still holds the lock
                lock.release()

    def check(self) -> None:
        """Raise ShelfLocked if the lock file was deleted or replaced: another writer may be active."""
        if not self._of_this_process().stands():
            cure = "run the command again; never delete the lock file"
            raise ShelfLocked(_REPLACED, where=str(self.path), cure=cure)

    def _of_this_process(self) -> FileLock:
        """Return the thread's lock; a child process makes its own, else it would share its parent's."""
        if getattr(self._own, "process", None) != os.getpid():
            self._own.process = os.getpid()
            self._own.lock = FileLock(self.path)
        lock: FileLock = self._own.lock
        return lock
