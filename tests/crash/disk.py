"""A disk that is watched: every call of lorashelf.atomic is counted and recorded; what a power cut leaves is computed.

`watched` puts a Watcher in the place of `os` inside lorashelf.atomic. Its calls are replayed on a Disk, which knows of
every file and folder what was there at its last fsync and what is pending since. A power cut leaves the former, and of
the latter nothing, or any part: a name is durable with its folder's fsync, bytes with their file's, nothing else is.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from lorashelf import atomic

# every path below a folder → its bytes, None for a folder; without the lock, which is an empty file
Picture = dict[str, "bytes | None"]
COUNTED = ("mkdir", "open", "write", "ftruncate", "fsync", "close", "rename", "replace", "unlink", "rmdir")


class Call(NamedTuple):
    """One call that was made: its name, the path (relative to the root), and `where` / `what` of what it changed."""

    name: str
    path: str
    where: Any = None
    what: Any = None


class Watcher:
    """Stands in for the module `os`: counts, records, does. `before(number, name, arguments)` may end it all."""

    def __init__(self, root: Path, seed: int = 0, before: Callable[[int, str, tuple[Any, ...]], None] | None = None):
        self.calls: list[Call] = []
        self._root = root
        self._random = random.Random(seed)  # so that the same run gives the same names
        self._before = before
        self._open: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return partial(self._call, name) if name in COUNTED else getattr(os, name)

    def urandom(self, size: int) -> bytes:
        return self._random.randbytes(size)

    def _call(self, name: str, *arguments: Any) -> Any:
        if self._only_reads(name, *arguments):
            return getattr(os, name)(*arguments)
        self.calls.append(Call("failed", name))
        if self._before:
            self._before(len(self.calls) - 1, name, arguments)
        described = self._describe(name, *arguments)
        result = None if name == "fsync" else getattr(os, name)(*arguments)  # the power stays on here
        if name == "open":
            self._open[result] = described.path
        if name == "close":
            del self._open[arguments[0]]
        if name == "write":
            described = described._replace(what=bytes(arguments[1])[:result])
        self.calls[-1] = described
        return result

    def _only_reads(self, name: str, first: Any, *rest: Any) -> bool:
        """Whether a call has to do with a file that is open to be read alone."""
        if name == "open":
            return not rest[0] & (os.O_WRONLY | os.O_RDWR) and not os.path.isdir(first)
        return isinstance(first, int) and first not in self._open

    def _describe(self, name: str, first: Any, *rest: Any) -> Call:
        path = self._open[first] if isinstance(first, int) else self._relative(first)
        if name == "open":
            new = rest[0] & os.O_CREAT and not os.path.exists(first)
            return Call("create" if new else "cut" if rest[0] & os.O_TRUNC else "open", path, 0)
        if name == "write":
            return Call(name, path, os.lseek(first, 0, os.SEEK_CUR))
        if name == "ftruncate":
            return Call("cut", path, rest[0])
        if name in ("rename", "replace"):
            return Call("rename", path, self._relative(rest[0]))
        return Call(name, path)

    def _relative(self, path: Any) -> str:
        return str(Path(path).relative_to(self._root))


@contextlib.contextmanager
def watched(root: Path, **options: Any) -> Iterator[Watcher]:
    """Every effect of lorashelf.atomic below `root`, watched. macOS's own fsync is taken as fsync."""
    watcher = Watcher(root, **options)
    with mock.patch.object(atomic, "os", watcher), mock.patch.object(atomic, "sys", SimpleNamespace(platform="linux")):
        yield watcher


@dataclass(eq=False)
class Inode:
    """A folder (name → Inode) or a file (bytes): what is durable, and the changes since, each (where, what)."""

    durable: dict[str, Inode] | bytes
    pending: list[tuple[Any, Any]] = field(default_factory=list)

    def content(self, reached: Callable[[], bool] = lambda: True) -> dict[str, Inode] | bytes:
        """What is there once those of the pending changes are done that `reached` the disk."""
        content: Any = dict(self.durable) if isinstance(self.durable, dict) else self.durable
        for where, what in self.pending:
            if not reached():
                continue
            if isinstance(content, dict):
                content = {name: inode for name, inode in content.items() if name != where}
                content |= {where: what} if what else {}
            elif what is None:
                content = content[:where]
            else:
                content = content[:where].ljust(where, b"\0") + what + content[where + len(what) :]
        return content

    def sync(self) -> None:
        self.durable, self.pending = self.content(), []


class Disk:
    """A folder as it stood, all of it durable, and what the calls played on it make of it."""

    def __init__(self, folder: Path, dropped: Callable[[Inode], bool] = lambda inode: False):
        """`dropped`: whose fsync shall do nothing."""
        self.root = _inode(folder)
        self._dropped = dropped

    def play(self, calls: list[Call]) -> None:
        for call in calls:
            self._play(*call)

    def _play(self, name: str, path: str, where: Any, what: Any) -> None:
        if name in ("failed", "open", "close"):
            return
        folder, _, last = path.rpartition("/")
        if name in ("mkdir", "create"):
            self._find(folder).pending.append((last, Inode({} if name == "mkdir" else b"")))
        elif name in ("unlink", "rmdir"):
            self._find(folder).pending.append((last, None))
        elif name == "rename":
            target, _, final = where.rpartition("/")
            self._find(target).pending.append((final, self._find(path)))
            self._find(folder).pending.append((last, None))
        elif name == "fsync":
            if not self._dropped(self._find(path)):
                self._find(path).sync()
        else:
            self._find(path).pending.append((where, what))

    def standing(self) -> Picture:
        """What is there while the power stays on."""
        return _picture(self.root, lambda: True)

    def after_power_cut(self, seed: int | None = None) -> Picture:
        """What is left: of all that is pending nothing, or with a seed a part drawn at random."""
        draw = random.Random(seed)
        return _picture(self.root, lambda: seed is not None and draw.random() < 0.5)

    def _find(self, path: str) -> Inode:
        inode = self.root
        for name in Path(path).parts:
            content = inode.content()
            assert isinstance(content, dict)
            assert name in content, f"{path} was made by something else than lorashelf.atomic"
            inode = content[name]
        return inode


@contextlib.contextmanager
def in_memory(otherwise: Path) -> Iterator[Path]:
    """An empty folder for thousands of small files: in memory where the system has a disk there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else otherwise) as folder:
        yield Path(folder)


def picture(folder: Path) -> Picture:
    """Everything below a folder."""
    return _picture(_inode(folder), lambda: True)


def restored(picture: Picture, target: Path) -> Path:
    """The folder of a picture."""
    target.mkdir()
    for path, data in picture.items():
        (target / path).mkdir() if data is None else (target / path).write_bytes(data)
    return target


def _inode(path: Path) -> Inode:
    if not path.is_dir():
        return Inode(path.read_bytes())
    return Inode({child.name: _inode(child) for child in sorted(path.iterdir()) if child.name != "lock"})


def _picture(root: Inode, reached: Callable[[], bool]) -> Picture:
    settled: dict[int, Any] = {}  # a folder that two names lead to is drawn once
    found: Picture = {}

    def look(inode: Inode, path: str) -> None:
        if id(inode) not in settled:
            settled[id(inode)] = inode.content(reached)
        content = settled[id(inode)]
        found[path] = None if isinstance(content, dict) else content
        for name, child in sorted(content.items()) if isinstance(content, dict) else ():
            look(child, f"{path}/{name}" if path else name)

    look(root, "")
    del found[""]
    return found
