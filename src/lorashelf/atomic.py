"""Every write to disk, durable and all-or-nothing; no other module of lorashelf writes. Files are opened here, too.

A file is complete once `write_file` returns, and visible under its final name only after `publish` or `replace_file`:
renames inside one file system, followed by an fsync of the folder. Errors of the operating system become DiskErrors.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import CorruptShelf, DiskError, LorashelfError, UsageError

TICK = 11_000_000  # ns: file systems take a file's times from a clock that ticks every 1 to 10 ms
_STAGING = ".lorashelf-"
_CURES = {
    errno.ENOTEMPTY: "another program has created this path meanwhile: choose another one",
    errno.EEXIST: "another program has created this path meanwhile: choose another one",
    errno.ENOTDIR: "another program has created this path meanwhile: choose another one",
    errno.ENOSPC: "free some space; existing files are unchanged",
    errno.EDQUOT: "free some space; existing files are unchanged",
    errno.EFBIG: "raise the file size limit; existing files are unchanged",
    errno.EROFS: "this file system is mounted read-only; write elsewhere or remount it",
    errno.EACCES: "check the permissions, or write elsewhere",
    errno.EPERM: "check the permissions, or write elsewhere",
}


@contextlib.contextmanager
def refusals(path: Path, act: str = "write") -> Iterator[None]:
    """Turn an OSError into a DiskError that names the path and the cure."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        cure = _CURES.get(error.errno or 0) if act == "write" else "check the permissions and the path"
        raise DiskError(f"cannot {act}: {reason}", where=str(error.filename or path), cure=cure) from error


def expanded(path: str | Path) -> Path:
    """Return a path with a leading ~ or ~user replaced by that home folder."""
    return Path(os.path.expanduser(path))


def open_file(path: Path) -> int:
    """Open a regular file for reading. Raises OSError, also for a FIFO or a device, which could block."""
    return _open(path, os.O_RDONLY)


