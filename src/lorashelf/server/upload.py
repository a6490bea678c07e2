"""An adapter as a browser sends it: the files of its folder, or a zip of them; unpacked under limits, then deleted."""

from __future__ import annotations

import contextlib
import stat
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from .. import atomic
from ..errors import UsageError
from ..formats.objects import CONFIG_FILE

MOST_BYTES = 2**30
"""Of all files together, unpacked."""
MOST_FILES = 256
_CHUNK = 2**20
_CURE = "send the folder of an adapter, or a zip of it"


@dataclass(frozen=True, slots=True)
class Sent:
    """A file as sent: its path in the folder, and its open content."""

    path: str
    file: IO[bytes]


@contextlib.contextmanager
def unpacked(sent: Sequence[Sent], most_bytes: int = MOST_BYTES) -> Iterator[tuple[Path, str]]:
    """Yield the adapter's folder, and the name that it had, for the block; afterwards nothing is left of it.

    Raises UsageError for a file that is not a zip, a path that leads out of it, a link, files that are too many, too
    large or not an adapter's; DiskError.
    """
    with tempfile.TemporaryDirectory(prefix="lorashelf-") as made, contextlib.ExitStack() as opened:
        files = [each for each in sent if each.path]
        if len(files) == 1 and files[0].path.lower().endswith(".zip"):
            name = PurePosixPath(files[0].path).stem
            files = _of_zip(files[0], opened, most_bytes)
        else:
            name = ""
        root = _root(files)
        folder, room = Path(made) / "adapter", most_bytes
        atomic.make_folder(folder)
        for each in files:
            path = _parts(each.path)
            if path[:-1] == root:
                room -= _write(each, folder / path[-1], room, most_bytes)
        yield folder, root[-1] if root else name


class _Zip(zipfile.ZipFile):
    """A zip whose directory is checked before anything is unpacked."""

    def faults(self, most_bytes: int) -> Iterator[str]:
        """Yield what its directory has that is not unpacked."""
        for entry in self._files:
            yield from _faults(entry)
        if len(self._files) > MOST_FILES:
            yield f"it has {len(self._files)} files; at most {MOST_FILES} are unpacked"
        if (total := sum(entry.file_size for entry in self._files)) > most_bytes:
            yield f"unpacked it has {total} bytes; at most {most_bytes} are unpacked"
        counts = Counter(entry.filename for entry in self._files)
        yield from (f"{name} is in it twice" for name, count in sorted(counts.items()) if count > 1)

    def sent(self, opened: contextlib.ExitStack) -> list[Sent]:
        """Return its files, open until `opened` is left. Raises BadZipFile, NotImplementedError, RuntimeError."""
        return [Sent(entry.filename, opened.enter_context(self.open(entry))) for entry in self._files]

    @property
    def _files(self) -> Sequence[zipfile.ZipInfo]:
        return [entry for entry in self.infolist() if not entry.is_dir()]


def _of_zip(sent: Sent, opened: contextlib.ExitStack, most_bytes: int) -> list[Sent]:
    """Return the files in a zip, after all checks that its directory allows. Raises UsageError with every fault."""
    try:
        archive = opened.enter_context(_Zip(sent.file))
        faults = list(archive.faults(most_bytes))
        found = [] if faults else archive.sent(opened)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, ValueError) as error:
        raise UsageError(f"this is not a zip that can be read: {error}", where=sent.path, cure=_CURE) from error
    if faults:
        raise UsageError("; ".join(faults), where=sent.path, cure=_CURE)
    return found


def _faults(entry: zipfile.ZipInfo) -> Iterator[str]:
    if stat.S_ISLNK(entry.external_attr >> 16):
        yield f"{entry.filename} is a link"
    elif _leads_out(entry.filename):
        yield f"{entry.filename} leads out of the zip"
    if entry.flag_bits & 1:
        yield f"{entry.filename} is encrypted"


def _leads_out(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return path.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\x00" in path


def _parts(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.replace("\\", "/").split("/") if part not in ("", "."))


def _root(files: Sequence[Sent]) -> tuple[str, ...]:
    """Return the folder of the adapter among the files. Raises UsageError if that is not one."""
    if len(files) > MOST_FILES:
        raise UsageError(f"{len(files)} files are sent; at most {MOST_FILES} are taken", cure=_CURE)
    if out := [each.path for each in files if _leads_out(each.path)]:
        raise UsageError(f"{', '.join(out)} leads out of the folder", cure=_CURE)
    found = [_parts(each.path)[:-1] for each in files if _parts(each.path)[-1:] == (CONFIG_FILE,)]
    if not found:
        names = ", ".join(sorted(each.path for each in files)[:5]) or "nothing"
        raise UsageError(f"this is not an adapter: no {CONFIG_FILE} among {names}", cure=_CURE)
    shortest = min(map(len, found))
    roots = sorted({root for root in found if len(root) == shortest})
    if len(roots) > 1:
        listed = ", ".join("/".join(root) for root in roots)
        raise UsageError(f"these are several adapters: {listed}", cure="send one at a time")
    return roots[0]


def _write(sent: Sent, path: Path, room: int, most_bytes: int) -> int:
    """Write a file, at most `room` bytes, and return its size. Raises UsageError, DiskError."""
    size = 0

    def chunks() -> Iterator[bytes]:
        nonlocal size
        while chunk := sent.file.read(_CHUNK):
            size += len(chunk)
            if size > room:
                raise UsageError(f"the files have more than {most_bytes} bytes", where=sent.path, cure=_CURE)
            yield chunk

    try:
        atomic.write_file(path, chunks())
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UsageError(f"this zip is damaged: {error}", where=sent.path, cure=_CURE) from error
    return size
