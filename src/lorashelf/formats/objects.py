"""An object of a shelf: files, and the digest that names them. docs/format.md is normative."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..atomic import TICK, open_file
from ..digest import digest

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_BLOCK = 2**22  # bytes hashed at a time: enough to make waits for the interpreter lock negligible
_known: dict[tuple[int, ...], str] = {}
_locks: dict[tuple[int, ...], threading.Lock] = {}


class Stored(NamedTuple):
    """A written object: its id, and CRC-32 of config and header together, then of each tensor in file order."""

    identity: str
    sums: tuple[int, ...]


class StoredFile(NamedTuple):
    """A file in `objects/` that objects may share: its name and its size."""

    name: str
    bytes: int


def object_digest(files: Sequence[Path]) -> str:
    """Return the digest of the length and the bytes of each file, in this order. Raises OSError."""
    return digest(_chunks(files))


def known_digest(files: Sequence[Path]) -> str:
    """Return `object_digest`, cached in this process while the files' sizes and times do not change."""
    before = _stamp(files)
    with _locks.setdefault(before, threading.Lock()):  # other threads wait while one hashes the files
        if before in _known:
            return _known[before]
        found = object_digest(files)
        # a file changed just now may change again within one tick of its times
        if max(before[4::5]) <= time.time_ns() - TICK and _stamp(files) == before:
            _known[before] = found
        return found


def length(size: int) -> bytes:
    """Encode a file's length for a digest."""
    return size.to_bytes(8, "little")


def _chunks(files: Sequence[Path]) -> Iterator[bytes | memoryview]:
    block = memoryview(bytearray(_BLOCK))
    for path in files:
        with open(open_file(path), "rb", buffering=0) as file:
            yield length(os.fstat(file.fileno()).st_size)
            while count := file.readinto(block):
                yield block[:count]


def _stamp(files: Sequence[Path]) -> tuple[int, ...]:
    """Return device, inode, size, mtime and ctime of each file."""
    found = [os.lstat(path) for path in files]
    return tuple(n for s in found for n in (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