def _open(path: Path, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return handle


def read_file(path: Path) -> bytes:
    """Read the bytes of a regular file. Raises OSError."""
    with os.fdopen(open_file(path), "rb") as file:
        return file.read()


def make_folder(path: Path) -> None:
    """Create a folder (its parent exists) and make its name durable."""
    with refusals(path):
        os.mkdir(path)
        _sync(path.parent)


def make_parents(path: Path) -> None:
    """Create the missing folders above a path, and make their names durable."""
    for folder in reversed(path.absolute().parents):
        if not folder.exists():
            make_folder(folder)


def settle(folder: Path) -> None:
    """Make the names in a folder durable."""
    with refusals(folder):
        _sync(folder)


def settle_files(folder: Path) -> None:
    """Make the files that another program wrote into a folder durable, with their names."""
    with refusals(folder):
        for path in sorted(folder.iterdir()):
            settle_file(path)
        _sync(folder)


def settle_file(path: Path) -> None:
    """Make a file that another program wrote durable, without its name."""
    with refusals(path):
        handle = open_file(path)
        try:
            _flush(handle)
        finally:
            os.close(handle)


def is_vacant(path: Path) -> bool:
    """Return whether a new folder can take this path, which must be free or an empty folder. Raises DiskError."""
    with refusals(path, "read"):
        return not os.path.lexists(path) or (os.path.isdir(path) and not any(path.iterdir()))


def check_output(path: Path, noun: str = "folder") -> None:
    """Raise UsageError unless a new folder, or a new file, can take this path."""
    if not is_vacant(path) or (noun == "file" and os.path.isdir(path)):
        raise UsageError("the output already exists", where=str(path), cure=f"choose another {noun} or delete it")


@contextlib.contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """Create an empty folder in `parent` under a random name, for `publish`; deleted if the block fails.

    The folder is locked while this process lives, so that `sweep_staging` can recognise the folders of killed ones.
    """
    path, lock = _locked_folder(parent)
    try:
        yield path
    except BaseException:
        remove(path)
        raise
    finally:
        os.close(lock)


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Yield a staged folder that takes this path at the end: it appears complete or not at all.

    Raises UsageError if the path is taken, DiskError.
    """
    check_output(folder)
    make_parents(folder)
    sweep_staging(folder.parent)
    with staging(folder.parent) as staged:
        try:
            yield staged
            publish(staged, folder)
        except LorashelfError as error:
            if str(staged) in (error.where or ""):
                raise error.amended(where=str(folder)) from error.__cause__  # the path that the caller knows
            raise


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        path = parent / f"{_STAGING}{os.urandom(8).hex()}"
        with refusals(path):
            os.mkdir(path)
            try:
                with contextlib.suppress(FileNotFoundError):  # swept before this process locked it
                    lock = os.open(path, os.O_RDONLY)
                    with contextlib.suppress(OSError):  # some file systems cannot lock folders: there nothing is swept
                        fcntl.flock(lock, fcntl.LOCK_EX)
                    if os.path.isdir(path):
                        return path, lock
                    os.close(lock)
            except BaseException:
                remove(path)
                raise


def sweep_staging(parent: Path) -> None:
    """Delete the folders of `staging` in `parent` whose processes were killed; those of live ones are locked."""
    with contextlib.suppress(OSError, DiskError):  # folders that cannot be listed or deleted stay
        for path in sorted(parent.glob(f"{_STAGING}{'[0-9a-f]' * 16}")):
            if path.is_dir() and not path.is_symlink():
                lock = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
                except OSError:
                    continue
                finally:
                    os.close(lock)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file from chunks and fsync it. Raises DiskError, also if the file exists."""
    with refusals(path):
        handle = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            for chunk in chunks:
                _write_all(handle, chunk)
            _flush(handle)
        finally:
            os.close(handle)


def link(target: Path, path: Path) -> None:
    """Make a new symbolic link to a target, which may be relative to the link's folder. Raises DiskError."""
    with refusals(path):
        os.symlink(target, path)
        _sync(path.parent)


def append(path: Path, data: bytes, keep: int) -> None:
    """Truncate a file to its first `keep` bytes (removing a torn write), append, fsync. The file may be new."""
    with refusals(path):
        handle = _open(path, os.O_WRONLY | os.O_CREAT)
        try:
            os.ftruncate(handle, keep)
            os.lseek(handle, keep, os.SEEK_SET)
            _write_all(handle, data)
            _flush(handle)
        finally:
            os.close(handle)
        _sync(path.parent)


def publish(staged: Path, final: Path) -> None:
    """Give a staged file or folder, complete and synced inside, its final name, durably."""
    with refusals(final):
        if staged.is_dir():
            _sync(staged)
        os.rename(staged, final)
        _sync(final.parent)


def move(staged: Path, final: Path) -> None:
    """Give a file of a cache its final name; after a crash it may be incomplete."""
    with refusals(final):
        os.replace(staged, final)


def replace_file(path: Path, data: bytes, staging: Path) -> None:
    """Replace a small file via `staging`, a folder on the same file system; readers see the old or the new file."""
    place_file(path, data, staging)
    settle(path.parent)


def place_file(path: Path, data: bytes, staging: Path) -> None:
    """Replace a file as `replace_file` does, but durably only once its folder is settled: for several files."""
    staged = staging / f".{os.urandom(8).hex()}"
    try:
        write_file(staged, [data])
        with refusals(path):
            os.replace(staged, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(staged)
        if isinstance(error, DiskError):
            raise error.amended(where=str(path)) from error.__cause__  # the temporary name means nothing to the user
        raise


def remove(path: Path) -> None:
    """Delete a file, or a folder with its contents, if it exists. Links are unlinked, not followed."""
    with refusals(path):
        try:
            if path.is_dir() and not path.is_symlink():
                for child in sorted(path.iterdir()):
                    remove(child)
                os.rmdir(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass


def _write_all(handle: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk).cast("B")
    while view:
        view = view[os.write(handle, view) :]


def _flush(handle: int) -> None:
    if sys.platform == "darwin":  # where fsync does not reach the medium
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC)
    else:
        os.fsync(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def no_links(*paths: Path) -> None:
    """Raise CorruptShelf if one of the paths is a symbolic link: it could lead out of the shelf."""
    for path in paths:
        if path.is_symlink():
            cure = "replace the link by the file itself"
            raise CorruptShelf("a link is in the place of a file of the shelf", where=str(path), cure=cure)
