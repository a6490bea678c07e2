"""The lock that one writer at a time holds, across threads and processes: an exclusive lock on a file that stays."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import atomic
from .errors import ShelfLocked

_REPLACED = "the lock file was deleted or replaced while this writer held it"


class WriterLock:
    """An exclusive lock on a file. A thread that holds it may take it again; a child process starts without it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = threading.local()

    @contextlib.contextmanager
    def held(self, seconds: float) -> Iterator[None]:
        """Hold the lock. Raises ShelfLocked where another writer holds it for so long, or may by now; DiskError."""
        import filelock  # here: readers never need it, and it costs a third of the start

        atomic.no_links(self.path)
        lock = self._of_this_process()
        with atomic.refusals(self.path):
            if lock.is_locked:
                self.check()
            try:
                lock.acquire(timeout=seconds)
                while not self.stands():  # replaced between opening and locking: that is nobody's lock
                    lock.release()
                    lock.acquire(timeout=seconds)
            except filelock.Timeout as error:
                cure = "wait until the other writer is done, then try again"
                raise ShelfLocked("another writer holds this shelf", where=str(self.path), cure=cure) from error
        process = os.getpid()
        try:
            yield
        finally:
            if process == os.getpid():  # else this is a child that was forked meanwhile: the parent holds it still
                lock.release()

    def stands(self) -> bool:
        """Whether the file that this thread has locked is the one that others would lock."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return bool((there.st_dev, there.st_ino) == self._own.file)

    def check(self) -> None:
        """Raise ShelfLocked if the lock file was deleted or replaced, so that another writer may be at work."""
        if not self.stands():
            cure = "run the command again; never delete the lock file"
            raise ShelfLocked(_REPLACED, where=str(self.path), cure=cure)

    def _of_this_process(self) -> Any:
        """The thread's lock; a child process makes one of its own, as it would share what its parent holds."""
        import filelock

        if getattr(self._own, "process", None) != os.getpid():
            self._own.process = os.getpid()
            self._own.lock = filelock.FileLock(self.path, on_acquired=self._note)
        return self._own.lock

    def _note(self, descriptor: int) -> None:
        found = os.fstat(descriptor)
        self._own.file = (found.st_dev, found.st_ino)
